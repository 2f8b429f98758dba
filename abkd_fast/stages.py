"""A recipe's stages, one after the other; finished ones are used again, and by "stage:NAME" in later ones."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator

from rich.table import Table

from . import checkpoint, models
from .config import Config, ConfigError, ModelConfig
from .data import read_rows
from .logs import console
from .plan import describe
from .trainer import Trainer, check_folder


def run(stages: list[Config], resume: bool = False) -> list[dict]:
    """Trains what is not there yet and returns the summary of every stage; with `resume`, goes on with what is begun.

    Raises ConfigError before any training; else what `Trainer.train` raises.
    """
    for index, config in enumerate(stages):
        _check(config, {other.run.stage for other in stages[:index]})
    stages = [_resolve(config) for config in stages]
    for config in stages:
        _is_finished(config, resume)
    summaries = []
    for config in stages:
        if _is_finished(config, resume):
            console.print(f"[bold]{config.run.folder}[/bold]  is finished already: its result is used")
            summary = json.loads((config.run.folder / "summary.json").read_text(encoding="utf-8"))
        else:
            summary = Trainer(config, resume).train()
            console.print(f"saved {config.run.folder / 'final'}")
        summaries.append(summary)
    if len(stages) > 1:
        console.print(_table(stages, summaries))
    return summaries


def plan(stages: list[Config], resume: bool = False) -> None:
    """Prints what `run` would do; loads no weights and writes no run folder. Raises ConfigError as `run` does."""
    for index, config in enumerate(stages):
        _check(config, {other.run.stage for other in stages[:index]})
    students: dict[str, ModelConfig] = {}  # by stage: its result has the shapes of what it began with
    for config in stages:
        specs = {
            key: students[spec.path.removeprefix("stage:")] if spec.is_stage else spec
            for key, spec in _models(config).items()
        }
        students[config.run.stage] = specs["student"]
        console.print(f"[bold]{config.run.folder}[/bold]")
        if _is_finished(_resolve(config), resume):
            console.print("  is finished already: its result would be used")
            continue
        for line in describe(Trainer(dataclasses.replace(config, **specs), resume)):
            console.print(line, markup=False)


def _check(config: Config, earlier: set[str]) -> None:
    """Raises ConfigError for rows, models and references to stages that can't be used, before anything is trained."""
    for key, spec in _models(config).items():
        if not spec.is_stage:
            models.read_config(spec, key)
        elif spec.path.removeprefix("stage:") not in earlier:
            known = ", ".join(sorted(earlier)) or "none"
            raise ConfigError(f"{key}.path: {spec.path}: no such stage before this one; earlier stages: {known}")
    for source, limit in ((config.data.train, config.data.train_rows), (config.data.dev, config.data.dev_rows)):
        if source is not None:
            read_rows(source, limit)


def _models(config: Config) -> dict[str, ModelConfig]:
    roles = {"student": config.student, "teacher": config.teacher}
    return {key: spec for key, spec in roles.items() if spec is not None}


def _resolve(config: Config) -> Config:
    """The same configuration with "stage:NAME" replaced by the folder of that stage's result."""
    paths = {
        key: dataclasses.replace(spec, path=str(config.run.root / spec.path.removeprefix("stage:") / "final"))
        for key, spec in _models(config).items()
        if spec.is_stage
    }
    return dataclasses.replace(config, **paths)


def _is_finished(config: Config, resume: bool) -> bool:
    """Whether this very run has its result. Raises ConfigError where its folder can't be used, or only to resume."""
    folder = config.run.folder
    if not folder.exists():
        return False
    if not (folder / "config.json").exists():
        check_folder(
            folder, resume and {path.name for path in folder.iterdir()} <= {"config.json.tmp", checkpoint.LOCK}
        )
        return False
    finished = (folder / "final").exists()
    if finished and not resume and not config.run.stage:
        check_folder(folder)
    if not finished and not resume:
        raise ConfigError(f"{folder} exists, but was not finished: add --resume, or choose another run.name")
    then = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    changed = "; ".join(_differences(_deciding(then), _deciding(config.to_dict())))
    if changed:
        way_out = "choose another run.name" if finished else "undo that to resume it, or choose another run.name"
        raise ConfigError(f"{folder} is the result of another configuration ({changed}): {way_out}")
    return finished


def _deciding(values: dict) -> dict:
    """The part of a configuration that a run's weights depend on, wherever the folder of all runs is."""
    root = pathlib.Path(values["run"].pop("dir"), values["run"]["name"])
    for role in ("student", "teacher"):
        path = (values.get(role) or {}).get("path")
        if path is not None and pathlib.Path(path).is_relative_to(root):
            values[role]["path"] = str(pathlib.Path(path).relative_to(root))
    values["train"].pop("on_nonfinite", None)
    return {key: value for key, value in values.items() if key not in ("log", "checkpoint", "cache")}


def _differences(then: dict, now: dict, prefix: str = "") -> Iterator[str]:
    for key in sorted({*then, *now}):
        old, new = then.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} was {json.dumps(old)}, is {json.dumps(new)}"


def _table(stages: list[Config], summaries: list[dict]) -> Table:
    table = Table("stage", "method", "loss", "dev loss before", "dev loss", "s/sample")
    for config, summary in zip(stages, summaries, strict=True):
        losses = ["-" if summary[key] is None else f"{summary[key]:.4f}" for key in ("dev_loss_before", "dev_loss")]
        loss = "cross-entropy" if config.method == "sft" else config.loss
        table.add_row(config.run.stage, config.method, loss, *losses, f"{summary['seconds_per_sample']:.4f}")
    return table
