"""A folder of hidden states from anywhere. Nothing in it is believed before it is checked, and nothing is executed."""

import contextlib
import errno
import json
import pathlib
import stat
from collections.abc import Callable, Iterator

import datasets
import numpy as np
import safetensors.numpy
import torch
from safetensors import safe_open
from torch import Tensor

from ..console import format_bytes
from ..errors import JSON_ERRORS, ConfigError, printable, reading
from ..files import disk_bytes, file_checksum
from ..losses.arguments import LogitMap
from . import shards
from .origin import differences
from .shards import Shards
from .store import FORMAT, HASH_BYTES, Places, fingerprint, hash_each, label_counts, read_head, table_of

FILES = ("head.safetensors", "config.json", "samples.safetensors", "vocabulary.json")
DTYPES = {shards.dtype_name(dtype): dtype for dtype in shards.TYPES}
JSON_BYTES = 1 << 26  # no index and no vocabulary is larger
WAYS_OUT = "copy it again, or build it again: python -m abkd_fast.cache"


class StoredVocabulary(dict):
    """A teacher's tokens and their ids, in place of its tokenizer."""

    def get_vocab(self) -> dict[str, int]:
        return self


class StatesFolder:
    """The index of a folder, checked against the files' names, sizes and headers. `verify` reads their contents."""

    is_recorded = True  # for the questions that are asked of a `HiddenStateStore`, too

    def __init__(self, path: str, key: str) -> None:
        """key: what names the folder in a ConfigError, which is raised for one that can't be used."""
        self.folder, self.key = pathlib.Path(path), key
        try:
            index = read_json(self.folder / "index.json")
        except OSError as error:
            hint = "expected a folder that python -m abkd_fast.cache has built"
            raise ConfigError(f"{key}: {path} has no index.json ({error.strerror}); {hint}") from None
        except JSON_ERRORS:
            raise self.error("index.json is damaged") from None
        with self._reading("index.json makes no sense"):
            self._read(index)

    def error(self, problem: str, way_out: str = WAYS_OUT) -> ConfigError:
        return ConfigError(f"{self.key}: {self.folder}: {problem}; {way_out}")

    def _reading(self, problem: str) -> contextlib.AbstractContextManager[None]:
        return reading(f"{self.key}: {self.folder}: {problem}", f"; {WAYS_OUT}")

    def _read(self, index: dict) -> None:
        """Takes the values of the index. Raises the errors of values that are missing or of another type."""
        if (form := index["identity"]["format"]) != FORMAT:
            raise self.error(f"has format {json.dumps(form)[:20]}, expected {FORMAT}", "build it again")
        states, blocks = index["states"], [*index["blocks"]]
        self.dtype, width, files = DTYPES[states["dtype"]], states["width"], [[*counts] for counts in states["shards"]]
        if (
            not files
            or not all(files)
            or not all(_is_count(number) for counts in ([width], *files) for number in counts)
        ):
            raise ValueError("sizes that are no numbers of rows")
        if sum(map(len, files)) != len(blocks):
            raise ValueError(f"{len(blocks)} checksums of {sum(map(len, files))} blocks")
        self.shards, self.checksums = Shards(self.folder, files, width, self.dtype), blocks
        self.logit_map = LogitMap(*(float(number) for number in states["logit_map"]))
        if not 0 < self.logit_map.scale < 1e9 or not 0 <= self.logit_map.softcap < 1e9:
            raise ValueError("numbers of a logit map out of range")
        self.files = {name: index["files"][name] for name in FILES if name in index["files"]}
        self.seconds, self.fingerprint = float(index["seconds"]), fingerprint(index["identity"])
        self.teacher, self.settings = printable(str(index["origin"]["teacher"])), index["origin"]["settings"]
        if not isinstance(self.settings, dict) or not _is_flat(self.settings):
            raise ValueError("settings of the data that are no values by name")
        self.rows, self.bytes = sum(self.shards.rows), sum(self.shards.sizes)

    @property
    def blocks_left(self) -> int:
        """How many blocks are not computed yet."""
        return sum(checksum is None for checksum in self.checksums)

    def problem(self) -> str | None:
        """What is wrong with all but the contents of the shards; None if nothing is."""
        if self.blocks_left:
            return f"{self.blocks_left} of {len(self.checksums)} blocks are missing"
        for name in FILES:
            if not self._is_whole(name):
                return f"{name} is missing or damaged"
        return self.shards.problem()

    def _is_whole(self, name: str) -> bool:
        return name in self.files and file_checksum(self.folder / name) == self.files[name]

    def check(self) -> None:
        """Checks all but the contents of the shards. Raises ConfigError."""
        problem = self.problem()
        if self.blocks_left:
            raise self.error(f"is not complete: {problem}", "the command that builds it continues where it ended")
        if problem:
            raise self.error(problem)

    def verify(self, blocks: Iterator[int] | None = None) -> None:
        """Reads everything and compares all checksums. Only `head` can say whether the head fits. Raises ConfigError.

        blocks: the numbers of all blocks, by an iterator that shows progress.
        """
        self.check()
        self._samples(), self.vocabulary()
        try:
            numbers = range(len(self.checksums)) if blocks is None else blocks
            damaged = [number for number in numbers if self.shards.checksum(number) != self.checksums[number]]
        except OSError as error:
            raise self.error(f"can't be read ({error.strerror})") from None
        if damaged:
            name = self.shards.paths[self.shards.blocks[damaged[0]][0]].name
            raise self.error(f"{len(damaged)} of {len(self.checksums)} blocks are damaged, the first in {name}")

    def head(self, shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The output projection [V, H] and its bias [V], in `dtype`. Raises ConfigError for one of another `shape`."""
        with self._reading("head.safetensors can't be read"):
            with safe_open(self.folder / "head.safetensors", "pt") as file:
                shapes = {name: [*file.get_slice(name).get_shape()] for name in file.keys()}  # noqa: SIM118 - no dict
            expected = {"weight": [*shape], "bias": [*shape[:1]]}
            fits = shape[1] == self.shards.width and shapes in (expected, {"weight": [*shape]})
            if not fits:  # nothing of another size is read
                there = f"{shapes.pop('weight', 'missing')}" + (f" with {', '.join(shapes)}"[:80] if shapes else "")
                raise self.error(f"its output projection is {there}, expected {[*shape]} of config.json")
            weight, bias = read_head(self.folder)
        if not weight.is_floating_point():
            raise self.error(f"its output projection is in {shards.dtype_name(weight.dtype)}")
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def vocabulary(self) -> StoredVocabulary:
        """The tokens of the teacher's tokenizer. Raises ConfigError."""
        with self._reading("vocabulary.json can't be read"):
            tokens = read_json(self.folder / "vocabulary.json")
        good = isinstance(tokens, dict) and tokens and all(type(number) is int for number in tokens.values())
        if not good or not 0 <= min(tokens.values()) <= max(tokens.values()) < 2**31:
            raise self.error("vocabulary.json holds no tokens and their ids")
        return StoredVocabulary(tokens)

    def _samples(self) -> tuple[np.ndarray, np.ndarray]:
        """The hash of every sample, and its rows [start, stop]. Raises ConfigError for rows outside of a shard."""
        path, largest = self.folder / "samples.safetensors", (HASH_BYTES + 16) * self.rows + 10_000
        with self._reading("samples.safetensors can't be read"):
            check_file(path, largest)  # a sample has a row
            tensors = safetensors.numpy.load(path.read_bytes())
            hashes, rows = tensors["hashes"], tensors["rows"]
        count, kinds = len(hashes) if hashes.ndim else 0, (hashes.dtype, rows.dtype)
        if hashes.shape != (count, HASH_BYTES) or rows.shape != (count, 2) or kinds != (np.uint8, np.int64):
            raise self.error("samples.safetensors holds no hashes and rows")
        ends = np.cumsum(self.shards.rows)
        start, stop = rows.T
        inside = (start >= 0) & (start < stop) & (stop <= self.rows)
        file = np.searchsorted(ends, np.where(inside, start, 0), side="right")
        if not (inside & (stop <= ends[file])).all():
            raise self.error("samples.safetensors names rows that are not there")
        return hashes, rows

    @property
    def samples(self) -> int:
        return len(self._samples()[0])

    def find(
        self, dataset: datasets.Dataset, where: Callable[[int], str], settings: dict, note: str | None = None
    ) -> Places:
        """The rows of every sample of a data set, found by the sample's content.

        where: the place of a sample in the user's files. settings: what made tokens of the rows. note: what may have
        made other tokens although the settings are the same.

        Raises ConfigError, which says what differs, where a sample is not in the folder.
        """
        hashes, rows = self._samples()
        known = {each.tobytes(): number for number, each in enumerate(hashes)}
        numbers = [known.get(each.tobytes()) for each in hash_each(dataset)]
        missing = [index for index, number in enumerate(numbers) if number is None]
        if missing:
            count = f"{len(missing)} of {len(numbers)} samples are not in it, the first: {where(missing[0])}"
            reason = ", ".join(differences(self.settings, settings))
            reason = reason or note or "tokenizer, template and limits are the same, so the rows differ"
            raise self.error(f"{count}; {reason}", "undo that, or build the states of this data")
        starts, ends = rows[numbers].T
        counts = label_counts(table_of(dataset, of_teacher=True)[1])
        if (wrong := np.flatnonzero(ends - starts != counts)).size:
            index = int(wrong[0])
            problem = f"has {ends[index] - starts[index]} rows for {where(index)}, expected {counts[index]}"
            raise self.error(problem)
        return Places(starts, ends)

    def describe(self) -> Iterator[str]:
        """Lines for people: what it is, and whether it is complete."""
        yield f"teacher      {self.teacher}"
        of = f" of {self.samples} samples" if self._is_whole("samples.safetensors") else ""
        yield f"states       {self.rows} rows{of}, {self.shards.width} numbers each in {shards.dtype_name(self.dtype)}"
        states, taken = format_bytes(self.bytes), format_bytes(disk_bytes(self.folder))
        yield f"bytes        {states} of states in {len(self.shards.paths)} files; {taken} on the disk"
        yield f"fingerprint  {self.fingerprint}"
        yield f"computed in  {self.seconds:.1f} s"
        for name, value in self.settings.items():
            yield f"  {printable(name)}: {json.dumps(value)}"
        problem = self.problem()
        yield f"complete     no: {problem}" if problem else "complete     yes"


def check_file(path: pathlib.Path, largest: int) -> None:
    """Raises OSError for what is no file, as a pipe that never ends, or has more bytes than `largest`."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    if status.st_size > largest:
        raise OSError(errno.EFBIG, f"it has {status.st_size} bytes, expected at most {largest}")


def read_json(path: pathlib.Path) -> object:
    """The value in a file of at most JSON_BYTES. Raises OSError and what json raises."""
    check_file(path, JSON_BYTES)
    return json.loads(path.read_text(encoding="utf-8"))


def _is_flat(value: object, depth: int = 20) -> bool:
    """Whether a JSON value has at most so many levels: deeper ones can be read, but not always written again."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and all(_is_flat(part, depth - 1) for part in parts)


def _is_count(number: object) -> bool:
    return type(number) is int and 0 < number < 2**48
