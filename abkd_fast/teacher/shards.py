"""Rows of hidden states in safetensors files: where their bytes are, how they are mapped, and rows in float8."""

import bisect
import itertools
import json
import os
import pathlib
import stat
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..models.identity import tensor_bytes

SHARD_BYTES = 4 * 10**9  # of a file, about: what every file system and every copy can do
ALIGNMENT = 64  # bytes; the data of a file begin at a multiple
FLOAT8 = torch.float8_e4m3fn
LARGEST_FLOAT8 = torch.finfo(FLOAT8).max
TYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", FLOAT8: "F8_E4M3"}  # names of the format


def dtype_name(dtype: torch.dtype) -> str:
    return "float8" if dtype == FLOAT8 else str(dtype).removeprefix("torch.")


class Part(NamedTuple):
    """Rows of one file. In float8 each row has a scale: its numbers are values times scale."""

    values: Tensor  # [n, H]
    scales: Tensor | None  # [n, 1], float32

    @classmethod
    def of(cls, rows: Tensor, dtype: torch.dtype) -> "Part":
        """Rows [n, H] in `dtype`. In float8 a row's largest number becomes the largest that float8 has."""
        if dtype != FLOAT8:
            return cls(rows.to(dtype), None)
        rows = rows.float()
        largest = rows.abs().amax(1, keepdim=True)
        smallest = torch.finfo(torch.float32).tiny  # below it a scale could become 0
        scales = torch.where(largest > 0, (largest / LARGEST_FLOAT8).clamp(min=smallest), 1.0)
        return cls((rows / scales).to(FLOAT8), scales)

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The rows [n, H] in `dtype`."""
        values = self.values if self.scales is None else self.values.float() * self.scales
        return values.to(dtype)


class Rows:
    """Rows [R, H], read in `dtype`: parts in memory, or mapped from the disk. No sample lies in two parts."""

    def __init__(self, parts: list[Part], dtype: torch.dtype) -> None:
        self.parts, self.dtype = parts, dtype
        self.starts = [0, *itertools.accumulate(len(part.values) for part in parts)]

    @property
    def device(self) -> torch.device:
        return self.parts[0].values.device

    @property
    def width(self) -> int:
        return self.parts[0].values.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for part in self.parts for tensor in part if tensor is not None)

    def __getitem__(self, rows: slice) -> Tensor:
        """The rows of one sample, or of any others in one part."""
        place = bisect.bisect_right(self.starts, rows.start) - 1
        start, stop = rows.start - self.starts[place], rows.stop - self.starts[place]
        return Part(*(None if each is None else each[start:stop] for each in self.parts[place])).decode(self.dtype)

    def to(self, device: torch.device) -> "Rows":
        """A copy in the memory of a device."""
        parts = [Part(*(None if each is None else each.to(device, copy=True) for each in part)) for part in self.parts]
        return Rows(parts, self.dtype)


def split_blocks(counts: Sequence[int], bytes_of_row: int) -> list[list[int]]:
    """Distributes blocks, given by their numbers of rows, over files: about SHARD_BYTES in each, one block at least."""
    shards, room = [], 0
    for count in counts:
        if not shards or room < count * bytes_of_row:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(count)
        room -= count * bytes_of_row
    return shards


def row_bytes(width: int, dtype: torch.dtype) -> int:
    return width * dtype.itemsize + (4 if dtype == FLOAT8 else 0)


class Shards:
    """The files of rows [R, width]. A file is a header, which the other numbers decide, then a tensor or two.

    A block of rows lies in one file.
    """

    def __init__(self, folder: pathlib.Path, shards: list[list[int]], width: int, dtype: torch.dtype) -> None:
        """shards: the number of rows of each block, by file."""
        self.width, self.dtype = width, dtype
        self.paths = [folder / f"states-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
        self.rows = [sum(counts) for counts in shards]
        self.headers = [self._header(rows) for rows in self.rows]
        self.sizes = [
            len(header) + rows * row_bytes(width, dtype) for header, rows in zip(self.headers, self.rows, strict=True)
        ]
        # of every block: its file, its first row there, and its number of rows
        self.blocks = [
            (file, stop - count, count)
            for file, counts in enumerate(shards)
            for count, stop in zip(counts, itertools.accumulate(counts), strict=True)
        ]

    def _header(self, rows: int) -> bytes:
        end, tensors = 0, {}
        shapes = {"scales": ("F32", [rows, 1], 4 * rows)} if self.dtype == FLOAT8 else {}
        shapes["hidden_states"] = TYPES[self.dtype], [rows, self.width], rows * self.width * self.dtype.itemsize
        for name, (kind, shape, size) in shapes.items():
            tensors[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(tensors, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        return struct.pack("<Q", len(text)) + text

    def _pieces(self, number: int) -> list[tuple[int, int]]:
        """Where the bytes of a block are in its file: offsets and sizes, scales first."""
        file, first, count = self.blocks[number]
        start, size = len(self.headers[file]), self.width * self.dtype.itemsize
        if self.dtype != FLOAT8:
            return [(start + first * size, count * size)]
        return [(start + 4 * first, 4 * count), (start + 4 * self.rows[file] + first * size, count * size)]

    def problem(self) -> str | None:
        """What is wrong with the files' sizes and headers; None if nothing is. Only sound files can be mapped."""
        for path, size, header in zip(self.paths, self.sizes, self.headers, strict=True):
            try:
                if not stat.S_ISREG(path.stat().st_mode):
                    return f"{path.name} is no regular file"
                with path.open("rb") as file:
                    there = os.fstat(file.fileno()).st_size
                    if there != size:
                        return f"{path.name} has {there} bytes, expected {size}"
                    if file.read(len(header)) != header:
                        return f"{path.name} has another header than its index says"
            except OSError as error:
                return f"{path.name} can't be read ({error.strerror})"
        return None

    def checksum(self, number: int) -> int | None:
        """The CRC-32 of a block's bytes; None where they are not there. Raises OSError."""
        path, checksum = self.paths[self.blocks[number][0]], 0
        if not path.is_file():
            return None
        with path.open("rb") as file:
            for offset, size in self._pieces(number):
                file.seek(offset)
                content = file.read(size)
                if len(content) != size:
                    return None
                checksum = zlib.crc32(content, checksum)
        return checksum

    def reserve(self) -> None:
        """Allocates all files, so a full disk shows before anything is computed, and writes headers. Raises OSError."""
        for path, size, header in zip(self.paths, self.sizes, self.headers, strict=True):
            path.touch(0o644)
            with path.open("r+b") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                file.truncate(size)
                file.write(header)

    def write(self, number: int, rows: Tensor) -> int:
        """Writes a block's rows and returns their checksum. Raises OSError."""
        values, scales = Part.of(rows, self.dtype)
        checksum = 0
        with self.paths[self.blocks[number][0]].open("r+b") as file:
            tensors = [values] if scales is None else [scales, values]
            for (offset, _), tensor in zip(self._pieces(number), tensors, strict=True):
                content = tensor_bytes(tensor)
                file.seek(offset)
                file.write(content)
                checksum = zlib.crc32(content, checksum)
        return checksum

    def map(self) -> list[Part]:
        """All rows, mapped: only the used ones are read. `problem` has to be None."""
        return [self._map(file) for file in range(len(self.paths))]

    def _map(self, file: int) -> Part:
        start, rows = len(self.headers[file]), self.rows[file]
        mapped = np.memmap(self.paths[file], np.uint8, "c", start, (self.sizes[file] - start,))
        content, scales = torch.from_numpy(mapped), None
        if self.dtype == FLOAT8:
            scales, content = content[: 4 * rows].view(torch.float32).view(rows, 1), content[4 * rows :]
        return Part(content.view(self.dtype).view(rows, self.width), scales)
