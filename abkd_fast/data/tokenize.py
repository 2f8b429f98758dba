"""Tokenization of checked rows. The result is stored on the disk."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator

import datasets
import numpy as np
import pyarrow
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError
from .chat import PromptFormat
from .encode import Encoder, Sample
from .rows import Row
from .strict_json import show
from .teacher_prompts import CutSample, SeveralFormats, TeacherFormat
from .token_store import fingerprint, stored

# Columns of tokenized data: of a sample, and of a sample that comes from a row.
SAMPLE = datasets.Features(
    {"input_ids": datasets.List(datasets.Value("int32")), "spans": datasets.List(datasets.Value("int32"))}
)
ROW = datasets.Features({**SAMPLE, "row": datasets.Value("int64"), "row_length": datasets.Value("int32")})
# And where the teacher reads another prompt, the sample as it reads it.
TAUGHT = datasets.Features({**ROW, **{f"teacher_{name}": feature for name, feature in SAMPLE.items()}})
ROWS_AT_ONCE = 1000
NO_REFERENCE = (
    "the messages end without a text of the assistant to compare with: add one, or give the messages before the answer "
    'as "prompt", and the text, or a list of several that are right, as "output"'
)


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """The samples of a data set, and the rows that gave none."""

    dataset: datasets.Dataset  # the columns of ROW, or of TAUGHT
    bad: dict[int, str]  # rows that can't be used, by their index, and why
    long: dict[int, str]  # rows with a prompt that is too long, likewise; of messages other turns may have samples
    taught: int  # how many rows the teacher reads after a prompt of its own
    format: str  # for people: what prompts begin with, what is trained, and what ends it

    def notes(self, rows: list[Row], max_length: int) -> Iterator[str]:
        """Lines for people about rows that are cut or left out."""
        if cut := int((self.dataset.with_format("numpy")["row_length"][:] > max_length).sum()):
            yield f"{cut} of {len(self.dataset)} samples exceed {max_length} tokens and are cut"
        if "teacher_spans" in self.dataset.column_names:
            theirs, own = (np.mean([spans[0] for spans in self.dataset[key][:]]) for key in ("teacher_spans", "spans"))
            lengths = f"on average {theirs:.1f} tokens, the student's {own:.1f}"
            yield f"the teacher reads a prompt of its own in {self.taught} of {len(rows)} rows; all prompts: {lengths}"
        whole, parts = {}, {}
        kept = set(self.dataset["row"][:]) if self.long else ()
        for row, reason in self.long.items():
            (parts if row in kept else whole)[row] = reason
        for what, left_out, named in (
            ("rows are left out", self.bad, 3),
            ("rows are left out", whole, 1),
            ("rows lack some of their answers", parts, 1),
        ):
            if left_out:
                shown = "; ".join(f"{rows[row].where}: {left_out[row]}" for row in [*left_out][:named])
                others = f", and {len(left_out) - named} others" if len(left_out) > named else ""
                yield f"{len(left_out)} of {len(rows)} {what}: {shown}{others}"

    def why_left_out(self, row: int) -> str | None:
        return self.bad.get(row) or self.long.get(row)


def tokenize(
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int | None = None,
    style: PromptFormat = PromptFormat(),  # noqa: B008 - it is frozen
    on_bad_row: str = "stop",
    teacher: TeacherFormat | SeveralFormats | None = None,
) -> Tokenized:
    """Tokenizes rows as `Encoder` says into the columns of ROW; lengths are in tokens:

    - input_ids: the sample, cut to max_length tokens;
    - spans: start and stop of every response that is trained, one after the other;
    - row: the index of the sample's row in `rows`; a row of messages may give several samples;
    - row_length: the length of the sample before the cut (of a very long one: more than max_length);
    - teacher_input_ids, teacher_spans: the same responses after the teacher's prompts, which may be of any length. They
      are there if `teacher` is given and reads another prompt than the student in any row.

    Samples with more than max_prompt_length tokens before the first response are left out. The result is stored in the
    cache of `datasets`, under a hash of rows, tokenizer, format and limits.

    Raises ConfigError if no row is left, and, unless on_bad_row is "skip", for a row that can't be used: a prompt that
    is empty or leaves no room for a response, a chat template that fails or loses a part, foreign token ids, a response
    that the teacher would read as another text.
    """
    encoder = Encoder(tokenizer, style, max_length)
    contents = (json.dumps(row.values, default=np.ndarray.tolist) for row in rows)
    settings = [dataclasses.asdict(style), max_length, max_prompt_length]
    prompts, columns = None, ROW
    taught = 0 if teacher is None else sum(map(teacher.has_own_prompt, rows))
    if taught:
        prompts, columns = teacher.prompts(), TAUGHT
        settings.append(teacher.settings(rows))
    key = fingerprint(contents, tokenizer, *settings)

    def write(path: pathlib.Path) -> dict:
        bad, long = {}, {}
        schema = columns.arrow_schema
        with pyarrow.ipc.new_stream(str(path), schema) as writer:
            for start in range(0, len(rows), ROWS_AT_ONCE):
                some = dict(enumerate(rows[start : start + ROWS_AT_ONCE], start))
                encoded = dict(zip(some, encoder.encode([*some.values()]), strict=True))
                kept = _cut(encoded, max_length, max_prompt_length, bad, long)
                values = [sample[: len(ROW)] for sample in kept]
                if prompts is not None:
                    values = _with_views(kept, prompts.views(some, kept), bad)
                arrays = [
                    pyarrow.array([value[place] for value in values], kind) for place, kind in enumerate(schema.types)
                ]
                writer.write_batch(pyarrow.record_batch(arrays, schema=schema))
        return {"bad": bad, "long": long}

    dataset, left_out = stored(key, write)
    bad, long = ({int(row): reason for row, reason in left_out[kind].items()} for kind in ("bad", "long"))
    if bad and (on_bad_row == "stop" or len(bad) == len(rows)):
        first = min(bad)
        raise ConfigError(f"{rows[first].where}: {bad[first]}")
    if not len(dataset):
        reason = f"the prompts exceed {max_prompt_length} tokens, so no row is left; raise data.max_prompt_length"
        raise ConfigError(f"{rows[0].where} and all others: {reason}")
    return Tokenized(dataset, bad, long, taught, encoder.describe(rows))


def encode_prompts(
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    style: PromptFormat = PromptFormat(),  # noqa: B008 - it is frozen
) -> list[list[int]]:
    """The tokens before the last answer of each row, as in `tokenize`.

    Raises ConfigError for an empty prompt, foreign token ids, and messages that the chat template can't render.
    """
    return Encoder(tokenizer, style).encode_prompts(rows)


def references(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts that a response is compared with: all outputs of a row.

    Raises ConfigError for a row of JSON that has none, or one that is not text.
    """
    if row.outputs is None and "output_ids" in row.values:
        return [tokenizer.decode(row.values["output_ids"], skip_special_tokens=True)]
    if "messages" in row.values and row.outputs in (None, ""):
        raise ConfigError(f"{row.where}: {NO_REFERENCE}")
    outputs = row.outputs if isinstance(row.outputs, list) else [row.outputs]
    if not outputs or not all(isinstance(text, str) for text in outputs):
        got = show(row.outputs)
        raise ConfigError(f'{row.where}: "output" must be a text or a list of texts to compare with, got {got}')
    return outputs


def _cut(
    samples: dict[int, list[Sample] | ConfigError],
    max_length: int,
    max_prompt_length: int | None,
    bad: dict[int, str],
    long: dict[int, str],
) -> list[CutSample]:
    """The samples of some rows, cut. Rows that don't give all of theirs go to `bad` and `long`."""
    kept = []
    for row, own in samples.items():
        if isinstance(own, ConfigError):
            bad[row] = str(own)
            continue
        first = 0
        for number, sample in enumerate(own):
            start, length = sample.spans[0], len(sample.input_ids)
            if max_prompt_length is not None and start > max_prompt_length:
                long[row] = f"the prompt has {start} tokens, more than data.max_prompt_length = {max_prompt_length}"
            elif start < max_length:
                spans = [min(place, max_length) for place in _pairs_below(sample.spans, max_length)]
                is_cut = spans[-1] < sample.spans[len(spans) - 1]
                kept.append(CutSample(sample.input_ids[:max_length], spans, row, length, first, is_cut))
            elif number:
                long[row] = f"the prompt of a later answer has {start} tokens and fills all {max_length}"
            else:
                reason = f"the prompt has {start} tokens and fills all {max_length}: nothing to learn"
                bad[row] = f"{reason}; raise data.max_length, or lower data.max_prompt_length"
            first += len(sample.spans) // 2
    return kept


def _with_views(kept: list[CutSample], views: list[Sample | ConfigError], bad: dict[int, str]) -> list[tuple]:
    """The values of TAUGHT. A row that the teacher can't read goes to `bad`, and gives no sample."""
    bad |= {sample.row: str(view) for sample, view in zip(kept, views, strict=True) if isinstance(view, ConfigError)}
    pairs = zip(kept, views, strict=True)
    return [(*sample[: len(ROW)], *view) for sample, view in pairs if sample.row not in bad]


def _pairs_below(spans: list[int], limit: int) -> Iterator[int]:
    """The spans that start before a position."""
    pairs = zip(spans[::2], spans[1::2], strict=True)
    return itertools.chain.from_iterable(pair for pair in pairs if pair[0] < limit)
