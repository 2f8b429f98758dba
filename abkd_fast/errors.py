"""Errors that end a command with one line."""

import contextlib
import difflib
import math
import typing

GRACE = 5.0  # seconds: all processes of a run end within this time after the first one; one that doesn't counts as dead


class ConfigError(ValueError):
    """A value or a file of the user can't be used. The message is one line and says what to do.

    `key` is the dotted key that is wrong, if it is one key.
    """

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(printable(message))
        self.key = key


def printable(text: str) -> str:
    """The text in one line. Text of a user may hold any character, line ends too."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_line(error: Exception) -> str:
    """The first line of a library's error, for the message of a ConfigError. One that ends in a colon has the next."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    return text if len(text) <= 200 else f"{text[:199]}…"


def nearest(name: str, valid: typing.Iterable[str]) -> str:
    """A hint for a message: the valid name that is most similar, or else all valid names."""
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; valid are {', '.join(valid)}"


def check_number(name: str, value: float | None, low: float, high: float = math.inf) -> None:
    """Raises ConfigError for a number below or above its range. None is always in range."""
    if value is not None and not low <= value <= high:
        limit = "" if high == math.inf else f" and at most {high:g}"
        raise ConfigError(f"{name} is {value}, expected at least {low}{limit}", name)


class Interrupted(Exception):
    """The run has ended before its last step and can be resumed. The message is one line."""


@contextlib.contextmanager
def of_stage(name: str | None) -> typing.Iterator[None]:
    """A context whose errors name the stage of a recipe, once. None: the recipe has no stages."""
    try:
        yield
    except (ConfigError, Interrupted, FloatingPointError) as error:
        is_named = any(f"{word}{name}:" in str(error) for word in ("stage ", "--set "))  # in the place of a key
        if name is not None and not is_named:
            error.args = (f"stage {name}: {error}",)
        raise
