"""All commands share this: exit statuses, error lines, and the line that says how to continue."""

import contextlib
import os
import pathlib
import shlex
import sys
import traceback
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator

from . import output
from .errors import ConfigError, Interrupted, disk_errors, origin, printable
from .signals import INTERRUPTED, interruptible, leave_at_once

MEETING_MINUTES = 1.0  # how long a process with a mistake waits for the others, to tell them


def run(
    command: str,
    make_parser: Callable[[], ArgumentParser],
    work: Callable[[Namespace], None],
    arguments: list[str] | None,
) -> int:
    """Parses a command's arguments, does its work, and returns the exit status. Prints in one line why it ends early.

    - 0: all is done.
    - 1: the loss or a gradient is not finite, or another process is lost.
    - 2: invalid input. With `--debug` the traceback of the library that has refused it comes first.
    - 75 (temporary failure): interrupted, or no room on the disk. The printed command continues the work, or starts it
      again if nothing was done.

    Args:
        command: the module's name in the package.
        make_parser: imports what the parser needs: a signal may come from the first line on.
        arguments: those of the command line (None: `sys.argv`).
    """
    arguments, options = sys.argv[1:] if arguments is None else arguments, Namespace()
    # Training and sampling finish their step first, see `StopSignals`.
    with output.forgiving(), interruptible() as signal:
        try:
            with _mistakes_told(), disk_errors():
                parser = make_parser()
                parser.prog = _as_typed(command)
                parser.add_argument("--debug", action="store_true", help="print the traceback behind an error, too")
                options = parser.parse_args(arguments)
                work(options)
        except (ConfigError, FloatingPointError, ConnectionError) as error:
            trace = "".join(traceback.format_exception(origin(error))) if getattr(options, "debug", False) else ""
            _print(f"{trace}error: {error}")
            return 2 if isinstance(error, ConfigError) else 1
        except (Exception, KeyboardInterrupt) as error:
            if signal.name is None and not isinstance(error, Interrupted | KeyboardInterrupt):
                raise
            reason = str(error) if isinstance(error, Interrupted) else ""
            _print(f"{reason or 'interrupted'}; continue with:\n{_again(command, options, arguments)}", "interrupted")
            return INTERRUPTED
    return 0


@contextlib.contextmanager
def _mistakes_told() -> Iterator[None]:
    """A context in which a mistake that a process finds before it has met the others becomes theirs, too."""
    try:
        yield
    except ConfigError as error:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        from . import processes

        if not processes.have_met():
            with contextlib.suppress(ConnectionError), processes.process_group(MEETING_MINUTES, mistake=error):
                pass
        raise


def _as_typed(command: str) -> str:
    """The words that started the command: the installed script's, the package's, or the module's."""
    name = pathlib.Path(sys.argv[0]).name
    if name.startswith("abkd-fast"):  # on Windows it ends in .exe
        return f"abkd-fast {command}"
    return f"python -m abkd_fast{' ' if name == '__main__.py' else '.'}{command}"


def _again(command: str, options: Namespace, arguments: list[str]) -> str:
    """The command line that continues the work."""
    start = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    if "RANK" not in os.environ:
        start = [sys.executable]
    words = [*start, "-m", f"abkd_fast.{command}", *arguments]
    if not getattr(options, "resume", True):
        words.append("--resume")
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    """A word for a shell. One with control characters is written with their escapes."""
    if word.isprintable():
        return shlex.quote(word)
    word = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{printable(word)}'"


def given_path(text: str) -> pathlib.Path:
    """The value of an option that is a path. An empty one, as of an unset variable of the shell, would be a folder."""
    if not text:
        raise ArgumentTypeError("is empty, expected a path")
    return pathlib.Path(text)


def leave(status: int) -> None:
    """Ends the process. One of several ends at once: threads of torch.distributed may abort an orderly end."""
    leave_at_once(status)
    output.flush()
    if "RANK" in os.environ:
        os._exit(status)
    sys.exit(status)


def _print(text: str, topic: str = "") -> None:
    """Prints to stderr; a line that several processes have is printed once."""
    local_rank, processes = os.environ.get("LOCAL_RANK", ""), sys.modules.get(f"{__package__}.processes")
    if processes is not None and processes.have_met():
        text = processes.tag_with_rank(text, topic)
    elif local_rank.isdecimal() and int(local_rank):  # before they have met, all of one machine have the same errors
        return
    if text is not None:
        print(printable(text, "\n"), file=sys.stderr)
