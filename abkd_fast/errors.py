"""Errors that end a command with one line."""

import contextlib
import difflib
import errno
import math
import os
import re
import typing

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
    errno.ENAMETOOLONG,
)
OF_RUST = re.compile(r"\(os error (\d+)\)|Os \{ code: (\d+)")  # in the text of what tokenizers and safetensors raise
OWN_CODE = "it has code of its own (auto_map), which is not run: give a model that transformers knows"
RESUME = "--resume (in Python resume=True)"
LONGEST = 2000  # characters of a line for people
GRACE = 5.0  # seconds: all processes of a run end within this time after the first one; one that doesn't counts as dead


class ConfigError(ValueError):
    """A value or a file of the user can't be used. The message is one line and says what to do.

    `key` is the dotted key that is wrong, if it is one key.
    """

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(printable(shortened(message)))
        self.key = key


def printable(text: str, kept: str = "") -> str:
    """The text with its control characters escaped, line ends too, but those in `kept`."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in text)


def shortened(text: str) -> str:
    """The beginning and the end of a line. A value of a user, which may be of any length, stands between them."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST * 3 // 4]} … {text[-LONGEST // 4 :]}"


def first_line(error: BaseException) -> str:
    """The first line of a library's error, for the message of a ConfigError.

    The next one is there, too, if the first ends in a colon, or if the next says what is available.
    """
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if "trust_remote_code" in str(error):  # not transformers' advice to run it
        return OWN_CODE
    if isinstance(error, KeyError):
        return f"it has no {error}"
    text = str(error)
    if (line := getattr(error, "lineno", None)) and "line" not in text:  # of a chat template
        text = f"line {line}: {text}"
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    goes_on = lines[0].endswith(":") or "available" in "".join(lines[1:2]).lower()
    text = printable(" ".join(lines[: 2 if goes_on else 1]))
    return text if len(text) <= 200 else f"{text[:199]}…"


@contextlib.contextmanager
def reading(problem: str, way_out: str = "", key: str = "") -> typing.Iterator[None]:
    """A context for a library's call that reads something of the user's. What it raises becomes a ConfigError.

    The message is "PROBLEM (the first line of the library's error)WAY_OUT", and that error is its cause. Libraries
    raise errors of any kind, so the block has no code of ours that could fail for a fault of its own.

    problem: what was read, and what it can't be used for.
    """
    try:
        yield
    except (ConfigError, Interrupted):
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # of libraries in Rust: it is no Exception
        if not is_panic and not isinstance(error, Exception):
            raise
        raise ConfigError(f"{problem} ({first_line(error)}){way_out}", key) from error


def origin(error: BaseException) -> BaseException:
    """The library's error behind a ConfigError, or the error itself."""
    while isinstance(error, ConfigError) and (behind := error.__cause__ or error.__context__):
        error = behind
    return error


DEPTH = 100  # deeper values would overflow the stack in what follows: they are copied, walked, hashed and written
TOO_DEEP = f"is nested more than {DEPTH} levels deep"
JSON_ERRORS = (ValueError, RecursionError)  # what `json` raises for text that it can't read


def is_deep(value: object) -> bool:
    """Whether a JSON value is nested more than DEPTH levels deep."""
    level = [value]
    for _ in range(DEPTH):
        containers = [part for part in level if isinstance(part, dict | list)]
        level = [part for one in containers for part in (one.values() if isinstance(one, dict) else one)]
    return any(isinstance(part, dict | list) for part in level)


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


def disk_error(error: Exception) -> OSError | None:
    """The error of the file system that an error is, or that a library has made another one of; None: it is none."""
    if isinstance(error, ConfigError | Interrupted | ConnectionError | TimeoutError):
        return None
    if isinstance(error, OSError):
        return error
    found = OF_RUST.search(str(error))
    return found and OSError(number := int(found[1] or found[2]), os.strerror(number))


@contextlib.contextmanager
def library_errors() -> typing.Iterator[None]:
    """A context in which every error of the file system is an OSError."""
    try:
        yield
    except Exception as error:
        if (cause := disk_error(error)) is None or cause is error:
            raise
        raise cause from error


@contextlib.contextmanager
def disk_errors(place: object = None, way_out: str = "") -> typing.Iterator[None]:
    """A context in which an error of the file system is one line: Interrupted where there is no room, or ConfigError.

    place: the file or folder that is written; then other errors of writing are Interrupted, too. None: anything is read
        or written, and errors that say nothing of a place stay as they are.
    way_out: what else one can do.
    """
    try:
        yield
    except Exception as error:
        cause = disk_error(error)
        if cause is None or (place is None and cause.errno not in (*NO_ROOM, *REFUSED)):
            raise
        where = place or cause.filename or "a file"
        reason = cause.strerror or str(cause)
        if cause.errno in REFUSED:
            way_out = way_out or "change its permissions, or choose another place"
            raise ConfigError(f"{where} can't be {'written' if place else 'used'} ({reason}): {way_out}") from None
        ways = ["make room"] * (cause.errno in NO_ROOM) + [way_out] * bool(way_out)
        raise Interrupted(f"{where} can't be written ({reason}): {'; '.join(ways) or 'try again'}") from None


@contextlib.contextmanager
def of_stage(name: str | None) -> typing.Iterator[None]:
    """A context whose errors name the stage of a recipe, once. None: the recipe has no stages."""
    try:
        with disk_errors():
            yield
    except (ConfigError, Interrupted, FloatingPointError) as error:
        is_named = any(f"{word}{name}:" in str(error) for word in ("stage ", "--set "))  # in the place of a key
        if name is not None and not is_named:
            error.args = (f"stage {name}: {error}",)
        raise
