"""All commands share this: exit statuses, error lines, and the line that says how to continue."""

import os
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

from .errors import ConfigError, Interrupted

INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again


def run(command: str, parser: ArgumentParser, work: Callable[[Namespace], None], arguments: list[str] | None) -> int:
    """Parses a command's arguments, does its work, and returns the exit status. Prints in one line why it ends early.

    - 0: all is done.
    - 1: the loss or a gradient is not finite, or another process is lost.
    - 2: invalid input.
    - 75 (temporary failure): interrupted, or no room on the disk. The printed command continues the work, or starts it
      again if nothing was done.

    Args:
        command: the module's name in the package.
        arguments: those of the command line (None: `sys.argv`).
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    try:
        work(options)
    except (Interrupted, KeyboardInterrupt) as error:  # training and sampling handle signals themselves
        start = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
        if "RANK" not in os.environ:
            start = [sys.executable]
        again = [*start, "-m", f"abkd_fast.{command}", *arguments]
        if not getattr(options, "resume", True):
            again.append("--resume")
        _print(f"{str(error) or 'interrupted'}; continue with:\n{shlex.join(again)}", "interrupted")
        return INTERRUPTED
    except (ConfigError, FloatingPointError, ConnectionError) as error:
        _print(f"error: {error}")
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def leave(status: int) -> None:
    """Ends the process. One of several ends at once: threads of torch.distributed may abort an orderly end."""
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _print(text: str, topic: str = "") -> None:
    """Prints to stderr; a line that several processes have is printed once."""
    if "RANK" in os.environ:
        from . import distributed

        text = distributed.tag_with_rank(text, topic)
    if text is not None:
        print(text, file=sys.stderr)
