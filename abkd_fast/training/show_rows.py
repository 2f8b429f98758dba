"""`--show-rows`: the first rows of the data as a model sees them, and which of their tokens are trained."""

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ..config.schema import DataConfig
from ..console import console, shown
from ..data.batches import count_labels, teacher_view
from ..data.chat import PromptFormat
from ..data.rows import Row
from ..data.teacher_prompts import SeveralFormats, TeacherFormat
from ..data.tokenize import tokenize
from ..errors import printable


class ShownSample(NamedTuple):
    """A sample for people, or a row that gives none."""

    where: str  # file and line
    pieces: tuple[tuple[str, bool], ...]  # the text with its special tokens in parts, and whether a part is trained
    tokens: int = 0
    trained_tokens: int = 0
    left_out: str | None = None  # why the row gives no sample
    teacher: tuple[tuple[str, bool], ...] = ()  # the pieces as the teacher reads them, if after another prompt
    teacher_tokens: int = 0
    teacher_name: str | None = None  # of several

    def to_json(self) -> str:
        """One line: where, text, trained (the parts that get a loss), tokens, trained_tokens.

        And left_out if it is, teacher_text and teacher_tokens if the teacher reads another prompt, and its name as
        teacher if there are several.
        """
        values = {
            "where": self.where,
            "text": "".join(text for text, _ in self.pieces),
            "trained": [text for text, is_trained in self.pieces if is_trained],
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
        }
        if self.left_out:
            values["left_out"] = self.left_out
        if self.teacher_name:
            values["teacher"] = self.teacher_name
        if self.teacher:
            values["teacher_text"] = "".join(text for text, _ in self.teacher)
            values["teacher_tokens"] = self.teacher_tokens
        return json.dumps(values, ensure_ascii=False)

    def to_text(self) -> Text:
        """The same for a terminal: trained parts are green."""
        counts = self.left_out or f"{self.tokens} tokens, {self.trained_tokens} of them trained"
        of = f" (teacher {self.teacher_name})" if self.teacher_name else ""
        sample = Text.assemble((f"{shown(self.where + of)}: {counts}\n", "dim"), *_styled(self.pieces), "\n")
        if self.teacher:
            sample += Text.assemble(
                (f"the teacher reads {self.teacher_tokens} tokens:\n", "dim"), *_styled(self.teacher), "\n"
            )
        return sample


def _styled(pieces: Iterable[tuple[str, bool]]) -> list[tuple[str, str]]:
    return [(printable(text, "\n\t"), "bold green" if is_trained else "") for text, is_trained in pieces]


def shown_samples(
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    style: PromptFormat,
    teacher: TeacherFormat | SeveralFormats | None = None,
) -> Iterator[ShownSample]:
    """Every sample of the rows as it is trained on, and rows that are left out. Raises ConfigError as `tokenize`."""
    tokenized = tokenize(rows, tokenizer, data.max_length, data.max_prompt_length, style, data.on_bad_row, teacher)
    samples = {index: [*own] for index, own in itertools.groupby(tokenized.dataset, lambda sample: sample["row"])}
    for index, row in enumerate(rows):
        for sample in samples.get(index, ()):
            views = [(one["input_ids"], one["spans"]) for one in (sample, teacher_view(sample))]
            (ids, _), (theirs, _) = views
            pieces, of_teacher = (tuple(_pieces(tokenizer, *view)) for view in views)
            own = ShownSample(row.where, pieces, len(ids), count_labels(sample), teacher_name=row.teacher)
            yield own if theirs == ids else own._replace(teacher=of_teacher, teacher_tokens=len(theirs))
        if reason := tokenized.why_left_out(index):
            yield ShownSample(row.where, (), left_out=reason, teacher_name=row.teacher)


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], spans: list[int]) -> Iterator[tuple[str, bool]]:
    """The text between the ends of spans. A piece alone might decode to another text: SentencePiece strips spaces."""
    done = ""
    for number, place in enumerate([*spans, len(ids)]):
        text = tokenizer.decode(ids[:place], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if len(text) > len(done):
            yield text[len(done) :], number % 2 == 1
        done = text


def print_samples(samples: Iterable[ShownSample]) -> None:
    """Prints each sample once: as a line of JSON, or in color where the output is a terminal."""
    for sample in dict.fromkeys(samples):
        if console.is_terminal:
            console.print(sample.to_text())
        else:
            console.file.write(sample.to_json() + "\n")
