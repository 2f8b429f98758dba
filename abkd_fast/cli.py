"""All commands share this: exit statuses, error lines, and the line that says how to continue."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable

from .errors import ConfigError, Interrupted

INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again


def run(command: str, continuing: list[str], work: Callable[[], object]) -> int:
    """Does a command's work and returns the exit status. If it ends early, prints the reason in one line.

    - 0: all is done.
    - 1: the loss or a gradient is not finite, or another process is lost.
    - 2: invalid input.
    - 75 (temporary failure): interrupted, or no room on the disk. The printed command continues the work, or starts it
      again if nothing was done.

    Args:
        command: the module's name in the package.
        continuing: the arguments with which the same command continues.
    """
    try:
        work()
    except Interrupted as interruption:
        return _interrupted(str(interruption), command, continuing)
    except KeyboardInterrupt:  # while models load, above all; training and sampling handle signals themselves
        return _interrupted("interrupted", command, continuing)
    except ConfigError as error:
        return _failed(error, 2)
    except (FloatingPointError, ConnectionError) as error:
        return _failed(error, 1)
    return 0


def _failed(error: Exception, status: int) -> int:
    _print(f"error: {error}")
    return status


def _interrupted(reason: str, command: str, continuing: list[str]) -> int:
    start = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    if "RANK" not in os.environ:
        start = [sys.executable]
    _print(
        f"{reason}; continue with:\n{shlex.join([*start, '-m', f'abkd_fast.{command}', *continuing])}", "interrupted"
    )
    return INTERRUPTED


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
