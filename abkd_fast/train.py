"""Trains: `python -m abkd_fast.train --config RECIPE [--set key=value …] [--resume]`."""

from __future__ import annotations

import argparse
import sys

from .cli import failed, interrupted, leave
from .config.help import describe
from .config.recipe import load
from .errors import ConfigError

RECIPE_KEYS = """\
A recipe is a JSON object with the keys of a configuration, and:
  base       a packaged recipe or a file beside this one; this recipe states only what is different
  stages     {NAME: {keys that are different in this stage}, ...}; they run one after the other
  comment    text for people
A null removes a key, a section or a stage of the base.
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs a recipe in the processes that torchrun has started, or in this one.

    Returns the exit status: 0 if done, 1 if the loss or a gradient is not finite or another process is lost, 2 for
    invalid input, 75 (temporary failure) if interrupted. The printed command continues the run, or starts it again if
    nothing was trained.
    """
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
        help="override a value, for example optim.lr=1e-4; abkd:train.steps=50 changes only the stage abkd, and also "
        "values that the stage sets itself",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted run from its newest checkpoint; the result is the same to the bit",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print configuration, data, steps, memory and cache of each stage, and train nothing",
    )
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    continuing = arguments if options.resume else [*arguments, "--resume"]
    try:
        stages = load(options.config, options.overrides)
        from . import distributed  # not before the configuration is checked: this loads PyTorch
        from .errors import Interrupted
        from .pipeline import plan, run

        try:
            with distributed.process_group(stages[0].train.timeout_minutes):
                (plan if options.dry_run else run)(stages, options.resume or distributed.is_restarted())
        except Interrupted as interruption:
            return interrupted(str(interruption), "train", continuing)
    except KeyboardInterrupt:  # outside of the training loop, which handles signals itself; above all while models load
        return interrupted("interrupted", "train", continuing)
    except ConfigError as error:
        return failed(error, 2)
    except (FloatingPointError, ConnectionError) as error:
        return failed(error, 1)
    return 0


if __name__ == "__main__":
    leave(main())
