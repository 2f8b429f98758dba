"""Trains: `python -m abkd_fast.train --config RECIPE [--set key=value …]`."""

from __future__ import annotations

import argparse
import sys

from .config import ConfigError, describe, load


def main(arguments: list[str] | None = None) -> int:
    """Runs a recipe; returns the exit status: 0, 2 for a mistake in the input, 1 for a loss that diverged."""
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
    options = parser.parse_args(arguments)
    try:
        stages = load(options.config, options.overrides)
        from .stages import run  # after the configuration is known to be good: this loads PyTorch

        run(stages)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
