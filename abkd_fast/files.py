"""Files and folders: checks, locks, atomic writes, hashes."""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterator

import filelock
from safetensors import SafetensorError

from .errors import ConfigError, reading

LOCK = "lock"  # the name of the lock in a run's folder
NAME_BYTES, PATH_BYTES = 255, 4095  # what file systems take
WRITE_ERRORS = (OSError, SafetensorError)  # safetensors reports a full disk as an error of its own


def is_local_path(path: str) -> bool:
    """Whether a text is meant as a path, not as a Hub name."""
    return os.path.isabs(path) or path.startswith(".") or path.count("/") > 1


def check_path_length(key: str, path: str | pathlib.Path, is_written: bool = False) -> None:
    """Raises ConfigError, which names the key, for a path that is too long for file systems, or has such a name.

    is_written: files in it, or beside it, will have longer names: ".settings.json.4194304.tmp" is at the end of one.
    """
    room = 40 if is_written else 0
    *folders, name = os.fspath(path).encode("utf-8", "surrogatepass").split(b"/")
    whole = len(os.path.abspath(path).encode("utf-8", "surrogatepass"))
    for what, length, limit in (
        ("has a name", max([len(name) + room, *map(len, folders)]) - room, NAME_BYTES - room),
        ("is a path", whole, PATH_BYTES - 5 * room),
    ):
        if length > limit:
            raise ConfigError(f"{key}: {path}: {what} of {length} bytes, expected at most {limit}", key)


def check_folder(folder: pathlib.Path, resume: bool = False) -> None:
    """Raises ConfigError if a run's folder can't be made, or if it exists and the run is not to be resumed."""
    if folder.exists() and not resume:
        raise ConfigError(f"{folder} exists already: choose another run.name, or move it aside")
    check_writable("run.dir", folder)


def check_writable(key: str, folder: pathlib.Path) -> None:
    """Raises ConfigError, which names the key, if a folder can't be made, or exists and can't be written to."""
    check_path_length(key, folder, is_written=True)
    parent = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        way = "used" if parent == folder.absolute() else "made"
        raise ConfigError(f"{key}: {folder} can't be {way}: {parent} is not a folder that can be written to")


@contextlib.contextmanager
def exclusive(path: pathlib.Path, otherwise: str) -> Iterator[None]:
    """Holds the lock file `path`. Raises ConfigError with the message `otherwise` if another process holds it."""
    try:
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
    """Gives a temporary folder, which becomes `folder` if the block ends without an error. All of it is flushed."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
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


def leftovers(folder: pathlib.Path, name: str = "") -> list[pathlib.Path]:
    """Temporary files of killed processes, and of those that write at this moment. `name`: how they begin."""
    return [path for path in folder.glob("*.tmp") if path.name.startswith(name) and path.is_file()]


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


def cache_folder() -> pathlib.Path:
    """$ABKD_CACHE, or else abkd_fast in the user's cache folder. Raises ConfigError where there can be none."""
    with reading("there is no folder for the cache", ": name one in ABKD_CACHE"):
        given = os.environ.get("ABKD_CACHE")
        users = given or os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        folder = pathlib.Path(users, "" if given else "abkd_fast")
    check_path_length("ABKD_CACHE", folder, is_written=True)
    return folder
