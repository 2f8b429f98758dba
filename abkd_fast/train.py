"""Trains: `python -m abkd_fast.train --config RECIPE [--set key=value …] [--resume]`."""

from __future__ import annotations

import argparse
import sys

from .cli import leave, run
from .config.help import describe
from .config.recipe import load

RECIPE_KEYS = """\
A recipe is a JSON object with the keys of a configuration, and:
  base       another recipe, a packaged one or a file beside this one, that this one only adds to or changes
  stages     {NAME: {keys that differ in this stage}, ...}, trained one after the other
  comment    for people
A null takes away what the base has: a key, a section, or a stage.
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs a recipe, in as many processes as torchrun started; returns the exit status (see `cli.run`)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    continuing = arguments if options.resume else [*arguments, "--resume"]
    return run("train", continuing, lambda: _train(options))


def _train(options: argparse.Namespace) -> None:
    stages = load(options.config, options.overrides)
    from . import distributed, pipeline  # after the configuration is known to be good: this loads PyTorch

    with distributed.process_group(stages[0].train.timeout_minutes):
        work = pipeline.plan if options.dry_run else pipeline.run
        work(stages, options.resume or distributed.is_restarted())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m abkd_fast.train",
        description="Distill or fine-tune a language model.",
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
    return parser


if __name__ == "__main__":
    leave(main())
