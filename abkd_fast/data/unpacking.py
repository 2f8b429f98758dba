"""Compressed data that unpack to far more than they are: refused before they fill memory or disk."""

import io
import pathlib
import struct
import typing

import pyarrow.ipc
import pyarrow.parquet

from ..console import format_bytes
from ..errors import ConfigError

ALWAYS = 1 << 28  # bytes that any file may unpack to
TIMES = 100  # and so many times its own size; text shrinks to a third or a tenth
RECORD_BATCH, DICTIONARY_BATCH = "record batch", "dictionary"  # messages of Arrow that have a body


class Limit:
    """What a file may unpack to."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path, self.size = path, path.stat().st_size
        self.left = max(ALWAYS, TIMES * self.size)

    def take(self, count: int) -> None:
        """Counts bytes that were unpacked, or will be. Raises ConfigError if the file has too many."""
        self.left -= count
        if self.left < 0:
            most = format_bytes(max(ALWAYS, TIMES * self.size))
            problem = f"its {self.size} bytes unpack to more than {most}"
            raise ConfigError(f"{self.path}: {problem}; if it is no attack, store it without compression")


class Unpacked(io.RawIOBase):
    """An unpacked file of text, read as far as the limit allows."""

    def __init__(self, file: typing.BinaryIO, limit: Limit) -> None:
        self.file, self.limit = file, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        content = self.file.read(len(buffer))
        self.limit.take(len(content))
        buffer[: len(content)] = content
        return len(content)


def check_parquet(path: pathlib.Path) -> None:
    """Raises ConfigError for a Parquet file with too much in it, and pyarrow's errors."""
    limit = Limit(path)
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(1000):
            limit.take(batch.nbytes)


def check_arrow(path: pathlib.Path) -> None:
    """Raises ConfigError for an Arrow file with too much in it, and pyarrow's errors.

    pyarrow unpacks a whole batch at once, and doesn't tell its size before. So the sizes are taken from the messages.
    """
    limit = Limit(path)
    with pyarrow.memory_map(str(path)) as file:
        if file.read(8) != b"ARROW1\0\0":  # that of the format with a footer; then the messages follow
            file.seek(0)
        for message in pyarrow.ipc.MessageReader.open_stream(file):
            if message.type in (RECORD_BATCH, DICTIONARY_BATCH):
                limit.take(_unpacked_bytes(message))


def _unpacked_bytes(message: pyarrow.ipc.Message) -> int:
    """The size of a batch: each compressed buffer begins with its own, or with -1 if it is stored as it is."""
    batch = _Table(message.metadata, 0).table(2)
    if message.type == DICTIONARY_BATCH:
        batch = batch.table(1)
    if batch.place_of(3) is None:  # no compression
        return message.body.size
    sizes = (struct.unpack_from("<q", message.body, start)[0] for start, size in batch.buffers(2) if size)
    return sum(size for size in sizes if size > 0)


class _Table:
    """A table of a flatbuffer, the format of Arrow's messages: the place of each field stands in a table before it."""

    def __init__(self, content: pyarrow.Buffer, reference: int) -> None:
        """reference: where the distance to the table is written."""
        self.content = content
        self.place = reference + self._number("<I", reference)

    def _number(self, kind: str, place: int) -> int:
        return struct.unpack_from(kind, self.content, place)[0]

    def place_of(self, field: int) -> int | None:
        places = self.place - self._number("<i", self.place)
        if 4 + 2 * field >= self._number("<H", places):
            return None
        distance = self._number("<H", places + 4 + 2 * field)
        return self.place + distance if distance else None

    def table(self, field: int) -> "_Table":
        return _Table(self.content, self.place_of(field))

    def buffers(self, field: int) -> typing.Iterator[tuple[int, int]]:
        """The start and the size of each buffer in the body."""
        vector = self.place_of(field)
        vector += self._number("<I", vector)
        for number in range(self._number("<I", vector)):
            yield struct.unpack_from("<qq", self.content, vector + 4 + 16 * number)
