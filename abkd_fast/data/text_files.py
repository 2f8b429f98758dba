"""Files of text, plain or compressed: JSON, a row in each line or in an array, and CSV.

Every reader yields pairs: the place of a row, for messages, and its value, or a ConfigError for a row that is broken.
What is wrong with a whole file is raised. `datasets` reads these formats, too, but without line numbers, and it makes
the types of all rows one.
"""

import bz2
import contextlib
import csv
import gzip
import io
import lzma
import pathlib
import typing
import zlib
from collections.abc import Collection, Iterator

import pyarrow

from ..errors import ConfigError, first_line
from .strict_json import SPACE, BadValue, parse, parse_at, show
from .unpacking import Limit, Unpacked

RawRow = tuple[str, object]

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# What binary files begin with, and the end of the name by which they are read.
MAGIC = {
    b"\x1f\x8b": ("gzip", ".gz"),
    b"BZh": ("bzip2", ".bz2"),
    b"\xfd7zXZ\0": ("xz", ".xz"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", ".zst"),
    b"PAR1": ("Parquet", ".parquet"),
    b"ARROW1": ("Arrow", ".arrow"),
    b"PK\3\4": ("zip or Excel", None),
    b"PK\5\6": ("zip or Excel", None),
    b"7z\xbc\xaf": ("7z", None),
    b"\x89HDF": ("HDF5", None),
    b"SQLite format 3": ("SQLite", None),
}
UNICODE = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
# Without such a mark, ASCII in these encodings has zeros among its first four bytes: True is another byte.
ZEROS = {
    (True, False, False, False): "UTF-32",
    (False, False, False, True): "UTF-32",
    (True, False, True, False): "UTF-16",
    (False, True, False, True): "UTF-16",
}
BOM = b"\xef\xbb\xbf"


def read_json(path: pathlib.Path) -> Iterator[RawRow]:
    """Yields the rows of a file of JSON: an array if it begins with "[", else a value in each line."""
    with open_text(path) as file:
        is_array = file.peek(1 << 12).removeprefix(BOM).lstrip().startswith(b"[")
        yield from (_read_array if is_array else _read_lines)(path, file)


def read_jsonl(path: pathlib.Path) -> Iterator[RawRow]:
    """Yields the place and the value of every line. Raises ConfigError for a broken one, too."""
    with open_text(path) as file:
        for where, value in _read_lines(path, file):
            if isinstance(value, ConfigError):
                raise value
            yield where, value


@contextlib.contextmanager
def open_text(path: pathlib.Path) -> Iterator[typing.BinaryIO]:
    """The decompressed content of a file of text. Raises ConfigError for other files."""
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(path.open("rb"))
            match path.suffix.lower():
                case ".gz":
                    file = stack.enter_context(gzip.GzipFile(fileobj=file))
                case ".bz2":
                    file = stack.enter_context(bz2.BZ2File(file))
                case ".xz":
                    file = stack.enter_context(lzma.LZMAFile(file))
                case ".zst":
                    file = stack.enter_context(pyarrow.CompressedInputStream(file, "zstd"))
            if path.suffix.lower() in COMPRESSED:
                file = Unpacked(file, Limit(path))
            file = stack.enter_context(io.BufferedReader(file, 1 << 16))
            check_start(path, file.peek(16)[:16])
            yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{path}: can't be read ({getattr(error, 'strerror', None) or first_line(error)})") from None


def check_start(path: pathlib.Path, start: bytes) -> None:
    """Raises ConfigError for a file that isn't UTF-8 text by its first bytes."""
    if start.startswith(b"version https://"):
        raise ConfigError(f"{path}: is a Git LFS pointer; git lfs pull fetches the file")
    for magic, (kind, end) in MAGIC.items():
        if start.startswith(magic):
            way_out = f"it must end in {end}" if end else "unpack it"
            raise ConfigError(f"{path}: is {kind}, not what its name says; {way_out}")
    encoding = next((name for mark, name in UNICODE.items() if start.startswith(mark)), None)
    encoding = encoding or ZEROS.get(tuple(map(bool, start[:4])))
    if encoding:
        raise ConfigError(f"{path}: is {encoding} text; save it as UTF-8")


def _read_lines(path: pathlib.Path, file: typing.BinaryIO) -> Iterator[RawRow]:
    # The lines are decoded one by one, so that an error has a line, and ends no more than its row.
    for number, line in enumerate(file, 1):
        if not (line := line.removeprefix(BOM).strip()):
            continue
        where = f"{path} line {number}"
        if line == b"{":
            problem = "an object that spans lines"
            raise ConfigError(f"{where}: {problem}; each line must be an object, or the file an array of objects")
        try:
            value = parse(_decode(line))
        except ConfigError as error:
            value = ConfigError(f"{where}: {error}")
        yield where, value


def _decode(line: bytes) -> str:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 text ({error.reason}); save the file as UTF-8") from None
    if "\0" in text:
        raise ConfigError("broken JSON: has NUL bytes: the file is damaged, or not text")
    return text


def _read_array(path: pathlib.Path, file: typing.BinaryIO) -> Iterator[RawRow]:
    try:
        text = file.read().removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path} line {line}: is not UTF-8 text ({error.reason}); save the file as UTF-8") from None
    place, number = SPACE.match(text, text.index("[") + 1).end(), 0
    while text[place : place + 1] != "]" or number:
        number += 1
        where = f"{path} row {number}"
        try:
            value, place = parse_at(text, place)
        except BadValue as error:
            value, place = ConfigError(f"{where}: {error}"), error.end
        except ConfigError as error:
            raise ConfigError(f"{where} (line {text.count(chr(10), 0, place) + 1}): {error}") from None
        yield where, value
        place = SPACE.match(text, place).end()
        if text[place : place + 1] != ",":
            break
        place = SPACE.match(text, place + 1).end()
    if text[place : place + 1] != "]":
        raise ConfigError(f"{path} row {number}: broken JSON: the array goes on without a comma, or has no end")
    if text[place + 1 :].strip():
        raise ConfigError(f"{path}: broken JSON: there is more after the array")


def read_csv(path: pathlib.Path, known: Collection[str], delimiter: str) -> Iterator[RawRow]:
    """Yields the rows of a file with a line of column names, of which one must be in `known`."""
    with open_text(path) as file:
        yield from _read_table(path, file, known, delimiter)


def _read_table(path: pathlib.Path, file: typing.BinaryIO, known: Collection[str], delimiter: str) -> Iterator[RawRow]:
    # `datasets` would guess types: "007" would be a number. Here every value is text, and an empty one is missing.
    csv.field_size_limit((1 << 31) - 1)
    reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    line = 0
    try:
        header = next(reader, None)
        if header is not None and not {*header} & {*known}:
            problem = "expected the names of the columns, separated by commas (in a .tsv file by tabs)"
            raise ConfigError(f"{path} line 1: {problem}, got {show(header)}")
        if twice := [name for name in header or () if name and header.count(name) > 1]:
            raise ConfigError(f'{path} line 1: has the column "{twice[0][:60]}" twice')
        line = reader.line_num
        for fields in reader:
            where, line = f"{path} line {line + 1}", reader.line_num
            if len(fields) == len(header):
                yield where, {key: value or None for key, value in zip(header, fields, strict=True)}
            elif fields:
                problem = f"has {len(fields)} fields, but the first line names {len(header)} columns"
                yield where, ConfigError(f"{where}: {problem}")
    except csv.Error as error:
        raise ConfigError(f"{path} line {line + 1}: broken CSV: {error}") from None
    except UnicodeDecodeError as error:
        # The file is decoded in blocks, each ahead of the lines that are read.
        problem = f"is not UTF-8 text in line {line + 1} or after it ({error.reason})"
        raise ConfigError(f"{path}: {problem}; save it as UTF-8") from None
