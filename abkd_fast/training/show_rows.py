"""`--show-rows`: the first rows of the data as a model sees them, and which of their tokens are trained."""

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ..config.schema import DataConfig
from ..console import console
from ..data.batches import count_labels
from ..data.chat import PromptFormat
from ..data.rows import Row
from ..data.tokenize import tokenize


class ShownSample(NamedTuple):
    """A sample for people, or a row that gives none."""

    where: str  # file and line
    pieces: tuple[tuple[str, bool], ...]  # the text with its special tokens in parts, and whether a part is trained
    tokens: int = 0
    trained_tokens: int = 0
    left_out: str | None = None  # why the row gives no sample

    def to_json(self) -> str:
        """One line: where, text, trained (the parts that get a loss), tokens, trained_tokens, and left_out if it is."""
        values = {
            "where": self.where,
            "text": "".join(text for text, _ in self.pieces),
            "trained": [text for text, is_trained in self.pieces if is_trained],
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
        }
        return json.dumps(values | ({"left_out": self.left_out} if self.left_out else {}), ensure_ascii=False)

    def to_text(self) -> Text:
        """The same for a terminal: trained parts are green."""
        counts = self.left_out or f"{self.tokens} tokens, {self.trained_tokens} of them trained"
        styled = [(text, "bold green" if is_trained else "") for text, is_trained in self.pieces]
        return Text.assemble((f"{self.where}: {counts}\n", "dim"), *styled, "\n")


def shown_samples(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, data: DataConfig, style: PromptFormat
) -> Iterator[ShownSample]:
    """Every sample of the rows as it is trained on, and rows that are left out. Raises ConfigError as `tokenize`."""
    tokenized = tokenize(rows, tokenizer, data.max_length, data.max_prompt_length, style, data.on_bad_row)
    samples = {index: [*own] for index, own in itertools.groupby(tokenized.dataset, lambda sample: sample["row"])}
    for index, row in enumerate(rows):
        for sample in samples.get(index, ()):
            ids, spans = sample["input_ids"], sample["spans"]
            pieces = tuple(_pieces(tokenizer, ids, spans))
            yield ShownSample(row.where, pieces, len(ids), count_labels(sample))
        if reason := tokenized.why_left_out(index):
            yield ShownSample(row.where, (), left_out=reason)


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
