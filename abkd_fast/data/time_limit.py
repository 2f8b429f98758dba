"""A limit for programs that come with a model or with data, such as chat templates."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

LOOK = 0.1  # seconds between two looks at the time


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in a block that computes for longer. Only this thread's own computing counts.

    A timer's signal interrupts Python code anywhere. Python allows it in the main thread alone, where all commands
    render their rows; in other threads there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    started = time.thread_time()

    def look(*_: object) -> None:
        if time.thread_time() - started > seconds:
            raise TimeoutError(f"it computes for more than {seconds:g} s: has it an endless loop?")

    handler = signal.signal(signal.SIGALRM, look)
    timer = signal.setitimer(signal.ITIMER_REAL, LOOK, LOOK)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
