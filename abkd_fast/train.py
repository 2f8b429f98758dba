"""Trains: `python -m abkd_fast.train --config RECIPE [--set key=value …] [--resume]`."""

from __future__ import annotations

import argparse
import shlex
import sys

from .config import ConfigError, describe
from .recipe import load

INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again
RECIPE_KEYS = """\
A recipe is a JSON object with the keys of a configuration, and:
  base       another recipe, a packaged one or a file beside this one, that this one only adds to or changes
  stages     {NAME: {keys that differ in this stage}, ...}, trained one after the other
  comment    for people
A null takes away what the base has: a key, a section, or a stage.
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs a recipe; returns the exit status.

    0; 1: the loss or a gradient is not finite; 2: a mistake in the input; 75 (temporary failure): interrupted, and the
    printed command continues (from the start, where nothing had been trained).
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
    try:
        stages = load(options.config, options.overrides)
        from .checkpoint import Interrupted  # after the configuration is known to be good: this loads PyTorch
        from .stages import plan, run

        try:
            (plan if options.dry_run else run)(stages, options.resume)
        except Interrupted as interruption:
            return _interrupted(str(interruption), arguments)
    except KeyboardInterrupt:  # outside of the loop, which handles signals itself: while models load, above all
        return _interrupted("interrupted", arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _interrupted(reason: str, arguments: list[str]) -> int:
    """Prints the command that continues."""
    command = [sys.executable, "-m", "abkd_fast.train", *arguments, *([] if "--resume" in arguments else ["--resume"])]
    print(f"{reason}; continue with:\n{shlex.join(command)}", file=sys.stderr)
    return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
