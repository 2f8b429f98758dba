"""Trains: `python -m abkd_fast.train --config RECIPE [--set key=value …] [--resume]`."""

from __future__ import annotations

import argparse
import shlex
import sys

from .config import ConfigError, describe, load

INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again


def main(arguments: list[str] | None = None) -> int:
    """Runs a recipe; returns the exit status.

    0; 1: the loss or a gradient is not finite; 2: a mistake in the input; 75 (temporary failure): interrupted, and the
    printed command continues.
    """
    parser = argparse.ArgumentParser(
        prog="python -m abkd_fast.train",
        description="Distil or fine-tune a language model.",
        epilog="\n".join(["keys of a configuration, with [defaults]:\n", *describe()]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="RECIPE", help="a JSON file or a packaged recipe's name")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a value, for example optim.lr=1e-4; distil:train.steps=50 changes the stage distil alone, and "
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
            command = [sys.executable, "-m", "abkd_fast.train", *arguments, *([] if options.resume else ["--resume"])]
            print(f"{interruption}; continue with:\n{shlex.join(command)}", file=sys.stderr)
            return INTERRUPTED
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
