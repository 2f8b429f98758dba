"""Builds a teacher's states: `python -m abkd_fast.cache --config RECIPE [--set key=value …]`; checks and shows them."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import shlex
import time
from typing import TYPE_CHECKING

from .cli import leave, run
from .config.methods import WITHOUT_TEACHER
from .config.models import PROMPT_KEYS
from .config.recipe import load
from .errors import ConfigError

if TYPE_CHECKING:
    from .config.schema import Config
    from .teacher.store import HiddenStateStore


def main(arguments: list[str] | None = None) -> int:
    """Builds states in the processes that torchrun started, or in this one; returns the exit status (see `cli.run`)."""
    return run("cache", _parser(), _work, arguments)


def _work(options: argparse.Namespace) -> None:
    if options.config is not None:
        _build(options)
        return
    from .console import console, progress_bar  # not before the arguments are parsed: these load PyTorch
    from .teacher.folder import StatesFolder

    if options.info is not None:
        for line in StatesFolder(options.info, "info").describe():
            console.print(line, markup=False)
        return
    folder, started = StatesFolder(options.verify, "verify"), time.perf_counter()
    with progress_bar("blocks checked") as bar:
        folder.verify(bar.track(range(len(folder.checksums))))
    console.print(f"{options.verify} is complete and undamaged, {time.perf_counter() - started:.1f} s", markup=False)


def _build(options: argparse.Namespace) -> None:
    stages = load(options.config, options.overrides)
    from . import distributed, signals

    with distributed.process_group(stages[0].train.timeout_minutes), signals.terminable():
        config = _taught_stage(stages, options.stage)
        if not any(teacher.path or teacher.config for teacher in config.all_teachers.values()):
            raise ConfigError("teacher: there is no model whose states could be computed; give teacher.path")
        _report(options, config, *_states(config))


def _taught_stage(stages: list[Config], name: str | None) -> Config:
    """The named stage, or the last one that has a teacher, as it is before earlier stages have run.

    Its student is their result where that is there, and else what they start from: the tokens are the same.

    Raises ConfigError where there is no such stage, or no result of the stage that trains the teacher.
    """
    from .pipeline import as_begun, resolve

    taught = [config for config in stages if config.method not in (*WITHOUT_TEACHER, "generate")]
    names = [config.run.stage for config in taught]
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
    if all(pathlib.Path(getattr(resolved.student, key)).exists() for key in chosen.student.stages):
        return resolved
    return dataclasses.replace(resolved, student=students[chosen.run.stage])


def _states(config: Config) -> tuple[dict[str, HiddenStateStore], float]:
    """The complete states of each teacher of a configuration, by its key, and the seconds that all took."""
    from .training.trainer import Trainer

    started = time.perf_counter()
    cache, log = dataclasses.replace(config.cache, mode="disk"), dataclasses.replace(config.log, wandb=None)
    trainer = Trainer(dataclasses.replace(config, cache=cache, log=log), resume=True)  # a run's folder plays no part
    caches = trainer.teachers.caches
    if not all(cache.samples for cache in caches.values()):
        raise ConfigError(f'method "{config.method}" trains on no response of the data: there is nothing to build')
    trainer.build_teachers(reserved=0)
    built = {key: cache.file for key, cache in caches.items() if config.all_teachers[key].hidden_states is None}
    return built, time.perf_counter() - started


def _report(options: argparse.Namespace, config: Config, built: dict[str, HiddenStateStore], seconds: float) -> None:
    from .console import console
    from .teacher.folder import StatesFolder

    stage, settings = f"{config.run.stage}:" if config.run.stage else "", [*options.overrides]
    for key, file in built.items():
        if config.teachers:
            console.print(key, markup=False)
        for line in StatesFolder(str(file.folder), "cache").describe():
            console.print(line, markup=False)
        console.print(f"folder       {file.folder}, in {seconds:.1f} s altogether", markup=False)
        values = vars(config.all_teachers[key]).items()
        given = [name for name, value in values if value is not None and name not in PROMPT_KEYS]
        keys = [*(f"{name}=null" for name in given), f"hidden_states={file.folder.absolute()}"]
        settings += [f"{stage}{key}.{each}" for each in keys]
    words = ["--config", options.config, *(word for each in settings for word in ("--set", each))]
    console.print(f"to train     python -m abkd_fast.train {shlex.join(words)}", markup=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m abkd_fast.cache",
        description="Compute a teacher's hidden states for the data of a recipe, without training. A run on any "
        "machine trains from the folder (teacher.hidden_states). An interrupted build continues where it ended.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="RECIPE", help="builds the states: a JSON file or a packaged recipe's name")
    what.add_argument("--verify", metavar="FOLDER", help="reads everything in a folder of states, checks all checksums")
    what.add_argument("--info", metavar="FOLDER", help="prints what a folder of states holds")
    text = "override a value of the recipe, for example data.train=rows.jsonl or cache.dtype=float8"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=text)
    parser.add_argument("--stage", metavar="NAME", help="stage of the recipe (default: the last one with a teacher)")
    return parser


if __name__ == "__main__":
    leave(main())
