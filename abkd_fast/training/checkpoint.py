"""Checkpoints: on the disk whole or not at all, checked before use, the newest and the best kept; and stop signals."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import threading
import time
import types
from collections.abc import Callable, Iterator

import filelock
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .. import distributed
from ..config.schema import ConfigError
from .metrics import console

LOCK = "lock"
MANIFEST, STATE, TENSORS, OPTIMIZER = "manifest.json", "trainer.json", "trainer.safetensors", "optimizer"
WRITE_ERRORS = (OSError, SafetensorError)  # safetensors reports a full disk as an error of its own


class Interrupted(Exception):
    """The run ended before its last step, and can be resumed. The message is one line."""


class StopSignals:
    """While entered, the first SIGTERM or SIGINT only sets `received`; a later one ends the process at once."""

    received: str | None = None

    def __enter__(self) -> StopSignals:
        self.previous = {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in no other
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) != signal.SIG_IGN:  # what a shell told its background jobs to ignore
                    self.previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: types.TracebackType | None) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def of_any_rank(self) -> str | None:
        """What a rank has received, the same on all of them, which have to call this together."""
        number = int(distributed.largest(signal.Signals[self.received] if self.received else 0))
        return signal.Signals(number).name if number else None

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self.received and "RANK" in os.environ and time.monotonic() - self.since < distributed.GRACE:
            return  # the first one again: a cluster signals all processes, and torchrun passes its own on
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received, self.since = signal.Signals(number).name, time.monotonic()
        console.print(f"{self.received}: the step is finished and saved; once more to leave at once")


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


def damage(folder: pathlib.Path) -> str | None:
    """What is wrong with a checkpoint's files, or None where they are as they were written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, digest in manifest.items():
            if file_digest(folder / name) != digest:
                return f"{name} differs from what was written"
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


class Checkpoints:
    """The checkpoints of one run: folders step-000120 of a model in Hugging Face layout and the trainer's state."""

    def __init__(self, folder: pathlib.Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def folder_of(self, step: int) -> pathlib.Path:
        return self.folder / f"step-{step:06d}"

    def all(self) -> list[pathlib.Path]:
        """Whole ones, oldest first."""
        return sorted(
            (path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)),
            key=lambda path: int(path.name.removeprefix("step-")),
        )

    def newest(self) -> pathlib.Path | None:
        """The newest undamaged one; damaged ones are reported and moved aside, unfinished ones removed.

        Raises ConfigError where all are damaged.
        """
        for unfinished in self.folder.glob("*.tmp"):
            shutil.rmtree(unfinished)
        damaged = {}
        for path in reversed(self.all()):
            reason = damage(path)
            if reason is None:
                self._set_aside(damaged)
                return path
            damaged[path] = reason
        if damaged:
            path, reason = next(iter(damaged.items()))
            raise ConfigError(f"{path} is damaged ({reason}), and no other is there: move the run aside to start again")
        return None

    def _set_aside(self, damaged: dict[pathlib.Path, str]) -> None:
        for path, reason in damaged.items():
            aside = path.with_name(path.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            console.print(f"[bold red]damaged[/] {path} ({reason}): moved to {aside.name}; an older one is used")

    def save(self, step: int, best_step: int | None, write: Callable[[pathlib.Path], None]) -> None:
        """Has a checkpoint written, then deletes those that need not stay. Raises one of WRITE_ERRORS."""
        with atomic_folder(self.folder_of(step)) as folder:
            write(folder)
            files = sorted(path for path in folder.rglob("*") if path.is_file())  # chat templates have a folder
            digests = {str(file.relative_to(folder)): file_digest(file) for file in files}
            (folder / MANIFEST).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
        for old in self.all()[: -self.keep]:
            if best_step is None or old != self.folder_of(best_step):
                # Half deleted, it must not look like a whole one.
                leaving = old.rename(old.with_name(old.name + ".tmp"))
                shutil.rmtree(leaving, ignore_errors=True)


def copy_model(folder: pathlib.Path, target: pathlib.Path) -> None:
    """Copies the files of a checkpoint's model, without the trainer's, into a new folder."""
    ignored = shutil.ignore_patterns(MANIFEST, STATE, TENSORS, OPTIMIZER)
    with atomic_folder(target) as temporary:
        shutil.copytree(folder, temporary, ignore=ignored, dirs_exist_ok=True)


def load(folder: pathlib.Path) -> tuple[dict[str, Tensor], dict]:
    """The trainer's own tensors and state."""
    return load_file(folder / TENSORS), json.loads((folder / STATE).read_text(encoding="utf-8"))


def by_rank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every rank's tensors of these names, for one file. All ranks have to call this together."""
    own = enumerate(distributed.gathered(tensors))
    return {f"{rank}.{name}": tensor for rank, tensors in own for name, tensor in tensors.items()}


def of_rank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's, of what `by_rank` gave; nothing where there were fewer ranks then."""
    own = f"{distributed.rank()}."
    return {name.removeprefix(own): tensor for name, tensor in tensors.items() if name.startswith(own)}


def random_state() -> tuple[dict[str, Tensor], dict]:
    """The state of every generator that a run may draw from: PyTorch's as tensors, Python's and NumPy's for JSON."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        tensors["cuda"] = torch.cuda.get_rng_state()
    name, keys, *rest = np.random.get_state()
    return tensors, {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}


def set_random_state(tensors: dict[str, Tensor], state: dict) -> None:
    if tensors:
        torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
