"""Files and folders: checks, locks, atomic writes, hashes."""

import contextlib
import errno
import fnmatch
import grp
import hashlib
import itertools
import json
import os
import pathlib
import pwd
import shutil
import stat
import zlib
from collections.abc import Iterator
from typing import IO, Any

import filelock

from . import json_shape
from .errors import ConfigError, disk_errors, first_line, library_errors, reading

LOCK, CHECKPOINTS = "lock", "checkpoints"  # names in a run's folder; the first is one in a folder of states, too
TOKENIZERS = "tokenizers"  # in the cache folder: those that Python programs gave as objects, named by their content
NAME_BYTES, PATH_BYTES = 255, 4095  # what file systems take


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
    for part in (folder, folder / CHECKPOINTS):
        check_writable("run.dir", part)


def check_writable(key: str, folder: pathlib.Path) -> None:
    """Raises ConfigError, which names the key, if a folder can't be made, or exists and can't be written to."""
    check_path_length(key, folder, is_written=True)
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
            with contextlib.suppress(OSError):  # others may have begun to use the folders, or removed them
                if made and {path.name for path in folder.iterdir()} <= {LOCK}:
                    (folder / LOCK).unlink(missing_ok=True)
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
    killed process may leave a temporary file: see `leftovers`. Others may read the file, but not write to it. The
    temporary file is new: a link of its name, which somebody else may have made, is removed and leads nowhere.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # each process has its own
    temporary.unlink(missing_ok=True)
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644))
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


def open_own(path: pathlib.Path, mode: str, **options: Any) -> IO:
    """`open` for a file that is changed in place. Raises ConfigError for a link, which may lead to any other file."""
    try:
        return open(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666), **options)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ConfigError(f"{path} is a link, and nothing is written through links: remove it") from None


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
    """$ABKD_CACHE, or else abkd_fast in the user's cache folder. Raises ConfigError where there can be none."""
    with reading("there is no folder for the cache", ": name one in ABKD_CACHE"):
        given = os.environ.get("ABKD_CACHE")
        users = given or os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        folder = pathlib.Path(users, "" if given else "abkd_fast")
    check_path_length("ABKD_CACHE", folder, is_written=True)
    return folder


def make_cache_folder(folder: pathlib.Path) -> None:
    """Makes a folder in the cache folder, and this one. Nobody else may write there, whatever the umask is."""
    folder.parent.mkdir(0o755, parents=True, exist_ok=True)
    folder.mkdir(0o755, exist_ok=True)


def check_trusted(*paths: pathlib.Path) -> None:
    """Raises ConfigError for a folder or file of a cache that another user may have written."""
    for path in paths:
        if (problem := why_untrusted(path)) is not None:
            raise ConfigError(f"{path}: a cache is used unseen, but {problem}")


def why_untrusted(path: pathlib.Path) -> str | None:
    """Why a folder or file may be the work of another user, and the way out; None where it is the user's own.

    As for ssh, the owner has to be the user or root, and nobody else may write. Two exceptions:

    - a group that has the user's name and no other member: with it, many systems let groups write (umask 002);
    - a folder like /tmp, in which nobody can replace what is another's: the entries have owners of their own.
    """
    try:
        status = path.stat()
    except OSError:  # it isn't there, or can't be read
        return None
    if status.st_uid not in (0, os.geteuid()):
        return (
            f"this belongs to another user (uid {status.st_uid}): choose a folder of your own (cache.dir, ABKD_CACHE)"
        )
    writers = status.st_mode & (stat.S_IWOTH | (0 if _is_private(status.st_gid) else stat.S_IWGRP))
    is_shared = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
    return f"others may write to this one: chmod -R go-w {path}" if writers and not is_shared else None


def _is_private(group: int) -> bool:
    """Whether a group is the user's alone."""
    try:
        user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:  # a container may know no names
        return False
    return group.gr_name == user and {*group.gr_mem} <= {user}
