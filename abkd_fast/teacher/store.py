"""A teacher's hidden states on disk: where the rows are, what they depend on, and whether they are whole.

A cache is a folder named by a fingerprint of all that its rows depend on. It holds `states.bin`, the rows, raw;
`head.safetensors`, the output projection that reads them; `index.json`, a checksum of every block; and `lock`.
A block counts when its bytes match its checksum, so an interrupted build and a damaged file are one case: the blocks
that don't match are computed again. Nothing depends on the order in which a dying machine wrote its pages.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import datasets
import filelock
import numpy as np
import pyarrow.compute
import safetensors.torch
import torch
from torch import Tensor

from ..console import console
from ..files import atomic_write, remove_leftovers
from ..models.identity import tensor_bytes

FORMAT = 1
BLOCK_TOKENS = 8192  # prompt and response: enough to fill a GPU, and the most that an interruption loses
DISK_MARGIN = 1 << 30  # bytes that a cache leaves free on its disk


def table_of(dataset: datasets.Dataset, of_teacher: bool = False) -> tuple[pyarrow.ListArray, pyarrow.ListArray]:
    """The columns input_ids and spans of a tokenized data set, or with of_teacher what the teacher reads of it."""
    table, prefix = dataset.with_format("arrow")[:], ""
    if of_teacher and "teacher_input_ids" in table.column_names:
        prefix = "teacher_"
    return tuple(table.column(prefix + name).combine_chunks() for name in ("input_ids", "spans"))


def lengths_of(lists: pyarrow.ListArray) -> np.ndarray:
    return pyarrow.compute.list_value_length(lists).to_numpy(zero_copy_only=False)


def label_counts(spans: pyarrow.ListArray) -> np.ndarray:
    """The number of trained tokens of every sample."""
    bounds = pyarrow.compute.list_flatten(spans).to_numpy(zero_copy_only=False).astype(np.int64)
    before = np.concatenate([[0], np.cumsum(bounds[1::2] - bounds[::2])])  # trained tokens before each span
    ends = np.cumsum(lengths_of(spans) // 2)
    return np.diff(before[ends], prepend=0)


class Layout:
    """The place of every sample's rows. Samples go from long to short, so packs are even and the largest is first.

    rows: the trained tokens of all samples. blocks: sample indices, at most BLOCK_TOKENS tokens (or one sample) each.
    """

    def __init__(self, dataset: datasets.Dataset) -> None:
        ids, spans = table_of(dataset, of_teacher=True)
        lengths, counts = lengths_of(ids), label_counts(spans)
        order = np.argsort(-lengths, kind="stable")
        self.ends = np.empty(len(order), dtype=np.int64)
        self.ends[order] = np.cumsum(counts[order])
        self.starts = self.ends - counts
        self.rows = int(counts.sum())
        self.blocks: list[list[int]] = []
        used = BLOCK_TOKENS
        for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
            if used + length > BLOCK_TOKENS:
                self.blocks.append([])
                used = 0
            self.blocks[-1].append(index)
            used += length

    def sample(self, index: int) -> slice:
        return slice(int(self.starts[index]), int(self.ends[index]))

    def block(self, number: int) -> slice:
        samples = self.blocks[number]
        return slice(int(self.starts[samples[0]]), int(self.ends[samples[-1]]))


def hash_samples(dataset: datasets.Dataset) -> str:
    """A hash of the teacher's token ids and spans. Tokenizer, template, rows and max_length act through these alone."""
    digest = hashlib.sha256()
    for lists in table_of(dataset, of_teacher=True):
        for values in (pyarrow.compute.list_flatten(lists).to_numpy(zero_copy_only=False), lengths_of(lists)):
            digest.update(values.astype("<i8").tobytes())
    return digest.hexdigest()


class HiddenStateStore:
    """Rows [layout.rows, width] of one teacher. The folder is named by a hash of `identity`."""

    def __init__(self, root: pathlib.Path, identity: dict, layout: Layout, width: int, dtype: torch.dtype) -> None:
        self.identity, self.layout, self.width, self.dtype = {"format": FORMAT, **identity}, layout, width, dtype
        self.key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:32]
        self.folder = root / self.key
        self.row_bytes = width * dtype.itemsize
        self.bytes = layout.rows * self.row_bytes
        self.path = self.folder / "states.bin"
        self.read_index()

    @property
    def is_recorded(self) -> bool:
        """Whether a build has finished here; its files may be damaged since."""
        return self.head is not None and None not in self.checksums

    def read_index(self) -> bool:
        """Reads the checksums of blocks and head (None where there is none), and the seconds of their computation.

        False where an index is there, but damaged.
        """
        self.checksums: list[int | None] = [None] * len(self.layout.blocks)
        self.head: int | None = None
        self.seconds = 0.0
        try:
            index = json.loads((self.folder / "index.json").read_text(encoding="utf-8"))
            checksums, head, seconds = index["blocks"], index["head"], index["seconds"]
            good = index["identity"] == self.identity and len(checksums) == len(self.checksums)
            if not good or not isinstance(seconds, float):
                raise ValueError
        except OSError:
            return True
        except (ValueError, TypeError, KeyError):
            return False
        self.checksums, self.head, self.seconds = checksums, head, seconds
        return True

    def _write_index(self) -> None:
        values = {"identity": self.identity, "seconds": self.seconds, "head": self.head, "blocks": self.checksums}
        atomic_write(self.folder / "index.json", json.dumps(values), flush=False)

    def problem(self) -> str | None:
        """Why rows can't be written here; None where they can."""
        parent = next(parent for parent in (self.folder, *self.folder.absolute().parents) if parent.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            return f"{parent} is not a folder that can be written to"
        there = self.path.stat().st_blocks * 512 if self.path.exists() else 0
        needed, free = self.bytes - there + DISK_MARGIN, shutil.disk_usage(parent).free
        if needed > free:
            return f"{parent} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed"
        return None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lets one process at a time look for missing blocks and compute them. The lock dies with its holder.

        The index is read again: another process may have finished meanwhile.
        """
        lock = filelock.FileLock(self.folder / "lock")
        with contextlib.suppress(OSError):  # a read-only folder has no writers
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                console.print(f"teacher cache: another process is building {self.folder}: waiting for it")
                lock.acquire()
            remove_leftovers(self.folder)
        try:
            if not self.read_index():
                console.print(f"teacher cache: {self.folder / 'index.json'} is damaged: all is computed again")
            yield
        finally:
            lock.release()

    def missing(self) -> list[int]:
        """The blocks that have no checksum or don't match it. Reads the whole file, at about 4 GB/s."""
        missing, damaged = [], 0
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(self.path.open("rb")) if self.path.exists() else None
            for number, checksum in enumerate(self.checksums):
                if checksum is None or self._checksum(file, number) != checksum:
                    missing.append(number)
                    damaged += checksum is not None
        if damaged:
            blocks = f"{damaged} of {len(self.checksums)} blocks of {self.path}"
            console.print(f"teacher cache: {blocks} are damaged: computed again")
        return missing

    def _checksum(self, file: BinaryIO | None, number: int) -> int | None:
        if file is None:
            return None
        rows = self.layout.block(number)
        file.seek(rows.start * self.row_bytes)
        content = file.read(size := (rows.stop - rows.start) * self.row_bytes)
        return zlib.crc32(content) if len(content) == size else None

    def reserve(self) -> None:
        """Allocates all rows, so a full disk shows before anything is computed. Raises OSError."""
        with self.path.open("ab") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, self.bytes)
            file.truncate(self.bytes)

    def write(self, number: int, rows: Tensor) -> int:
        """Writes one block's rows and returns their checksum. Raises OSError."""
        content = tensor_bytes(rows)
        with self.path.open("r+b") as file:
            file.seek(self.layout.block(number).start * self.row_bytes)
            file.write(content)
        return zlib.crc32(content)

    def record(self, blocks: list[tuple[int, int, float]]) -> None:
        """Records written blocks: number, checksum and seconds of each. Raises OSError."""
        for number, checksum, seconds in blocks:
            self.checksums[number] = checksum
            self.seconds += seconds
        self._write_index()

    def read(self) -> Tensor:
        """All rows [layout.rows, width], mapped: only the used ones are read."""
        size = self.layout.rows * self.width
        return torch.from_file(str(self.path), shared=False, size=size, dtype=self.dtype).view(-1, self.width)

    def write_head(self, weight: Tensor, bias: Tensor | None) -> None:
        """Writes the output projection [V, width] and its bias [V]. Raises OSError."""
        tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        content = safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
        atomic_write(self.folder / "head.safetensors", content, flush=False)
        self.head = zlib.crc32(content)
        self._write_index()

    def read_head(self) -> tuple[Tensor, Tensor | None] | None:
        """The output projection that `write_head` wrote; None where it is missing or damaged."""
        path = self.folder / "head.safetensors"
        content = path.read_bytes() if path.exists() else b""
        if self.head is None or zlib.crc32(content) != self.head:
            return None
        tensors = safetensors.torch.load(content)
        bias = tensors.get("bias")
        # Copied, because a file's tensors begin anywhere and a library may choose its kernel by alignment.
        return tensors["weight"].clone(), None if bias is None else bias.clone()
