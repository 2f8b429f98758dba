"""Files and folders: atomic writes, locks, checks."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterator

import filelock
from safetensors import SafetensorError

from .errors import ConfigError


def is_local_path(path: str) -> bool:
    """Whether a text is meant as a path, not as a Hub name."""
    return os.path.isabs(path) or path.startswith(".") or path.count("/") > 1


LOCK = "lock"
WRITE_ERRORS = (OSError, SafetensorError)  # safetensors reports a full disk as an error of its own


def check_folder(folder: pathlib.Path, resume: bool = False) -> None:
    """Raises ConfigError where a run's folder exists (unless to resume it), or can't be made."""
    if folder.exists() and not resume:
        raise ConfigError(f"{folder} exists already: choose another run.name, or move it aside")
    check_writable("run.dir", folder)


def check_writable(key: str, folder: pathlib.Path) -> None:
    """Raises ConfigError, which names the key, where a folder can't be made or, if it is there, written to."""
    parent = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        way = "used" if parent == folder.absolute() else "made"
        raise ConfigError(f"{key}: {folder} can't be {way}: {parent} is not a folder that can be written to")


@contextlib.contextmanager
def exclusive(path: pathlib.Path, otherwise: str) -> Iterator[None]:
    """Holds a lock, which is that file. Raises ConfigError, which says `otherwise`, where another process has it."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ConfigError(otherwise) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Makes the folder of a run, and keeps other processes out; what nothing was written to is removed again.

    Raises ConfigError where another process is there.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    busy = f"{folder}: another process is at work on this run: wait for it, or choose another run.name (or --out)"
    with exclusive(folder / LOCK, busy):
        try:
            yield
        finally:
            if made and {path.name for path in folder.iterdir()} <= {LOCK}:
                (folder / LOCK).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # of a folder that others have begun to use
                    for path in made:
                        path.rmdir()


@contextlib.contextmanager
def atomic_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary folder that becomes `folder`, flushed to the disk, once the block ends without an error."""
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
def atomic_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary file that replaces `path` once the block ends: a reader sees the old or the new one whole, always."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write(path: pathlib.Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _flush(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: pathlib.Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def cache_folder() -> pathlib.Path:
    """$ABKD_CACHE, or abkd_fast in the user's cache folder."""
    if os.environ.get("ABKD_CACHE"):
        return pathlib.Path(os.environ["ABKD_CACHE"])
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "abkd_fast"


def replace_file(path: pathlib.Path, content: bytes) -> None:
    """The whole content or the old file, whatever happens."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
