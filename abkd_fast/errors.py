"""Errors that end a command with one line."""

from __future__ import annotations

import difflib
import math
import typing


class ConfigError(ValueError):
    """Something the user wrote, or pointed to, can't be used. The message is one line and says what to do.

    `key` is the dotted key at fault, where it is one key's.
    """

    def __init__(self, message: str, key: str = "") -> None:
        # What users wrote may hold any character.
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))
        self.key = key


def check_range(name: str, value: float | None, low: float, high: float = math.inf, *, is_open: bool = False) -> None:
    """Raises ConfigError for a number below `low` (or at it, if the range is open) or above `high`. None is allowed."""
    if value is not None and not (low < value <= high if is_open else low <= value <= high):
        bound = f"above {low}" if is_open else f"at least {low}"
        limit = "" if high == math.inf else f" and at most {high:g}"
        raise ConfigError(f"{name} is {value}, expected {bound}{limit}", name)


def first_line(error: Exception) -> str:
    """What a library's error says, for a ConfigError."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def nearest(name: str, valid: typing.Iterable[str]) -> str:
    """A hint for a message: the valid name that was probably meant, or else all of them."""
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; valid are {', '.join(valid)}"


class Interrupted(Exception):
    """The run ended before its last step, and can be resumed. The message is one line."""
