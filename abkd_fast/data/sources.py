"""Where rows come from: files of several formats, folders, data sets on the disk or on the Hub.

Every reader yields pairs: the place of a row, for messages, and its value, or a ConfigError for a row that is broken.
What is wrong with a whole file is raised.
"""

import bz2
import contextlib
import csv
import glob
import gzip
import io
import lzma
import os
import pathlib
import re
import typing
import zlib
from collections.abc import Collection, Iterator

import datasets
import pyarrow

from ..errors import ConfigError, first_line
from ..files import is_local_path
from . import quickstart
from .strict_json import SPACE, BadValue, parse, parse_at, show

RawRow = tuple[str, object]

# The name of a file says its format. A file with any other name is read as JSON.
FORMATS = (".jsonl", ".parquet", ".arrow", ".csv", ".tsv", ".json")  # a folder is read in the first that it has
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# What binary files begin with, and the end of the name by which they are read.
MAGIC = {
    b"\x1f\x8b": ("gzip", ".gz"),
    b"BZh": ("bzip2", ".bz2"),
    b"\xfd7zXZ\0": ("xz", ".xz"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", ".zst"),
    b"PAR1": ("Parquet", ".parquet"),
    b"ARROW1": ("Arrow", ".arrow"),
    b"PK\3\4": ("zip", None),
    b"PK\5\6": ("zip", None),
    b"7z\xbc\xaf": ("7z", None),
    b"\x89HDF": ("HDF5", None),
    b"SQLite format 3": ("SQLite", None),
    b"version https://git-lfs": ("Git LFS pointer", None),
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

# Words of a name that say a split, by the names in `splits` of `read_rows`.
WORDS = {
    "train": {"train", "training"},
    "dev": {"dev", "devel", "development"},
    "valid": {"valid", "validation", "val", "eval", "evaluation"},
    "test": {"test", "testing"},
}


def read(source: str, splits: tuple[str, ...], known: Collection[str], notes: list[str]) -> Iterator[RawRow]:
    """Yields the rows of a file, folder, Hub name or "quickstart:SPLIT". Raises ConfigError.

    A name may be followed by a configuration and a split, as in NAME:CONFIG:SPLIT, NAME::SPLIT and NAME:CONFIG.
    Otherwise the split is the first of `splits` that is there. What was chosen is added to `notes`. `known` has the
    names of columns of which a CSV file needs one.
    """
    if source.startswith("quickstart:"):
        for number, row in enumerate(quickstart.rows(source.removeprefix("quickstart:")), 1):
            yield f"{source} row {number}", row
        return
    if os.path.isfile(source):
        yield from _read_file(pathlib.Path(source), known)
        return
    name, config, split = (source, "", "") if os.path.isdir(source) else _split_name(source)
    path = pathlib.Path(name)
    if not os.path.isdir(name):
        if name.endswith(FORMATS + COMPRESSED) or is_local_path(name) or "/" not in name:
            raise ConfigError(f"{source}: no such file or folder")
        yield from _load(source, config, split, splits, notes)
    elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        yield from _load_saved(source, path, split, splits, notes)
    elif _is_clone(path):
        yield from _load(source, config, split, splits, notes)
    elif config:
        raise ConfigError(f"{source}: a folder of files has no configurations; name a split as {name}::{config}")
    else:
        splits = tuple(key for key, words in WORDS.items() if split in words) or (split,) if split else splits
        for file in _choose_files(source, path, splits, notes):
            yield from _read_file(file, known)


def _is_clone(path: pathlib.Path) -> bool:
    """Whether a folder's README says, as on the Hub, which data files there are."""
    try:
        head = (path / "README.md").read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
    except OSError:
        return False
    return head.startswith("---") and re.search(r"^[- ]*data_files:", head, re.MULTILINE) is not None


def _split_name(source: str) -> tuple[str, str, str]:
    name, *rest = source.split(":")
    if len(rest) > 2:
        raise ConfigError(f"{source}: no such file or folder; expected NAME, NAME:CONFIG or NAME:CONFIG:SPLIT")
    return (name, *rest, *[""] * (2 - len(rest)))


def _read_file(path: pathlib.Path, known: Collection[str]) -> Iterator[RawRow]:
    """Yields the rows of one file. Raises ConfigError for one that can't be read, or is not what its name says."""
    kind = _format(path.name)
    if kind in (".parquet", ".arrow"):
        yield from _read_arrow(path, kind)
        return
    with _open(path) as file:
        if kind in (".csv", ".tsv"):
            yield from _read_csv(path, file, known, "\t" if kind == ".tsv" else ",")
        elif file.peek(1 << 12).removeprefix(BOM).lstrip().startswith(b"["):
            yield from _read_array(path, file)
        else:
            yield from _read_lines(path, file)


def _format(name: str) -> str:
    """What the end of a file's name says, one of FORMATS; or else ""."""
    name = name.lower()
    for end in COMPRESSED:
        name = name.removesuffix(end)
    return next((end for end in FORMATS if name.endswith(end)), "")


def read_jsonl(path: pathlib.Path) -> Iterator[RawRow]:
    """Yields the place and the value of every line. Raises ConfigError for a broken one, too."""
    with _open(path) as file:
        for where, value in _read_lines(path, file):
            if isinstance(value, ConfigError):
                raise value
            yield where, value


@contextlib.contextmanager
def _open(path: pathlib.Path) -> Iterator[typing.BinaryIO]:
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
            file = stack.enter_context(io.BufferedReader(file, 1 << 16))
            _check_text(path, file.peek(16)[:16])
            yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{path}: can't be read ({getattr(error, 'strerror', None) or first_line(error)})") from None


def _check_text(path: pathlib.Path, start: bytes) -> None:
    for magic, (kind, end) in MAGIC.items():
        if start.startswith(magic):
            way_out = f"its name must end in {end}" if end else "unpack it, or fetch it with git lfs pull"
            raise ConfigError(f"{path}: is not text but a {kind} file; {way_out}")
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


def _read_csv(path: pathlib.Path, file: typing.BinaryIO, known: Collection[str], delimiter: str) -> Iterator[RawRow]:
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
        raise ConfigError(f"{path}: is not UTF-8 text after line {line} ({error.reason}); save it as UTF-8") from None


def _read_arrow(path: pathlib.Path, kind: str) -> Iterator[RawRow]:
    try:
        with path.open("rb") as file:
            start = file.read(16)
            _check_text(path, b"" if start.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")) else start)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror})") from None
    with _errors(str(path), f"can't be read as a {kind} file"), _quiet():
        # What looks like a pattern in a path is none.
        data = datasets.load_dataset(kind[1:], data_files=glob.escape(str(path)), split="train")
    yield from _rows_of(str(path), data)


def _load(source: str, config: str, split: str, splits: tuple[str, ...], notes: list[str]) -> Iterator[RawRow]:
    """Rows of a data set on the Hub, or of a clone of one."""
    name = source.split(":")[0] if config or split else source
    problem = (
        "can't be read"
        if os.path.isdir(name)
        else "no such file, and no data set of that name on the Hub can be loaded"
    )
    with _errors(source, problem), _quiet() if os.path.isdir(name) else contextlib.nullcontext():
        if not split:
            split = _choose_split(source, datasets.get_dataset_split_names(name, config or None), splits)
            notes.append(f"{source}: split {split}")
        data = datasets.load_dataset(name, config or None, split=split)
    yield from _rows_of(source, data)


def _load_saved(
    source: str, path: pathlib.Path, split: str, splits: tuple[str, ...], notes: list[str]
) -> Iterator[RawRow]:
    """Rows that `save_to_disk` has written."""
    with _errors(source, "can't be read"), _quiet():
        data = datasets.load_from_disk(str(path))
        if isinstance(data, datasets.DatasetDict):
            split = split or _choose_split(source, [*data], splits)
            if split not in data:
                raise ConfigError(f"{source}: has no split {split}; its splits are {', '.join(data)}")
            notes.append(f"{source}: split {split}")
            data = data[split]
        elif split:
            raise ConfigError(f"{source}: has one split, without a name; leave out :{split}")
    yield from _rows_of(source, data)


def _rows_of(source: str, data: datasets.Dataset) -> Iterator[RawRow]:
    number = 0
    with _errors(source, "can't be read"):
        for batch in data.iter(256):
            for row in zip(*batch.values(), strict=True):
                number += 1
                yield f"{source} row {number}", _without_nulls(dict(zip(batch, row, strict=True)))


def _without_nulls(value: object) -> object:
    """The value without keys that are null: Arrow gives all objects of a column the same keys."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list) and value and isinstance(value[0], (dict, list)):
        return [_without_nulls(part) for part in value]
    return value


@contextlib.contextmanager
def _errors(source: str, problem: str) -> Iterator[None]:
    """Turns what `datasets` raises, which may be anything, into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{source}: {problem} ({first_line(error.__cause__ or error)})") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """`datasets` shows no progress, and logs no error that it also raises."""
    shown, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bar()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bar()


def _said(name: str) -> set[str]:
    """The splits that the words of a name say, by the keys of WORDS."""
    words = {*re.findall(r"[a-z0-9]+", name.lower())}
    return {split for split, names in WORDS.items() if words & names}


def _choose_split(source: str, names: list[str], splits: tuple[str, ...]) -> str:
    """The split of a data set that `splits` mean. Raises ConfigError where no name, or more than one, says it."""
    for wanted in splits:
        said = [name for name in names if _said(name) == {wanted}]
        if wanted in said or len(said) == 1:
            return wanted if wanted in said else said[0]
        if said:
            break
    else:
        if len(names) == 1 and not _said(names[0]):
            return names[0]
    ways = " or ".join(f"{source}{':' * (2 - source.count(':'))}{name}" for name in names)
    raise ConfigError(f"{source}: which split is meant by {splits[0]}? Name it: {ways}")


def _choose_files(source: str, path: pathlib.Path, splits: tuple[str, ...], notes: list[str]) -> list[pathlib.Path]:
    """The files of a folder that `splits` mean. Names decide, and a folder where they don't is read whole."""
    try:
        there = sorted(path.iterdir())
        inner = [one for one in there if one.is_dir() and (_said(one.name) or one.name == "data")]
        there += [file for folder in inner for file in sorted(folder.iterdir())]
    except OSError as error:
        raise ConfigError(f"{error.filename}: can't be read ({error.strerror})") from None
    names = [file for file in there if file.is_file() and not file.name.startswith(".")]
    said = {file: _said(str(file.relative_to(path))) for file in names if _format(file.name)}
    if not said:
        raise ConfigError(f"{source}: a folder without .jsonl files, or {', '.join(FORMATS[1:])} files")
    listed = ", ".join(str(file.relative_to(path)) for file in said)
    chosen = next(filter(None, ([file for file in said if said[file] == {split}] for split in splits)), None)
    if chosen is None and (splits[0] == "train" or not any(said.values())):
        chosen = [file for file in said if not said[file]]
    if not chosen:
        raise ConfigError(f"{source}: no name of its files says {' or '.join(splits)}; name a file ({listed})")
    kind = min((_format(file.name) for file in chosen), key=FORMATS.index)
    chosen = [file for file in chosen if _format(file.name) == kind and not _has_twin(file, chosen)]
    others = [str(file.relative_to(path)) for file in said if file not in chosen]
    note = f"{source}: read {', '.join(str(file.relative_to(path)) for file in chosen)}"
    notes.append(note + (f"; not read: {', '.join(others)}" if others else ""))
    return chosen


def _has_twin(file: pathlib.Path, files: list[pathlib.Path]) -> bool:
    """Whether a compressed file is there uncompressed, too."""
    return file.suffix.lower() in COMPRESSED and file.with_suffix("") in files
