"""A recipe's stages, one after the other; finished ones are used again, and by "stage:NAME" in later ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

from rich.table import Table

from . import models
from .config import Config, ConfigError, ModelConfig
from .data import read_rows
from .logs import console
from .trainer import Trainer, check_folder


def run(stages: list[Config]) -> list[dict]:
    """Trains what is not there yet and returns the summary of every stage. Raises ConfigError before any training."""
    for index, config in enumerate(stages):
        _check(config, {other.run.stage for other in stages[:index]})
    stages = [_resolve(config) for config in stages]
    for config in stages:
        _is_finished(config)
    summaries = []
    for config in stages:
        if _is_finished(config):
            console.print(f"[bold]{config.run.folder}[/bold]  is finished already: its result is used")
            summary = json.loads((config.run.folder / "summary.json").read_text(encoding="utf-8"))
        else:
            summary = Trainer(config).train()
            console.print(f"saved {config.run.folder / 'final'}")
        summaries.append(summary)
    if len(stages) > 1:
        console.print(_table(stages, summaries))
    return summaries


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


def _is_finished(config: Config) -> bool:
    """Whether this very stage has run. Raises ConfigError where its folder holds anything else."""
    folder = config.run.folder
    if not folder.exists():
        return False
    if not config.run.stage:
        check_folder(folder)
    if not (folder / "final").exists():
        raise ConfigError(f"{folder} exists, but was not finished: move it aside, or choose another run.name")
    then, now = json.loads((folder / "config.json").read_text(encoding="utf-8")), config.to_dict()
    then["cache"] = now["cache"]  # which changes how long a result takes, never the result
    changed = next(_differences(then, now), None)
    if changed:
        raise ConfigError(f"{folder} is the result of another configuration ({changed}): choose another run.name")
    return True


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
