"""A recipe's stages, one after the other; finished ones are used again, and by "stage:NAME" in later ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

from rich.table import Table

from . import models
from .config import Config, ConfigError, ModelConfig
from .logs import console
from .trainer import Trainer


def run(stages: list[Config]) -> list[dict]:
    """Trains what is not there yet and returns the summary of every stage. Raises ConfigError before any training."""
    stages = [_resolve(config, {other.run.stage for other in stages[:index]}) for index, config in enumerate(stages)]
    for config in stages:
        _is_finished(config)
        for key in ("student", "teacher"):
            spec = getattr(config, key)
            if spec is not None and spec.path is not None and not spec.path.startswith(str(config.run.root)):
                models.check_path(spec.path, f"{key}.path")
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


def _resolve(config: Config, earlier: set[str]) -> Config:
    """The same configuration with "stage:NAME" replaced by the folder of that stage's result."""

    def path_of(spec: ModelConfig | None, key: str) -> ModelConfig | None:
        if spec is None or spec.path is None or not spec.path.startswith("stage:"):
            return spec
        name = spec.path.removeprefix("stage:")
        if name not in earlier:
            known = ", ".join(sorted(earlier)) or "none"
            raise ConfigError(f"{key}.path: {spec.path}: no such stage before this one; earlier stages: {known}")
        return dataclasses.replace(spec, path=str(config.run.root / name / "final"))

    return dataclasses.replace(
        config, student=path_of(config.student, "student"), teacher=path_of(config.teacher, "teacher")
    )


def _is_finished(config: Config) -> bool:
    """Whether this very stage has run. Raises ConfigError where its folder holds anything else."""
    folder = config.run.folder
    if not folder.exists():
        return False
    if not config.run.stage:
        raise ConfigError(f"{folder} exists already: choose another run.name, or move it aside")
    if not (folder / "final").exists():
        raise ConfigError(f"{folder} exists, but was not finished: move it aside, or choose another run.name")
    then, now = json.loads((folder / "config.json").read_text(encoding="utf-8")), config.to_dict()
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
