"""A teacher's hidden states on disk: where the rows are, what they depend on, and whether they are whole.

A cache is a folder named by a fingerprint of all that its rows depend on:

- `states-….safetensors`: the rows (`shards.py`);
- `head.safetensors`: the output projection that reads them, perhaps one file for several caches of a teacher;
- `config.json`, `samples.safetensors`, `vocabulary.json`: what a machine without the teacher needs (`folder.py`);
- `index.json`: checksums of all this; and `lock`.

A block counts when its bytes match its checksum, so an interrupted build and a damaged file are one case: the blocks
that don't match are computed again. Nothing depends on the order in which a dying machine wrote its pages.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import shutil
import zlib

import datasets
import filelock
import numpy as np
import pyarrow.compute
import safetensors.numpy
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from ..console import console
from ..errors import JSON_ERRORS
from ..files import (
    LOCK,
    atomic_file,
    atomic_write,
    check_trusted,
    disk_bytes,
    file_checksum,
    make_cache_folder,
    remove_leftovers,
)
from . import shards
from .origin import Origin
from .shards import Shards

FORMAT = 2
BLOCK_TOKENS = 8192  # prompt and response: enough to fill a GPU, and the most that an interruption loses
DISK_MARGIN = 1 << 30  # bytes that a cache leaves free on its disk
HASH_BYTES = 16  # of one sample
HEAD_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def table_of(dataset: datasets.Dataset, of_teacher: bool = False) -> tuple[pyarrow.ListArray, pyarrow.ListArray]:
    """The columns input_ids and spans of a tokenized data set, or with of_teacher what the teacher reads of it."""
    prefix = "teacher_" if of_teacher and "teacher_input_ids" in dataset.column_names else ""
    names = [f"{prefix}input_ids", f"{prefix}spans"]
    table = dataset.select_columns(names).with_format("arrow")[:]
    return tuple(table.column(name).combine_chunks() for name in names)


def lengths_of(lists: pyarrow.ListArray) -> np.ndarray:
    return pyarrow.compute.list_value_length(lists).to_numpy(zero_copy_only=False)


def label_counts(spans: pyarrow.ListArray) -> np.ndarray:
    """The number of trained tokens of every sample."""
    bounds = pyarrow.compute.list_flatten(spans).to_numpy(zero_copy_only=False).astype(np.int64)
    before = np.concatenate([[0], np.cumsum(bounds[1::2] - bounds[::2])])  # trained tokens before each span
    ends = np.cumsum(lengths_of(spans) // 2)
    return np.diff(before[ends], prepend=0)


class Places:
    """The rows of every sample: from starts[index] up to ends[index]."""

    def __init__(self, starts: np.ndarray, ends: np.ndarray) -> None:
        self.starts, self.ends = starts, ends

    def sample(self, index: int) -> slice:
        return slice(int(self.starts[index]), int(self.ends[index]))

    def among(self, indices: np.ndarray) -> "Places":
        """The same rows for samples that have these indices in a larger data set."""
        starts, ends = np.zeros((2, 1 + int(indices.max())), dtype=np.int64)
        starts[indices], ends[indices] = self.starts, self.ends
        return Places(starts, ends)


class Layout(Places):
    """The place of every sample's rows. Samples go from long to short, so packs are even and the largest is first.

    rows: the trained tokens of all samples. blocks: sample indices, at most BLOCK_TOKENS tokens (or one sample) each.
    """

    def __init__(self, dataset: datasets.Dataset) -> None:
        ids, spans = table_of(dataset, of_teacher=True)
        lengths, counts = lengths_of(ids), label_counts(spans)
        order = np.argsort(-lengths, kind="stable")
        ends = np.empty(len(order), dtype=np.int64)
        ends[order] = np.cumsum(counts[order])
        super().__init__(ends - counts, ends)
        self.rows = int(counts.sum())
        self.blocks: list[list[int]] = []
        used = BLOCK_TOKENS
        for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
            if used + length > BLOCK_TOKENS:
                self.blocks.append([])
                used = 0
            self.blocks[-1].append(index)
            used += length

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


def hash_each(dataset: datasets.Dataset) -> np.ndarray:
    """A hash [samples, HASH_BYTES] of the token ids and spans of each sample as the teacher reads it."""
    columns = []
    for lists in table_of(dataset, of_teacher=True):
        values = pyarrow.compute.list_flatten(lists).to_numpy(zero_copy_only=False).astype("<i8")
        columns.append(np.split(values, np.cumsum(lengths_of(lists))[:-1]))
    hashes = []
    for parts in zip(*columns, strict=True):
        digest = hashlib.blake2b(digest_size=HASH_BYTES)
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part.tobytes())
        hashes.append(digest.digest())
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, HASH_BYTES)


class HiddenStateStore:
    """Rows [layout.rows, width] of one teacher. The folder is named by a hash of `identity`."""

    def __init__(
        self,
        root: pathlib.Path,
        identity: dict,
        dataset: datasets.Dataset,
        layout: Layout,
        width: int,
        dtype: torch.dtype,
        head_bytes: int,
        origin: Origin,
    ) -> None:
        """dtype: of the rows in the files. head_bytes: of the output projection. origin: of a folder that is built."""
        self.identity, self.dataset, self.layout = {"format": FORMAT, **identity}, dataset, layout
        self.head_bytes, self.origin = head_bytes, origin
        self.key = fingerprint(self.identity)
        self.folder = root / self.key
        self._lock = filelock.FileLock(self.folder / LOCK)
        counts = [rows.stop - rows.start for rows in map(layout.block, range(len(layout.blocks)))]
        files = shards.split_blocks(counts, shards.row_bytes(width, dtype))
        self.shards = Shards(self.folder, files, width, dtype)
        self.states = {"dtype": shards.dtype_name(dtype), "width": width, "shards": files}
        self.states["logit_map"] = [*origin.logit_map]
        self.read_index()

    @property
    def is_recorded(self) -> bool:
        """Whether a build has finished here; its files may be damaged since."""
        return "head.safetensors" in self.files and None not in self.checksums

    def read_index(self) -> bool:
        """Reads the checksums of blocks (None where there is none) and files, and the seconds of the computation.

        False where an index is there, but damaged. Raises ConfigError where another user may have written it.
        """
        files = (path for path in self.folder.glob("*") if path.name != LOCK)  # which holds nothing
        check_trusted(self.folder.parent, self.folder, *files)
        self.checksums: list[int | None] = [None] * len(self.layout.blocks)
        self.files: dict[str, int] = {}
        self.seconds, self.told = 0.0, None  # what the index says about its making
        try:
            index = json.loads((self.folder / "index.json").read_text(encoding="utf-8"))
            checksums, files, seconds = index["blocks"], dict(index["files"]), index["seconds"]
            told, good = index["origin"], index["identity"] == self.identity and index["states"] == self.states
            if not good or len(checksums) != len(self.checksums) or not isinstance(seconds, float):
                raise ValueError
        except OSError:
            return True
        except (*JSON_ERRORS, TypeError, KeyError):
            return False
        self.checksums, self.files, self.seconds, self.told = checksums, files, seconds, told
        return True

    def _write_index(self) -> None:
        self.told = self._making()
        values = {
            "identity": self.identity,
            "states": self.states,
            "origin": self.told,
            "seconds": self.seconds,
            "files": self.files,
            "blocks": self.checksums,
        }
        atomic_write(self.folder / "index.json", json.dumps(values), flush=False)

    def _making(self) -> dict:
        return {"teacher": self.origin.teacher, "settings": self.origin.settings}

    @property
    def largest_bytes(self) -> int:
        """What the folder takes of the disk once it is built, at most. The index, of some KB, is not counted."""
        samples = (HASH_BYTES + 16) * len(self.layout.starts)
        return sum(self.shards.sizes) + self.head_bytes + samples + len(self._vocabulary) + len(self.origin.config)

    @property
    def missing_bytes(self) -> int:
        """What the files will take of the disk besides what they have, at most."""
        return max(0, self.largest_bytes - disk_bytes(self.folder))

    def problem(self, claimed: int = 0) -> str | None:
        """Why rows can't be written here; None where they can. claimed: bytes that others will take of the disk."""
        parent = next(parent for parent in (self.folder, *self.folder.absolute().parents) if parent.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            return f"{parent} is not a folder that can be written to"
        needed = self.missing_bytes + claimed + DISK_MARGIN
        free = shutil.disk_usage(parent).free
        if needed > free:
            return f"{parent} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed"
        return None

    def lock(self) -> bool:
        """Lets one process at a time look for missing blocks and compute them. The lock dies with its holder.

        False where another process has it. The index is read again: another process may have finished meanwhile.
        """
        with contextlib.suppress(OSError):  # a read-only folder has no writers
            make_cache_folder(self.folder)
            try:
                self._lock.acquire(timeout=0)
            except filelock.Timeout:
                return False
            remove_leftovers(self.folder)
        if not self.read_index():
            console.print(f"teacher cache: {self.folder / 'index.json'} is damaged: all is computed again")
        return True

    def unlock(self) -> None:
        self._lock.release()

    def missing(self) -> list[int]:
        """The blocks that have no checksum or don't match it. Reads all files, at about 4 GB/s."""
        missing, damaged = [], 0
        for number, checksum in enumerate(self.checksums):
            if checksum is None or self.shards.checksum(number) != checksum:
                missing.append(number)
                damaged += checksum is not None
        if damaged:
            blocks = f"{damaged} of {len(self.checksums)} blocks of {self.folder}"
            console.print(f"teacher cache: {blocks} are damaged: computed again")
        return missing

    def has_head(self) -> bool:
        return self._is_whole("head.safetensors")

    def has_others(self) -> bool:
        """Whether the bytes beside blocks and head are there: the headers of the shards, and what others need."""
        names = "config.json", "samples.safetensors", "vocabulary.json"
        return all(map(self._is_whole, names)) and self.shards.problem() is None

    def update_origin(self) -> None:
        """Says how this run came to the same samples and states, where the folder tells of another making.

        Other settings can give the same tokens, and a teacher's tokenizer may change in place.
        """
        if self.told == self._making() and self.files.get("vocabulary.json") == zlib.crc32(self._vocabulary):
            return
        with contextlib.suppress(OSError):  # a read-only folder: what it says is just older
            self._write_file("vocabulary.json", self._vocabulary)
            self._write_index()

    def _is_whole(self, name: str) -> bool:
        return name in self.files and file_checksum(self.folder / name) == self.files[name]

    def reserve(self) -> None:
        """Allocates all rows, and writes what doesn't have to be computed. Raises OSError."""
        self.shards.reserve()
        samples = {"hashes": hash_each(self.dataset), "rows": np.stack([self.layout.starts, self.layout.ends], axis=1)}
        self._write_file("config.json", self.origin.config.encode())
        self._write_file("samples.safetensors", safetensors.numpy.save(samples))
        self._write_file("vocabulary.json", self._vocabulary)
        self._write_index()

    @functools.cached_property
    def _vocabulary(self) -> bytes:
        return json.dumps(self.origin.vocabulary).encode()

    def _write_file(self, name: str, content: bytes) -> None:
        atomic_write(self.folder / name, content, flush=False)
        self.files[name] = zlib.crc32(content)

    def write(self, number: int, rows: Tensor) -> int:
        """Writes one block's rows and returns their checksum. Raises OSError."""
        return self.shards.write(number, rows)

    def record(self, blocks: list[tuple[int, int, float]]) -> None:
        """Records written blocks: number, checksum and seconds of each. Raises OSError."""
        for number, checksum, seconds in blocks:
            self.checksums[number] = checksum
            self.seconds += seconds
        self._write_index()

    def write_head(self, weight: Tensor, bias: Tensor | None) -> None:
        """Writes the output projection [V, width] and its bias [V]. Raises OSError.

        A checkpoint's bfloat16 that was widened for the computation is kept as bfloat16, and the type beside it.
        """
        tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        types = {name: shards.dtype_name(tensor.dtype) for name, tensor in tensors.items()}
        narrowed = {name: _narrowed(tensor) for name, tensor in tensors.items()}
        content = safetensors.torch.save(narrowed, {"dtypes": json.dumps(types)})  # several entries have no fixed order
        self.files["head.safetensors"] = zlib.crc32(content)
        if not self.has_head() and not self._share("head.safetensors", content):
            self._write_file("head.safetensors", content)
        self._write_index()

    def _share(self, name: str, content: bytes) -> bool:
        """Takes a file with this content from another cache by a hard link: the disk then has it once.

        Each folder stays complete, whichever is removed. False where no cache has it, or the disk has no links.
        """
        for path in self.folder.parent.glob(f"*/{name}"):
            with contextlib.suppress(OSError), atomic_file(self.folder / name, flush=False) as temporary:
                temporary.unlink()
                os.link(path, temporary)
                if temporary.stat().st_size == len(content) and temporary.read_bytes() == content:
                    return True
                raise OSError("of another teacher, or damaged")
        return False


def _narrowed(tensor: Tensor) -> Tensor:
    """The tensor in the smallest type that gives all its bits back."""
    for dtype in HEAD_TYPES.values():
        parts = tensor.split(4096) if dtype.itemsize < tensor.itemsize else ()
        if parts and all(_same_bits(part, part.to(dtype).to(part.dtype)) for part in parts):
            return tensor.to(dtype)
    return tensor


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def fingerprint(identity: dict) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def read_head(folder: pathlib.Path) -> tuple[Tensor, Tensor | None]:
    """The output projection that `write_head` got, and its bias. Raises OSError and what safetensors raises."""
    path = folder / "head.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    with safe_open(path, "pt") as file:
        types = json.loads((file.metadata() or {}).get("dtypes", "{}"))  # earlier versions kept the type
    for name, tensor in tensors.items():
        # Copied, because a file's tensors begin anywhere and a library may choose its kernel by alignment.
        tensors[name] = tensor.to(HEAD_TYPES.get(types.get(name), tensor.dtype), copy=True)
    return tensors["weight"], tensors.get("bias")
