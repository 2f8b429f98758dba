"""JSON of people: one value at a time, and one line that says why a value can't be used."""

import json
import re
import sys

from ..errors import DEPTH, TOO_DEEP, ConfigError, is_deep

SPACE = re.compile(r"[ \t\n\r]*")
HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # only such an escape can make half of a surrogate pair


def parse(text: str) -> object:
    """The value of a whole text. Raises ConfigError, with the reason alone."""
    value, end = parse_at(text, SPACE.match(text).end())
    if SPACE.match(text, end).end() < len(text):
        raise ConfigError("broken JSON: Extra data")
    return value


def parse_at(text: str, start: int) -> tuple[object, int]:
    """The value that begins at `start`, and the place where it ends. Raises ConfigError; see `BadValue`, too."""
    twice: list[str] = []

    def make(pairs: list[tuple[str, object]]) -> dict:
        if len(values := dict(pairs)) < len(pairs):
            keys = [key for key, _ in pairs]
            twice.append(next(key for key in keys if keys.count(key) > 1))
        return values

    try:
        value, end = json.JSONDecoder(object_pairs_hook=make).raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise ConfigError(f"broken JSON: {error.msg}") from None
    except RecursionError:
        raise ConfigError(f"broken JSON: {TOO_DEEP}") from None
    except ValueError:  # Python reads no longer numbers
        raise ConfigError(
            f"broken JSON: has a whole number of more than {sys.get_int_max_str_digits():,} digits"
        ) from None
    if twice:
        raise BadValue(f'has the key "{twice[0][:60]}" twice', end)
    if text.count("[", start, end) + text.count("{", start, end) > DEPTH and is_deep(value):
        raise BadValue(f"broken JSON: {TOO_DEEP}", end)
    if HALF_PAIR.search(text, start, end):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadValue("has half of a surrogate pair, which no text has", end) from None
    return value, end


class BadValue(ConfigError):
    """A value that is well-formed, and can't be used. What follows `end` can be read."""

    def __init__(self, message: str, end: int) -> None:
        super().__init__(message)
        self.end = end


def show(value: object) -> str:
    """The beginning of a value, for a message."""
    return json.dumps(value, ensure_ascii=False, default=repr)[:60]
