"""Standard output and error: a command goes on where their file can't take a line, as on a full disk."""

import contextlib
import os
import sys
import typing
from collections.abc import Callable, Iterator

from .errors import Interrupted


class ForgivingStream:
    """A text stream that loses what its file can't take, and says so once, by another. All else is the stream's own."""

    def __init__(self, name: str, stream: typing.TextIO, other: typing.TextIO) -> None:
        self._name, self._stream, self._other = name, stream, other
        self.problem: str | None = None  # why something was lost

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, function: Callable, *arguments: str) -> None:
        try:
            function(*arguments)
        except OSError as error:  # no room, or nobody reads any more
            if self.problem is None:
                self.problem = f"{self._name} can't be written to ({error.strerror})"
                with contextlib.suppress(OSError):  # it may go to the same file
                    print(f"{self.problem}: lines are lost", file=self._other, flush=True)


@contextlib.contextmanager
def forgiving() -> Iterator[None]:
    """A context in which a line that can't be written is no error."""
    out, err = streams = sys.stdout, sys.stderr
    sys.stdout = ForgivingStream("standard output", out, err)
    sys.stderr = ForgivingStream("standard error", err, out)
    try:
        yield
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        sys.stdout, sys.stderr = streams


def check_printed() -> None:
    """For a command whose output is its result. Raises Interrupted where some of that is lost."""
    sys.stdout.flush()
    if problem := getattr(sys.stdout, "problem", None):
        raise Interrupted(f"{problem}: make room")


def flush() -> None:
    """Flushes both streams at the end. What can't be written is given up: Python would make an error of it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
