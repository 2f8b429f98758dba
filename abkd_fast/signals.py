"""Signals that stop a run."""

import contextlib
import os
import signal
import threading
import time
import types
from collections.abc import Iterator

from . import distributed
from .console import console


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """A context in which SIGTERM raises KeyboardInterrupt, as SIGINT does: for work that loses little by it."""
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers in this thread alone
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class StopSignals:
    """A context in which the first SIGTERM or SIGINT only sets `received`. A later one ends the process at once."""

    received: str | None = None

    def __enter__(self) -> "StopSignals":
        self.previous = {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in this thread alone
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) != signal.SIG_IGN:  # a shell lets its background jobs ignore SIGINT
                    self.previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: types.TracebackType | None) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def of_any_rank(self) -> str | None:
        """The name of a signal that some rank has received, the same on all ranks; None if none has. Collective."""
        number = int(distributed.all_reduce_max(signal.Signals[self.received] if self.received else 0))
        return signal.Signals(number).name if number else None

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self.received and "RANK" in os.environ and time.monotonic() - self.since < distributed.GRACE:
            return  # the first one again: a cluster signals all processes, and torchrun passes its signal on to them
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received, self.since = signal.Signals(number).name, time.monotonic()
        console.print(f"{self.received}: the step is finished and saved; a second signal ends the run at once")
