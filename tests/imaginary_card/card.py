"""What the imaginary card was asked to do: launches, and who waited for it. Needs a process that `run` has started."""

import collections
import contextlib
import ctypes
import functools
import os
import subprocess
import traceback
from collections.abc import Iterator

import torch

SHIM = ctypes.CDLL(None)
if not hasattr(SHIM, "card_launches"):
    import pytest

    pytest.skip("needs the imaginary card: tests/imaginary_card/run", allow_module_level=True)


class Launch(ctypes.Structure):
    """A struct of shim/card.h."""

    _fields_ = [
        ("name", ctypes.c_char * 512),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_size_t),  # bytes of dynamic shared memory
        ("stream", ctypes.c_void_p),
        ("captured", ctypes.c_int),
    ]


_Wait = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)
SHIM.card_launches.restype = ctypes.c_size_t
SHIM.card_launch_at.restype = ctypes.POINTER(Launch)
SHIM.card_launch_at.argtypes = [ctypes.c_size_t]
SHIM.card_on_wait.argtypes = [_Wait]
SHIM.card_run_row_kernels.argtypes = [ctypes.c_void_p]
torch.backends.cuda.enable_cudnn_sdp(False)  # the card has no cuDNN: PyTorch takes its next choice


def count_launches() -> int:
    return SHIM.card_launches()


def launches(first: int = 0) -> list[Launch]:
    """The launches from number `first`. The newest 65,536 are kept."""
    return [SHIM.card_launch_at(i).contents for i in range(first, count_launches())]


@functools.cache
def _row_kernel() -> int:
    library = ctypes.CDLL(os.environ["CARD_ROWS"])
    return ctypes.cast(library.run_row_kernel, ctypes.c_void_p).value


def run_row_kernels(yes: bool) -> None:
    """Whether launches of our row kernels compute: the emulator then runs the device's code."""
    SHIM.card_run_row_kernels(_row_kernel() if yes else None)


def run_child(*command: str, **environment: str) -> str:
    """Runs a program on the card. Returns its standard output."""
    variables = {**os.environ, **environment}
    process = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


# ---- who waits for the device

waits: collections.Counter[str] = collections.Counter()


def note_wait(what: str) -> None:
    """Counts a wait under its kind and its place: our innermost lines, or else others'."""
    stack = [frame for frame in traceback.extract_stack() if "imaginary_card" not in frame.filename]
    ours = [f"{x.filename.rpartition('/')[2]}:{x.lineno} {x.name}" for x in stack if "abkd_fast/" in x.filename]
    others = [f"{x.filename.rpartition('site-packages/')[2]}:{x.lineno}" for x in stack]
    waits[f"{what} | {' < '.join((ours or others)[:-4:-1])}"] += 1


@_Wait
def _waited(what, stream, size):
    note_wait(what.decode())


@contextlib.contextmanager
def watch_waits() -> Iterator[collections.Counter[str]]:
    """Counts what makes the host wait for the device."""
    waits.clear()
    SHIM.card_on_wait(_waited)
    try:
        yield waits
    finally:
        SHIM.card_on_wait(ctypes.cast(None, _Wait))
