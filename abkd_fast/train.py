"""Trains: `python -m abkd_fast.train --config RECIPE [--set key=value …] [--resume]`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys

from .config.recipe import load
from .config.schema import ConfigError, describe

INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again
RECIPE_KEYS = """\
A recipe is a JSON object with the keys of a configuration, and:
  base       another recipe, a packaged one or a file beside this one, that this one only adds to or changes
  stages     {NAME: {keys that differ in this stage}, ...}, trained one after the other
  comment    for people
A null takes away what the base has: a key, a section, or a stage.
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs a recipe, in as many processes as torchrun started; returns the exit status.

    0; 1: the loss or a gradient is not finite, or another process is lost; 2: a mistake in the input; 75 (temporary
    failure): interrupted, and the printed command continues (from the start, where nothing had been trained).
    """
    parser = argparse.ArgumentParser(
        prog="python -m abkd_fast.train",
        description="Distil or fine-tune a language model.",
        epilog="\n".join([RECIPE_KEYS, "keys of a configuration, with [defaults]:\n", *describe()]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="RECIPE", help="a JSON file or a packaged recipe's name")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a value, for example optim.lr=1e-4; abkd:train.steps=50 changes the stage abkd alone, and "
        "is the way to change what a stage sets itself",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue an interrupted run from its newest checkpoint, to the same bits"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the configuration in force, the data in numbers, steps, memory and cache, and train nothing",
    )
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    continuing = arguments if options.resume else [*arguments, "--resume"]
    try:
        stages = load(options.config, options.overrides)
        from . import distributed  # after the configuration is known to be good: this loads PyTorch
        from .pipeline import plan, run
        from .training.checkpoint import Interrupted

        try:
            with distributed.processes(stages[0].train.timeout_minutes):
                (plan if options.dry_run else run)(stages, options.resume or distributed.is_restarted())
        except Interrupted as interruption:
            return interrupted(str(interruption), "train", continuing)
    except KeyboardInterrupt:  # outside of the loop, which handles signals itself: while models load, above all
        return interrupted("interrupted", "train", continuing)
    except ConfigError as error:
        return failed(error, 2)
    except (FloatingPointError, ConnectionError) as error:
        return failed(error, 1)
    return 0


def failed(error: Exception | str, status: int) -> int:
    """Prints an error, once though several processes may have it; returns the exit status."""
    _print(f"error: {error}")
    return status


def interrupted(reason: str, command: str, arguments: list[str]) -> int:
    """Prints the command that continues; returns the exit status."""
    start = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    if "RANK" not in os.environ:
        start = [sys.executable]
    _print(f"{reason}; continue with:\n{shlex.join([*start, '-m', f'abkd_fast.{command}', *arguments])}", "interrupted")
    return INTERRUPTED


def leave(status: int) -> None:
    """Ends the process; one of several at once, since threads of torch.distributed may abort an orderly end."""
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _print(text: str, topic: str = "") -> None:
    if "RANK" in os.environ:
        from . import distributed

        text = distributed.attributed(text, topic)
    if text is not None:
        print(text, file=sys.stderr)


if __name__ == "__main__":
    leave(main())
