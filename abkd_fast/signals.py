"""Stop signals."""

from __future__ import annotations

import os
import signal
import threading
import time
import types

from . import distributed
from .console import console


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
        number = int(distributed.all_reduce_max(signal.Signals[self.received] if self.received else 0))
        return signal.Signals(number).name if number else None

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self.received and "RANK" in os.environ and time.monotonic() - self.since < distributed.GRACE:
            return  # the first one again: a cluster signals all processes, and torchrun passes its own on
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received, self.since = signal.Signals(number).name, time.monotonic()
        console.print(f"{self.received}: the step is finished and saved; once more to leave at once")
