"""Files and folders: checks, locks, atomic writes, hashes."""

import contextlib
import fnmatch
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Iterator

import filelock

from . import json_shape
from .errors import ConfigError, disk_errors, first_line, library_errors

LOCK, CHECKPOINTS = "lock", "checkpoints"  # names in a run's folder


def entries(folder: pathlib.Path, pattern: str = "*") -> list[pathlib.Path]:
    """What is in a folder and fits a pattern, by name; nothing where there is no folder.

    Raises OSError for a folder that can't be read. `Path.glob` would find nothing in it.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder / name for name in sorted(fnmatch.filter(names, pattern))]


def is_local_path(path: str) -> bool:
    """Whether a text is meant as a path, not as a Hub name."""
    return os.path.isabs(path) or path.startswith(".") or path.count("/") > 1


def check_folder(folder: pathlib.Path, resume: bool = False) -> None:
    """Raises ConfigError if a run's folder can't be made, or if it exists and the run is not to be resumed."""
    if folder.exists() and not resume:
        raise ConfigError(f"{folder} exists already: choose another run.name, or move it aside")
    for part in (folder, folder / CHECKPOINTS):
        check_writable("run.dir", part)


def check_writable(key: str, folder: pathlib.Path) -> None:
    """Raises ConfigError, which names the key, if a folder can't be made, or exists and can't be written to."""
    parent = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        way = "used" if parent == folder.absolute() else "made"
        raise ConfigError(f"{key}: {folder} can't be {way}: {parent} is not a folder that can be written to")


@contextlib.contextmanager
def exclusive(path: pathlib.Path, otherwise: str) -> Iterator[None]:
    """Holds the lock file `path`. Raises ConfigError with the message `otherwise` if another process holds it."""
    try:
        with disk_errors(path):
            held = filelock.FileLock(path).acquire(timeout=0)
    except filelock.Timeout:
        raise ConfigError(otherwise) from None
    with held:
        yield


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Makes the folder of a run and keeps other processes out of it.

    A folder that this made is removed at the end if nothing was written to it. Raises ConfigError if another process
    uses the folder.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    busy = f"{folder}: another process is at work on this run: wait for it, or choose another run.name (or --out)"
    with exclusive(folder / LOCK, busy):
        remove_leftovers(folder)
        try:
            yield
        finally:
            if made and {path.name for path in folder.iterdir()} <= {LOCK}:
                (folder / LOCK).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # others may have begun to use the folders
                    for path in made:
                        path.rmdir()


@contextlib.contextmanager
def atomic_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a temporary folder, which becomes `folder` if the block ends without an error. All of it is flushed.

    Raises OSError, also where a library reports a full disk by an error of its own.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with library_errors():
            yield temporary
        for path in (*temporary.rglob("*"), temporary):
            _flush(path)
        temporary.rename(folder)
        _flush(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def atomic_file(path: pathlib.Path, flush: bool = True) -> Iterator[pathlib.Path]:
    """Gives a temporary file, which replaces `path` if the block ends without an error.

    A reader always sees the old file or the new one, whole. With `flush` this also holds after a loss of power. A
    killed process may leave a temporary file: see `leftovers`.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # each process has its own
    try:
        yield temporary
        if flush:
            _flush(temporary)
        temporary.replace(path)
        if flush:
            _flush(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write(path: pathlib.Path, content: str | bytes, flush: bool = True) -> None:
    """Writes a whole file, text as UTF-8. The rest is as in `atomic_file`."""
    with atomic_file(path, flush) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: pathlib.Path, values: dict) -> None:
    atomic_write(path, json.dumps(values, indent=2) + "\n")


def read_json(path: pathlib.Path, way_out: str = "move it aside", shape: dict | None = None) -> dict:
    """The object in a JSON file that this package has written. Raises ConfigError where it can't be, with the way out.

    shape: what `json_shape.problem` compares it with.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
        if (problem := json_shape.problem(values, shape or {})) is not None:
            raise ValueError(problem)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ConfigError(f"{path} can't be read ({reason}): {way_out}") from None
    return values


def leftovers(folder: pathlib.Path, name: str = "") -> list[pathlib.Path]:
    """Temporary files of killed processes, and of those that write at this moment. `name`: how they begin."""
    return [path for path in entries(folder, "*.tmp") if path.name.startswith(name) and path.is_file()]


def remove_leftovers(folder: pathlib.Path, name: str = "") -> None:
    """Deletes what killed processes have left. The caller holds a lock: nobody writes at this moment."""
    for path in leftovers(folder, name):
        path.unlink(missing_ok=True)


def _flush(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_bytes(*folders: pathlib.Path) -> int:
    """What the files of folders take of the disk. One that several folders have by hard links counts once."""
    sizes = {}
    for path in itertools.chain.from_iterable(folder.rglob("*") for folder in folders):
        with contextlib.suppress(OSError):  # another process may remove it
            status = path.lstat()
            sizes[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(sizes.values())


def file_digest(path: pathlib.Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def file_checksum(path: pathlib.Path) -> int | None:
    """The CRC-32 of a file's content; None where it can't be read, or is no regular file."""
    checksum = 0
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                checksum = zlib.crc32(block, checksum)
    except OSError:
        return None
    return checksum


def cache_folder() -> pathlib.Path:
    """$ABKD_CACHE, or else abkd_fast in the user's cache folder."""
    if os.environ.get("ABKD_CACHE"):
        return pathlib.Path(os.environ["ABKD_CACHE"])
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "abkd_fast"
