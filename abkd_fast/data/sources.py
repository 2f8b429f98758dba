"""Where rows come from: files, folders, data sets on the disk or on the Hub. Names say which split is read."""

import contextlib
import glob
import os
import pathlib
import re
from collections.abc import Collection, Iterable, Iterator

import datasets
from datasets.exceptions import DatasetGenerationError

from ..errors import NO_ROOM, ConfigError, disk_error, disk_errors, reading
from ..files import is_local_path
from . import quickstart, text_files
from .text_files import COMPRESSED, RawRow
from .token_store import MOVE_CACHE
from .unpacking import check_arrow, check_parquet

# The name of a file says its format. A file with any other name is read as JSON.
FORMATS = (".jsonl", ".parquet", ".arrow", ".csv", ".tsv", ".json")  # a folder is read in the first that it has
SAVED = (("dataset_dict.json",), ("dataset_info.json", "state.json"))  # what `save_to_disk` leaves in a folder
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
    if os.path.isfile(name):
        raise ConfigError(f"{source}: a file has no splits and no configurations; name it as {name}")
    if not os.path.isdir(name):
        if name.endswith(FORMATS + COMPRESSED) or is_local_path(name) or "/" not in name:
            raise ConfigError(f"{source}: no such file or folder")
        yield from _load(source, name, config, split, splits, notes)
    elif any(all(os.path.exists(path / file) for file in files) for files in SAVED):
        yield from _load_saved(source, path, config, split, splits, notes)
    elif _is_clone(path):
        yield from _load(source, name, config, split, splits, notes)
    elif config:
        raise ConfigError(
            f"{source}: a folder of files has no configurations; name a split as {name}::{split or config}"
        )
    else:
        named = tuple(key for key, words in WORDS.items() if split in words) or (split,)
        for file in _choose_files(source, path, named if split else splits, bool(split), notes):
            yield from _read_file(file, known)


def _is_clone(path: pathlib.Path) -> bool:
    """Whether a folder's README says, as on the Hub, which data files there are."""
    try:
        head = (path / "README.md").read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
    except OSError:
        return False
    return head.startswith("---") and re.search(r"^[- ]*data_files:", head, re.MULTILINE) is not None


def _split_name(source: str) -> tuple[str, str, str]:
    name, config, split = [*source.split(":", 2), "", ""][:3]  # a split may be a slice: train[:10]
    return name, config, split


def _read_file(path: pathlib.Path, known: Collection[str]) -> Iterator[RawRow]:
    """Yields the rows of one file. Raises ConfigError for one that can't be read, or is not what its name says."""
    kind = _format(path.name)
    if kind in (".parquet", ".arrow"):
        return _read_arrow(path, kind)
    if kind in (".csv", ".tsv"):
        return text_files.read_csv(path, known, "\t" if kind == ".tsv" else ",")
    return text_files.read_json(path)


def _format(name: str) -> str:
    """What the end of a file's name says, one of FORMATS; or else ""."""
    name = name.lower()
    for end in COMPRESSED:
        name = name.removesuffix(end)
    return next((end for end in FORMATS if name.endswith(end)), "")


def _read_arrow(path: pathlib.Path, kind: str) -> Iterator[RawRow]:
    try:
        with path.open("rb") as file:
            if not (start := file.read(16)).startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
                text_files.check_start(path, start)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror})") from None
    with _errors(str(path), f"can't be read as a {kind} file"), _quiet():
        (check_parquet if kind == ".parquet" else check_arrow)(path)
        # What looks like a pattern in a path is none.
        data = datasets.load_dataset(kind[1:], data_files=glob.escape(str(path)), split="train")
    yield from _rows_of(str(path), data)


def _load(
    source: str, name: str, config: str, split: str, splits: tuple[str, ...], notes: list[str]
) -> Iterator[RawRow]:
    """Rows of a data set on the Hub, or of a clone of one."""
    is_local = os.path.isdir(name)
    problem = "can't be read" if is_local else "no such file, and no data set of that name on the Hub can be loaded"
    if not split and _said(config):
        problem += f"; if {config} is a split, name it as {name}::{config}"
    with _errors(source, problem), _quiet() if is_local else contextlib.nullcontext():
        if not split:
            split = _choose_split(source, datasets.get_dataset_split_names(name, config or None), splits)
            notes.append(f"{source}: split {split}")
        data = datasets.load_dataset(name, config or None, split=split)
    yield from _rows_of(source, data)


def _load_saved(
    source: str, path: pathlib.Path, config: str, split: str, splits: tuple[str, ...], notes: list[str]
) -> Iterator[RawRow]:
    """Rows that `save_to_disk` has written."""
    with _errors(source, "can't be read"), _quiet():
        for file in path.rglob("*.arrow"):
            check_arrow(file)
        data = datasets.load_from_disk(str(path))
        has_splits = isinstance(data, datasets.DatasetDict)
        if config:
            ways = " or ".join(f"{path}::{name}" for name in data) if has_splits else str(path)
            raise ConfigError(f"{source}: a saved data set has no configurations; name it as {ways}")
        if has_splits:
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
                pairs = zip(batch, row, strict=True)
                values = {key: _as_json(part) if isinstance(part, (dict, list)) else part for key, part in pairs}
                yield f"{source} row {number}", values


def rows_in_memory(name: str, data: datasets.Dataset | Iterable[dict]) -> Iterator[RawRow]:
    """Rows of a data set of the `datasets` library, or mappings. Raises ConfigError for one with splits."""
    if isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise ConfigError(f"{name}: has the splits {', '.join(data)}; give one of them")
    if isinstance(data, datasets.Dataset):
        yield from _rows_of(name, data)
        return
    with _errors(name, "can't be read"):
        for number, row in enumerate(data, 1):
            yield f"{name} row {number}", _as_json(row) if isinstance(row, dict) else row


def _as_json(value: object) -> object:
    """An object or a list of Arrow as JSON would have it.

    Keys that are null are left out: Arrow gives all objects of a column the same keys. So are bytes. Dates are text.
    """
    if isinstance(value, dict):
        return {key: part for key, part in ((key, _as_json(part)) for key, part in value.items()) if part is not None}
    if isinstance(value, list):
        return value if value and isinstance(value[0], (str, int)) else [_as_json(part) for part in value]
    if value is None or isinstance(value, bytes):
        return None
    return value if isinstance(value, (str, int, float)) else str(value)


@contextlib.contextmanager
def _errors(source: str, problem: str) -> Iterator[None]:
    """`reading` for `datasets`, which hides the error of a file's library behind one of its own.

    Raises Interrupted where its cache is full.
    """
    with reading(f"{source}: {problem}"):
        try:
            yield
        except Exception as error:
            hidden, cache = error.__cause__ or error, str(datasets.config.HF_DATASETS_CACHE)
            of_disk = disk_error(hidden)
            if of_disk is not None and (of_disk.errno in NO_ROOM or cache in str(of_disk)):
                with disk_errors(cache, MOVE_CACHE):
                    raise of_disk from None
            raise (hidden if isinstance(error, DatasetGenerationError) else error) from None


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
    words = re.findall("[a-z]+", name.lower() + " " + re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower())
    words = {word.removesuffix("set").removesuffix("data") for word in words}
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


def _choose_files(
    source: str, path: pathlib.Path, splits: tuple[str, ...], must_say: bool, notes: list[str]
) -> list[pathlib.Path]:
    """The files of a folder that `splits` mean.

    Names decide, and a folder where they don't is read whole, unless they must say it: the user has named the split.
    """
    try:
        there = sorted(path.iterdir())
        inner = [one for one in there if one.is_dir() and (_said(one.name) or one.name == "data")]
        there += [file for folder in inner for file in sorted(folder.iterdir())]
        names = [file for file in there if file.is_file() and not file.name.startswith(".")]
    except OSError as error:
        raise ConfigError(f"{error.filename}: can't be read ({error.strerror})") from None
    said = {file: _said(str(file.relative_to(path))) for file in names if _format(file.name)}
    if not said:
        raise ConfigError(f"{source}: a folder without .jsonl files, or {', '.join(FORMATS[1:])} files")
    listed = ", ".join(str(file.relative_to(path)) for file in said)
    chosen = next(filter(None, ([file for file in said if said[file] == {split}] for split in splits)), None)
    if chosen is None and not must_say and (splits[0] == "train" or not any(said.values())):
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
