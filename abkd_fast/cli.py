"""All commands share this: exit statuses, error lines, and the command that continues a run."""

from __future__ import annotations

import os
import shlex
import sys

INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again


def failed(error: Exception | str, status: int) -> int:
    """Prints an error, once even if several processes have it. Returns the exit status."""
    _print(f"error: {error}")
    return status


def interrupted(reason: str, command: str, arguments: list[str]) -> int:
    """Prints the command that continues the run. Returns the exit status."""
    start = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    if "RANK" not in os.environ:
        start = [sys.executable]
    _print(f"{reason}; continue with:\n{shlex.join([*start, '-m', f'abkd_fast.{command}', *arguments])}", "interrupted")
    return INTERRUPTED


def leave(status: int) -> None:
    """Ends the process. One of several ends at once: threads of torch.distributed may abort an orderly exit."""
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _print(text: str, topic: str = "") -> None:
    if "RANK" in os.environ:
        from . import distributed

        text = distributed.tag_with_rank(text, topic)
    if text is not None:
        print(text, file=sys.stderr)
