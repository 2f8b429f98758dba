"""Trains: `python -m abkd_fast.train --config RECIPE [--set key=value …] [--resume]`."""

import argparse

from .cli import leave, run
from .output import check_printed

RECIPE_KEYS = """\
A recipe is a JSON object, or a mapping in YAML, with the keys of a configuration, and:
  base       a packaged recipe or a file beside this one; this recipe states only what is different
  stages     {NAME: {keys that are different in this stage}, ...}; they run one after the other
  comment    text for people
A null removes a key, a section or a stage of the base.
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs a recipe in the processes that torchrun started, or in this one; returns the exit status (see `cli.run`)."""
    return run("train", _parser, _train, arguments)


def _train(options: argparse.Namespace) -> None:
    from .config.recipe import load

    stages = load(options.config, options.overrides)
    if options.show_rows is None:
        from .console import console

        names = ", ".join(filter(None, (config.run.stage for config in stages)))
        console.print(f"{options.config}{f', stages {names}' if names else ''}: loading PyTorch")
    from . import pipeline, processes  # not before the configuration is checked: this loads PyTorch

    if options.show_rows is not None:
        pipeline.show_rows(stages, options.show_rows)
        check_printed()
        return
    values = {config.run.stage or "recipe": config.to_dict() for config in stages}
    values |= {"--resume": options.resume, "--dry-run": options.dry_run}
    with processes.process_group(stages[0].train.timeout_minutes, values):
        resume = options.resume or processes.is_restarted()
        if options.dry_run:
            pipeline.plan(stages, resume, options.verbose)
            check_printed()
        else:
            pipeline.run(stages, resume)


def _parser() -> argparse.ArgumentParser:
    from .config.options import describe

    parser = argparse.ArgumentParser(
        description="Distill or fine-tune a language model.",
        epilog="\n".join([RECIPE_KEYS, "keys of a configuration, with [defaults]:\n", *describe()]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="RECIPE", help="a JSON or YAML file, or a packaged recipe's name")
    text = (
        "override a value, for example optim.lr=1e-4; abkd:train.steps=50 changes only the stage abkd, and also "
        "values that the stage sets itself"
    )
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=text)
    text = "continue an interrupted run from its newest checkpoint; the result is the same to the bit"
    add("--resume", action="store_true", help=text)
    text = "print data, steps, memory and cache of each stage, and train nothing"
    add("--dry-run", action="store_true", help=text)
    add("--verbose", action="store_true", help="with --dry-run: also print each stage's whole configuration")
    text = (
        "print the first N rows of data.train as the model sees them, one JSON object a line (in color on a terminal): "
        "text, trained parts, numbers of tokens; no weights are read"
    )
    add("--show-rows", metavar="N", type=int, help=text)
    return parser


if __name__ == "__main__":
    leave(main())
