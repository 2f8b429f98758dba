"""Signals that end a command: SIGTERM, and SIGINT, which Ctrl-C sends."""

import contextlib
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator

from .errors import GRACE

INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again

Handler = Callable[[int, types.FrameType | None], None]


class Received:
    """The first signal that a command has received."""

    name: str | None = None

    def note(self, number: int) -> bool:
        """Notes a signal. False for the first one again: a cluster signals all processes, and torchrun passes it on."""
        if self.name is None:
            self.name, self.since = signal.Signals(number).name, time.monotonic()
            return True
        return "RANK" not in os.environ or time.monotonic() - self.since >= GRACE


_of_command: Received | None = None  # within `interruptible`


@contextlib.contextmanager
def interruptible() -> Iterator[Received]:
    """A context for a whole command. The first signal raises KeyboardInterrupt, a second one ends the process at once.

    Gives the first signal, for a library may make another error of the KeyboardInterrupt, or lose it: `StopSignals`
    then finds it. So does Python, where it comes in a finalizer or in the callback of a weak reference.
    """
    global _of_command
    received = _of_command = Received()

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        is_first = received.name is None
        if received.note(number):
            if not is_first:
                os._exit(INTERRUPTED)
            raise KeyboardInterrupt

    def report(lost: "sys.UnraisableHookArgs") -> None:
        if lost.exc_type is not KeyboardInterrupt:
            others(lost)

    previous, others = _install(interrupt), sys.unraisablehook
    sys.unraisablehook = report
    try:
        yield received
    finally:
        sys.unraisablehook = others
        _restore(previous)
        _of_command = None


class StopSignals:
    """A context in which the first signal only sets `received`. A later one ends the process at once."""

    def __init__(self) -> None:
        self._first = Received()

    @property
    def received(self) -> str | None:
        return self._first.name

    def __enter__(self) -> "StopSignals":
        self._first = _of_command or Received()
        self._previous = _install(self._handle)
        return self

    def __exit__(self, *error: types.TracebackType | None) -> None:
        _restore(self._previous)

    def of_any_rank(self) -> str | None:
        """The name of a signal that some rank has received, the same on all ranks; None if none has. Collective."""
        from . import distributed  # PyTorch, which a command's first lines do not wait for

        number = int(distributed.all_reduce_max(signal.Signals[self.received] if self.received else 0))
        return signal.Signals(number).name if number else None

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        from .console import console

        is_first = self.received is None
        if not self._first.note(number):
            return
        if not is_first:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        console.print(f"{self.received}: the step is finished and saved; a second signal ends the run at once")


def _install(handler: Handler) -> dict[int, Handler | int]:
    """Lets a function handle both signals. Returns their handlers before."""
    previous = {}
    if threading.current_thread() is threading.main_thread():  # Python allows handlers in this thread alone
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:  # a shell lets its background jobs ignore SIGINT
                previous[number] = signal.signal(number, handler)
    return previous


def _restore(previous: dict[int, Handler | int]) -> None:
    for number, handler in previous.items():
        signal.signal(number, handler)


def leave_at_once(status: int) -> None:
    """From here on a signal ends the process with the status that its work has."""
    _install(lambda *_: os._exit(status))
