"""States of teachers: `python -m abkd_fast.cache --config RECIPE [--set key=value …]` builds them; lists, clears."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import shlex
import time
from typing import TYPE_CHECKING

from .cli import given_path, leave, run
from .errors import ConfigError, of_stage
from .output import check_printed

if TYPE_CHECKING:
    from .config.schema import Config
    from .teacher.store import HiddenStateStore


def main(arguments: list[str] | None = None) -> int:
    """Builds states in the processes that torchrun started, or in this one; returns the exit status (see `cli.run`)."""
    return run("cache", _parser, _work, arguments)


def _work(options: argparse.Namespace) -> None:
    if options.config is not None:
        _build(options)
        return
    if options.overrides or options.stage:
        _parser().error("--set and --stage change a recipe: give them with --config")
    if options.dir is not None and not (options.list or options.clear is not None):
        _parser().error("--dir is for --list and --clear; a recipe has cache.dir")
    from .console import ProgressBar, console  # not before the arguments are parsed: these load PyTorch
    from .files import cache_folder
    from .teacher import housekeeping
    from .teacher.folder import StatesFolder

    if options.list or options.clear is not None:
        root = options.dir or cache_folder()
        lines = housekeeping.describe(root) if options.list else housekeeping.clear(root, options.clear)
        for line in lines:
            console.print(line)
        check_printed()
        return
    if options.info is not None:
        for line in StatesFolder(options.info, "info").describe():
            console.print(line)
        check_printed()
        return
    folder, started = StatesFolder(options.verify, "verify"), time.perf_counter()
    with ProgressBar("blocks checked") as bar:
        folder.verify(bar.track(range(len(folder.checksums))))
    console.print(f"{options.verify} is complete and undamaged, {time.perf_counter() - started:.1f} s")


def _build(options: argparse.Namespace) -> None:
    from .config.recipe import load

    stages = load(options.config, options.overrides)
    from . import distributed, processes  # not before the configuration is checked: this loads PyTorch

    values = {config.run.stage or "recipe": config.to_dict() for config in stages} | {"--stage": options.stage}
    with processes.process_group(stages[0].train.timeout_minutes, values):
        config = _taught_stage(stages, options.stage)
        started = time.perf_counter()
        with of_stage(config.run.stage):
            models = [key for key, teacher in config.all_teachers.items() if teacher.path or teacher.config]
            if not models:
                raise ConfigError("teacher: there is no model whose states could be computed; give teacher.path")
            _training_command(options, config, dict.fromkeys(models, "states"))  # what it refuses, it refuses now
            folders = {key: file.folder for key, file in _states(config).items()}
        distributed.run_on_rank0(_report, options, config, folders, time.perf_counter() - started)


def _taught_stage(stages: list[Config], name: str | None) -> Config:
    """The named stage, or the last one that has a teacher, as it is before earlier stages have run.

    Its student is their result where that is there, and else what they start from: the tokens are the same.

    Raises ConfigError where there is no such stage, or no result of the stage that trains the teacher or writes the
    rows.
    """
    from .finished import check_result
    from .stages import as_begun, resolve

    taught = [config for config in stages if config.is_taught]
    names = [config.run.stage for config in taught]
    if name is not None and stages[0].run.stage is None:
        raise ConfigError(f"--stage {name}: the recipe has no stages; leave --stage out")
    if not taught or (name is not None and name not in names):
        which, known = "the recipe" if name is None else f"stage {name}", ", ".join(filter(None, names)) or "none"
        raise ConfigError(f"{which} has no teacher whose states could be built; stages with one: {known}")
    chosen, students = taught[-1] if name is None else taught[names.index(name)], {}
    for config in stages[: 1 + stages.index(chosen)]:
        students[config.run.stage] = as_begun(config.student, students)
    resolved = resolve(chosen)
    for role, teacher in chosen.all_teachers.items():
        for key, stage in teacher.stages.items():
            if not pathlib.Path(getattr(resolved.all_teachers[role], key)).exists():
                raise ConfigError(f"{role}.{key}: stage:{stage} has no result yet; train that stage first")
            check_result(chosen.run.root / stage)
    if chosen.data.stage and not pathlib.Path(resolved.data.train).exists():
        raise ConfigError(f"data.train: {chosen.data.train} has no rows yet; run that stage first")
    if all(pathlib.Path(getattr(resolved.student, key)).exists() for key in chosen.student.stages):
        return resolved
    return dataclasses.replace(resolved, student=students[chosen.run.stage])


def _states(config: Config) -> dict[str, HiddenStateStore]:
    """The complete states of each teacher of a configuration that is a model, by its key."""
    from . import distributed
    from .console import console
    from .teacher.cache import OR_OFF
    from .teacher.origin import date_note
    from .training.trainer import Trainer

    cache, log = dataclasses.replace(config.cache, mode="disk"), dataclasses.replace(config.log, wandb=None)
    train = dataclasses.replace(config.train, batch_size=distributed.world_size())  # one that any data and ranks allow
    config = dataclasses.replace(config, cache=cache, log=log, train=train)
    try:
        trainer = Trainer(config, resume=True)  # a run's folder plays no part
        caches = trainer.teachers.caches
        if not all(cache.samples for cache in caches.values()):
            raise ConfigError(f'method "{config.method}" trains on no response of the data: there is nothing to build')
        for note in {date_note(config.of_teacher(key), key, trainer.tokenizer) for key in caches} - {None}:
            console.print(note)
        trainer.build_teachers(reserved=0)
    except ConfigError as error:  # a run could do without the states, this command can't
        raise ConfigError(str(error).replace(OR_OFF, ""), error.key) from None
    return {key: cache.file for key, cache in caches.items() if config.all_teachers[key].hidden_states is None}


def _report(options: argparse.Namespace, config: Config, folders: dict[str, pathlib.Path], seconds: float) -> None:
    from .console import console
    from .teacher.folder import StatesFolder

    for key, folder in folders.items():
        if config.teachers:
            console.print(key)
        for line in StatesFolder(str(folder), "cache").describe():
            console.print(line)
        took = f", in {seconds:.1f} s altogether" if key == [*folders][-1] else ""
        console.print(f"folder       {folder}{took}")
    if config.asks_in_training:
        problem = f"method {config.method} also asks the teacher about responses that are written in training"
        console.print(f"{problem}: its runs need the teacher, and find these states as their cache")
    console.print(f"to train     {_training_command(options, config, folders)}")


def _training_command(options: argparse.Namespace, config: Config, folders: dict[str, str | pathlib.Path]) -> str:
    """The command that trains from folders of states, by the teachers' keys. Raises ConfigError if it is refused.

    A method that asks the teacher in training keeps the teacher.
    """
    from .config import models, recipe

    stage, settings = f"{config.run.stage}:" if config.run.stage else "", [*options.overrides]
    for key, folder in folders.items() if not config.asks_in_training else ():
        values = vars(config.all_teachers[key]).items()
        given = [name for name, value in values if value is not None and name not in models.PROMPT_KEYS]
        keys = [*(f"{name}=null" for name in given), f"hidden_states={pathlib.Path(folder).absolute()}"]
        settings += [f"{stage}{key}.{each}" for each in keys]
    if config.cache.mode == "off":
        settings.append(f"{stage}cache.mode=auto")
    recipe.load(options.config, settings)
    words = ["--config", options.config, *(word for each in settings for word in ("--set", each))]
    return f"python -m abkd_fast.train {shlex.join(words)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compute a teacher's hidden states for the data of a recipe, without training. A run on any "
        "machine trains from the folder (teacher.hidden_states). An interrupted build continues where it ended.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--config", metavar="RECIPE", help="builds the states: a JSON or YAML file, or a packaged recipe's name"
    )
    what.add_argument("--verify", metavar="FOLDER", help="reads everything in a folder of states, checks all checksums")
    what.add_argument("--info", metavar="FOLDER", help="prints what a folder of states holds")
    what.add_argument("--list", action="store_true", help="prints the caches of this machine, and what they take")
    what.add_argument("--clear", nargs="*", metavar="NAME", help="removes caches by their names in --list, or all")
    text = "folder of caches for --list and --clear (default: $ABKD_CACHE, or abkd_fast in the user's caches)"
    parser.add_argument("--dir", type=given_path, help=text)
    text = "override a value of the recipe, for example data.train=rows.jsonl or cache.dtype=float8"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=text)
    parser.add_argument("--stage", metavar="NAME", help="stage of the recipe (default: the last one with a teacher)")
    return parser


if __name__ == "__main__":
    leave(main())
