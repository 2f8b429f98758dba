"""A served teacher: its likeliest tokens for every trained token, from a file that an inference server has filled.

docs/served-teachers.md describes the file. It is checked against the tokenized samples once, and kept beside them in
the cache of `datasets`: a run maps it, and parses no JSON again.
"""

import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow
import torch
from torch import Tensor

from ..console import ProgressBar
from ..data import text_files
from ..data.batches import prompt_of, teacher_view
from ..data.strict_json import show
from ..data.token_store import stored
from ..errors import ConfigError
from ..files import file_digest
from ..losses.top_k import TOLERANCE
from .store import hash_samples

FORMAT = 1  # of the stored file
SAMPLES_AT_ONCE = 64
COLUMNS = datasets.Features(
    {
        "counts": datasets.List(datasets.Value("int32")),  # tokens known for each trained token
        "ids": datasets.List(datasets.Value("int32")),  # these, one trained token after the other
        "log_probs": datasets.List(datasets.Value("float32")),
        "rest": datasets.Value("float64"),  # the probability of all other tokens, summed over the trained tokens
    }
)
LARGEST = float(np.finfo(np.float32).max)  # of a log-probability: what is kept has this type
WAY_OUT = "tokenizer, chat template, rows or their order differ from those that the teacher has read"
LEAVE_OUT = "leave that token out, and it counts among the others"
OF_RESPONSE = '"top_ids" and "top_log_probs" of the response alone'


class TopTokens(NamedTuple):
    """The columns of a sample."""

    counts: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray
    rest: float


class TopKTargets:
    """The teacher's likeliest tokens for the samples of a data set."""

    def __init__(
        self, path: str, dataset: datasets.Dataset, where: list[str], vocab: int, numbers: Sequence[int] | None = None
    ) -> None:
        """Reads the file, or what an earlier run has made of it.

        Args:
            dataset: the tokenized samples, in the order of their rows.
            where: the place of every row, for messages.
            vocab: the student's vocabulary entries.
            numbers: the number of every row in its source, and so of its line in the file; None if no row is left out.

        Raises ConfigError for a file that doesn't fit the samples.
        """
        check_file(path)
        file, columns = pathlib.Path(path), dataset.with_format("numpy")
        is_train_file = file.resolve() == pathlib.Path(where[0].rsplit(" ", 2)[0]).resolve()
        numbers = range(len(where)) if numbers is None else numbers
        lines, lengths = [numbers[row] for row in columns["row"][:]], columns["row_length"][:].tolist()
        identity = [FORMAT, file_digest(file), hash_samples(dataset), vocab, is_train_file, lines, lengths]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]

        def write(target: pathlib.Path) -> None:
            read = _read(file, dataset, where, lines, is_train_file, vocab)
            with (
                pyarrow.ipc.new_stream(str(target), COLUMNS.arrow_schema) as writer,
                ProgressBar(f"blocks of {SAMPLES_AT_ONCE} samples") as bar,
            ):
                for _ in bar.track(range(0, len(dataset), SAMPLES_AT_ONCE)):
                    some = zip(*itertools.islice(read, SAMPLES_AT_ONCE), strict=True)
                    columns = zip(some, COLUMNS.arrow_schema.types, strict=True)
                    arrays = [pyarrow.array(values, kind) for values, kind in columns]
                    writer.write_batch(pyarrow.record_batch(arrays, schema=COLUMNS.arrow_schema))

        try:
            samples, _ = stored(key, write, f"checking {path} against the samples")
        except ConfigError as error:
            raise ConfigError(f"teacher.top_k: {error}", "teacher.top_k") from None
        self.samples = samples.with_format("numpy")
        counts = self.samples.data.column("counts").combine_chunks().flatten().to_numpy()
        least, most = counts.min(), counts.max()
        known = f"{most}" if least == most else f"{least} to {most}"
        rest = self.samples["rest"][:].sum() / len(counts)
        self.note = (
            f"{known} tokens known for each trained token, from {path}; the loss is truncated: all others count as one "
            f"({rest:.2%} of the teacher's probability on average)"
        )

    def of(self, samples: list[dict]) -> tuple[Tensor, Tensor]:
        """Token ids [N, k], padded with -1, and log-probabilities [N, k] for the labels of these samples."""
        parts = [self.samples[sample["index"]] for sample in samples]
        counts, ids, log_probs = (np.concatenate([part[name] for part in parts]) for name in TopTokens._fields[:3])
        is_known = np.arange(counts.max()) < counts[:, None]
        padded = torch.full(is_known.shape, -1), torch.full(is_known.shape, -torch.inf)
        for tensor, values in zip(padded, (ids, log_probs), strict=True):
            tensor.numpy()[is_known] = values
        return padded


def check_file(path: str) -> None:
    """Raises ConfigError for a file that can't be read, or is no text."""
    try:
        with text_files.open_text(pathlib.Path(path)):
            pass
    except ConfigError as error:
        raise ConfigError(f"teacher.top_k: {error}", "teacher.top_k") from None


def _read(
    path: pathlib.Path, dataset: datasets.Dataset, where: list[str], lines: list[int], is_train_file: bool, vocab: int
) -> Iterator[TopTokens]:
    """The tokens for each sample, in order. lines: the numbers of the samples' lines. Raises ConfigError."""
    rows = dataset.with_format("numpy")["row"][:]
    if (twice := np.flatnonzero(np.diff(rows) == 0)).size:
        problem = "gives several samples, and a line of the file is for one"
        raise ConfigError(f"{where[rows[twice[0]]]}: {problem}; use data.train_on=last, or rows of prompt_ids")
    samples = zip(lines, rows.tolist(), dataset.with_format("numpy"), strict=True)
    line, row, sample = next(samples)
    for number, (place, values) in enumerate(text_files.read_json(path)):
        if number != line:
            continue
        if isinstance(values, ConfigError):
            raise values
        try:
            yield _tokens_of(values, sample, is_train_file, where[row], vocab)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
        line, row, sample = next(samples, (None, None, None))
        if line is None:
            return
    raise ConfigError(f"{path}: has no line for {where[row]}, and needs one for every row of data.train")


def _tokens_of(values: object, sample: dict, is_train_file: bool, where: str, vocab: int) -> TopTokens:
    """The tokens of one line, cut as its sample is. Raises ConfigError with the reason."""
    if not isinstance(values, dict) or "output_ids" not in values:
        raise ConfigError(f'expected an object with "output_ids", got {show(values)}')
    read = teacher_view(sample)
    spans = read["spans"].reshape(-1, 2)
    labels = np.concatenate([read["input_ids"][start:stop] for start, stop in spans])
    was_cut = sample["row_length"] > len(sample["input_ids"])
    _compare("output_ids", values["output_ids"], labels, where, was_cut)
    if values.get("prompt_ids") is not None and len(spans) == 1:
        # Rows of data.train have the student's prompt.
        _compare("prompt_ids", values["prompt_ids"], prompt_of(sample if is_train_file else read), where)
    is_servers = "prompt_logprobs" in values
    ids, log_probs = _server_lists(values, read, was_cut, where) if is_servers else _plain_lists(values)
    counts = np.array([*map(len, ids)][: len(labels)])
    ids, log_probs = ([*itertools.chain(*lists[: len(labels)])] for lists in (ids, log_probs))
    return _check(counts, _array("ids", ids, np.int64), _array("log-probabilities", log_probs, np.float64), vocab)


def _compare(key: str, ids: object, expected: np.ndarray, where: str, was_cut: bool = False) -> None:
    """Raises ConfigError unless the ids of a line are the expected ones, or begin with them if the sample was cut."""
    if not isinstance(ids, list) or not {*map(type, ids)} <= {int}:
        raise ConfigError(f'"{key}" must be a list of whole numbers, got {show(ids)}')
    if len(ids) != len(expected) and not (was_cut and len(ids) > len(expected)):
        raise ConfigError(f'"{key}" has {len(ids)} tokens, but {where} has {len(expected)}: {WAY_OUT}')
    pairs = zip(ids, expected.tolist(), strict=False)
    if found := next((f"token {n} is {show(a)}, but {b}" for n, (a, b) in enumerate(pairs) if a != b), None):
        raise ConfigError(f'"{key}": {found} in {where}: {WAY_OUT}')


def _plain_lists(values: dict) -> tuple[list[list], list[list]]:
    """The lists of "top_ids" and "top_log_probs", one for each token of the response."""
    lists = [values.get(key) for key in ("top_ids", "top_log_probs")]
    if any(not isinstance(one, list) or not {*map(type, one)} <= {list} for one in lists):
        raise ConfigError('expected "top_ids" and "top_log_probs", lists of lists, or "prompt_logprobs"')
    counts, others = ([*map(len, one)] for one in lists)
    if counts != others or len(counts) != len(values["output_ids"]):
        raise ConfigError('"top_ids" and "top_log_probs" must have a list for each of output_ids, of equal lengths')
    return lists[0], lists[1]


def _server_lists(values: dict, read: dict, was_cut: bool, where: str) -> tuple[list[list], list[list]]:
    """The same for the trained tokens from "prompt_logprobs". read: the sample as the teacher reads it."""
    found, spans = values["prompt_logprobs"], read["spans"].reshape(-1, 2)
    places = np.concatenate([np.arange(*span) for span in spans])
    length = len(read["input_ids"]) + len(values["output_ids"]) - len(places)
    if not isinstance(found, list) or not found:
        problem = "must be a list of prompt and response: an entry for each token that the teacher reads"
        raise ConfigError(f'"prompt_logprobs" {problem}, got {show(found)}')
    if len(found) < length or (len(found) > length and not was_cut):  # the cut may have taken more than responses
        problem = f'"prompt_logprobs" has {len(found)} entries, but the teacher reads {length} tokens in {where}'
        ways = f"give one for each of these, or {OF_RESPONSE}"
        raise ConfigError(f"{problem}: {ways}" + (", or set data.train_on=last" if len(spans) > 1 else ""))
    ids, log_probs = [], []
    for place, label in zip(places.tolist(), read["input_ids"][places].tolist(), strict=True):
        entry = found[place]
        try:
            keys = "".join(entry)
            if not keys.isdecimal() or not keys.isascii():
                raise ValueError
            ids.append([*map(int, entry)])
            log_probs.append([one["logprob"] for one in entry.values()])
        except (TypeError, ValueError, KeyError, AttributeError):
            problem = f'expected {{"token id": {{"logprob": number}}}}, got {show(entry)}'
            raise ConfigError(f'"prompt_logprobs", entry {place}: {problem}') from None
        if str(label) not in entry:
            problem = f'"prompt_logprobs", entry {place}: has no token {label}, which is there in {where}'
            raise ConfigError(f"{problem}: {WAY_OUT}; if the server leaves it out, give {OF_RESPONSE}")
    return ids, log_probs


def _array(what: str, values: list, kind: type) -> np.ndarray:
    """Numbers as an array. One that is too large for the type stays what it is, in an array of objects."""
    kinds, expected = ({int}, "whole numbers") if kind is np.int64 else ({int, float}, "numbers")
    if not {*map(type, values)} <= kinds:
        wrong = show(next(value for value in values if type(value) not in kinds))
        raise ConfigError(f"the {what} must be {expected}, got {wrong}; {LEAVE_OUT}")
    try:
        return np.array(values, dtype=kind)
    except OverflowError:
        return np.array(values, dtype=object)


def _check(counts: np.ndarray, ids: np.ndarray, log_probs: np.ndarray, vocab: int) -> TopTokens:
    """Raises ConfigError for ids or log-probabilities that no distribution has."""

    def fail(place: int, problem: str) -> None:
        raise ConfigError(f"token {place} of the response {problem}")

    if (counts == 0).any():
        fail(counts.argmin(), "has no tokens of the teacher's; each needs one at least")
    token = np.repeat(np.arange(len(counts)), counts)
    if (wrong := (ids < 0) | (ids >= vocab)).any():
        place = wrong.argmax()
        fail(token[place], f"has id {str(ids[place])[:60]}, but the student has {vocab} tokens; {LEAVE_OUT}")
    if (wrong := ~(np.abs(log_probs) <= LARGEST)).any():
        found = str(log_probs[wrong.argmax()])[:60]
        fail(token[wrong.argmax()], f"has the log-probability {found}, expected a finite number; {LEAVE_OUT}")
    mass = np.bincount(token, np.exp(np.minimum(log_probs, 1.0)), len(counts))
    if mass.max() > 1 + TOLERANCE:
        sums = f"has probabilities that sum to {mass.max():.4g}"
        fail(mass.argmax(), f"{sums}, expected at most 1: are these log-probabilities over the whole vocabulary?")
    keys, first = np.unique(token * vocab + ids, return_index=True)
    if len(keys) < len(ids):
        again = np.setdiff1d(np.arange(len(ids)), first)[0]
        fail(token[again], f"has id {ids[again]} twice; give each token once")
    rest = np.maximum(0.0, 1.0 - mass).sum()
    return TopTokens(counts.astype(np.int32), ids.astype(np.int32), log_probs.astype(np.float32), float(rest))
