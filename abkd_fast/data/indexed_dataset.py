"""The indexed binary files of MiniLLM, DistiLLM and ABKD (Megatron's format): sequences of token ids.

An .idx file has these parts, little-endian and without gaps: the magic MMIDIDX and two zero bytes; the version, 1 (8
bytes); the code of the ids' type (1 byte); the number of items and that of documents (8 bytes each); the length of each
item, in ids (int32); the start of each item in the .bin file, in bytes (int64); the first item of each document
(int64), which is not needed here.
"""

import itertools
import pathlib
import struct
from collections.abc import Iterator

import numpy as np

from ..errors import ConfigError

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4"}


def find(source: str, splits: tuple[str, ...]) -> list[pathlib.Path]:
    """The .bin files of `source`: a .bin file (or its .idx), or a folder's SPLIT_0.bin, SPLIT_1.bin, …

    The first split that has files is taken. The result is empty for any other source. Raises ConfigError for a folder
    that only has files of other splits.
    """
    path = pathlib.Path(source)
    if path.suffix in (".bin", ".idx"):
        return [path.with_suffix(".bin")]
    for split in splits:
        parts = (path / f"{split}_{number}.bin" for number in itertools.count())
        if found := list(itertools.takewhile(pathlib.Path.exists, parts)):
            return found
    if others := sorted(path.glob("*_0.bin")):
        expected = " or ".join(f"{split}_0.bin" for split in splits)
        raise ConfigError(f"{source}: has {others[0].name}, but no {expected}; name a file")
    return []


def read_items(path: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every item of a .bin file: its place for messages, counted from 1, and its token ids, memory-mapped.

    Raises ConfigError for files that are missing, truncated, or of another format.
    """
    try:
        dtype, sizes, starts = _read_index(path.with_suffix(".idx"))
        length = path.stat().st_size
        content = np.asarray(np.memmap(path, np.uint8, mode="r")) if length else np.empty(0, np.uint8)
    except OSError as error:
        raise ConfigError(f"{error.filename}: can't be read ({error.strerror}); a .bin file needs its .idx") from None
    ends = starts + dtype.itemsize * sizes
    outside = (sizes < 0) | (starts < 0) | (starts > length) | (ends > length)
    if outside.any():
        number = int(outside.argmax())
        extent = f"is bytes {starts[number]} to {ends[number]}, but the file has {length}"
        raise ConfigError(f"{path} item {number + 1}: {extent}: it is truncated, or the .idx is another file's")
    for number, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True), 1):
        yield f"{path} item {number}", content[start:end].view(dtype)


def _read_index(path: pathlib.Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """The type of the ids, the length of every item in ids, and its first byte (both [items], int64)."""
    content = path.read_bytes()
    if not content.startswith(MAGIC):
        raise ConfigError(f"{path}: is not the index of a binary file: it begins with {content[:9]}, not {MAGIC}")
    if len(content) < HEADER.size:
        raise ConfigError(f"{path}: is truncated: it has {len(content)} bytes, and its header alone {HEADER.size}")
    _, version, code, items, documents = HEADER.unpack_from(content)
    if version != 1:
        raise ConfigError(f"{path}: has version {version} of its format, expected 1")
    if code not in DTYPES:
        codes = ", ".join(map(str, DTYPES))
        raise ConfigError(f"{path}: has type code {code}, expected that of whole numbers: {codes}")
    expected = HEADER.size + 12 * items + 8 * documents
    if len(content) != expected:
        raise ConfigError(f"{path}: has {len(content)} bytes, but its {items} items ask for {expected}: it is damaged")
    sizes = np.frombuffer(content, "<i4", items, HEADER.size)
    starts = np.frombuffer(content, "<i8", items, HEADER.size + sizes.nbytes)
    return np.dtype(DTYPES[code]), sizes.astype(np.int64), starts.astype(np.int64)


def split_item(where: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits an item into prompt and response at the separator: the largest number of the ids' type, or -1.

    Raises ConfigError for an item without a separator, or with an empty response.
    """
    largest = np.iinfo(ids.dtype).max
    (separators,) = ((ids == largest) | (ids == -1)).nonzero()
    if not len(separators):
        raise ConfigError(f"{where}: has no separator ({largest}); without prompts it is plain text, for data.pretrain")
    prompt, response = ids[: separators[0]], ids[separators[0] + 1 :]
    if not len(response):
        raise ConfigError(f"{where}: the response is empty: nothing to learn")
    return prompt, response


def check_ids(ids: np.ndarray, vocabulary: int) -> None:
    """Raises ConfigError if a tokenizer with a vocabulary of this size can't have made the ids."""
    if vocabulary > np.iinfo(ids.dtype).max:
        raise ConfigError(f"{ids.dtype} has no room for the tokenizer's {vocabulary} tokens and a separator")
    wrong = ids[(ids < 0) | (ids >= vocabulary)]
    if len(wrong):
        known = f"the tokenizer has {vocabulary} tokens"
        raise ConfigError(f"has token id {wrong[0]}, but {known}: another one made the file")
