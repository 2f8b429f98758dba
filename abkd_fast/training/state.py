"""The state of a run: its counters, and everything that a checkpoint keeps besides model and optimizer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import distributed
from ..console import console
from ..device import device_name
from ..errors import ConfigError
from ..models.identity import describe_model
from . import checkpoint
from .checkpoint_writer import optimizer_numbers

if TYPE_CHECKING:
    from .trainer import Trainer


@dataclasses.dataclass
class TrainState:
    """How far a run is, and the totals for its summary."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    window_seconds: float = 0.0
    skipped_steps: int = 0
    evaluated_step: int = -1
    first_dev_loss: float | None = None
    first_dev_rouge_l: float | None = None
    dev_loss: float | None = None
    dev_rouge_l: float | None = None
    # The best step: its value to minimize (dev loss, or minus ROUGE-L), the step, its dev loss, its ROUGE-L.
    best: tuple[float, int, float, float | None] | None = None
    evaluations_since_best: int = 0
    is_stopped: bool = False  # by a function of the caller: a resumed run has taken its last step

    def record_eval(self, loss: float, rouge_l: float | None, by_rouge: bool) -> bool:
        """Records an evaluation after `step`. Returns whether it is the best so far, by dev loss or by ROUGE-L."""
        self.dev_loss, self.dev_rouge_l, self.evaluated_step = loss, rouge_l, self.step
        if self.step == 0:
            self.first_dev_loss, self.first_dev_rouge_l = loss, rouge_l
            return False
        self.evaluations_since_best += 1
        value = -rouge_l if by_rouge else loss
        improved = value < (self.best[0] if self.best else math.inf)  # false for NaN
        if improved:
            self.best, self.evaluations_since_best = (value, self.step, loss, rouge_l), 0
        return improved


def state_dict(trainer: Trainer) -> tuple[dict[str, Tensor], dict]:
    """Tensors, and JSON values, that decide the steps to come, the log and the summary. Collective."""
    generators, values = checkpoint.random_state()
    groups = {"random": checkpoint.by_rank(generators), "window": trainer.window.tensors()}
    tensors = {f"{group}/{name}": value for group, entries in groups.items() for name, value in entries.items()}
    values |= {
        "progress": dataclasses.asdict(trainer.state),
        "scheduler": _kept(trainer.scheduler.state_dict()),
        "groups": _kept(_groups(trainer)),
        "numbers": optimizer_numbers(trainer.optimizer, trainer.student),
        "data": _fingerprints(trainer),
        "environment": _environment(trainer),
        "method": trainer.method.state_dict(),
    }
    if trainer.rollouts:
        values["rollouts"] = trainer.rollouts.counts
    return tensors, values


def _groups(trainer: Trainer) -> list[dict]:
    """What an optimizer of the caller's own keeps for its groups of weights. In AdamW no step changes that."""
    groups = trainer.optimizer.param_groups if trainer.given.optimizer else []
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


def _kept(values: object) -> object | None:
    """The values, or None where JSON would change them, as it makes text of numbers that are keys."""
    try:
        return values if json.loads(json.dumps(values)) == _with_lists(values) else None
    except (TypeError, ValueError):
        return None


def _with_lists(values: object) -> object:
    if isinstance(values, dict):
        return {key: _with_lists(value) for key, value in values.items()}
    return [*map(_with_lists, values)] if isinstance(values, list | tuple) else values


def load_state_dict(trainer: Trainer, tensors: dict[str, Tensor], values: dict) -> None:
    """The inverse, after model and optimizer are loaded. Raises ConfigError where the data have changed."""
    for key, now in _fingerprints(trainer).items():
        if values["data"].get(key, now) != now:  # earlier versions knew nothing of teachers
            what = "its text or the tokenizer" if key.startswith("data.") else "its content"
            raise ConfigError(
                f"{key}: {what} has changed since {trainer.resumed_from} was saved, or another version of abkd_fast "
                "saved it: begin again in another folder"
            )
    for key, now in _environment(trainer).items():
        then = values["environment"][key]
        if then != now:
            console.print(f"{key} was {then}, is {now}: the last bits of the result may differ")
    groups = {"random": {}, "window": {}}
    for key, value in tensors.items():
        group, _, name = key.partition("/")
        groups[group][name] = value
    trainer.window.load(groups["window"])
    trainer.state = TrainState(**values["progress"])
    for key, name in (("scheduler", "schedule"), ("groups", "optimizer")):
        if values.get(key, ()) is None:
            problem = f"a checkpoint can't keep the state of this {name}"
            raise ConfigError(f"{problem}, which JSON would change: begin again, or take another {name}")
    trainer.scheduler.load_state_dict(values["scheduler"])
    for group, kept in zip(trainer.optimizer.param_groups, values.get("groups", ()), strict=False):
        for key, value in kept.items():
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    for name, parameter in trainer.student.named_parameters():
        if name in values.get("numbers", ()):
            trainer.optimizer.state[parameter].update(values["numbers"][name])
    for group, lr in zip(trainer.optimizer.param_groups, trainer.scheduler.get_last_lr(), strict=True):
        group["lr"] = lr
    trainer.method.load_state_dict(values.get("method") or {})
    if trainer.rollouts:
        trainer.rollouts.counts.update(values["rollouts"])
    # Last, because loading models draws from the generators.
    checkpoint.set_random_state(checkpoint.of_rank(groups["random"]), values)


def _fingerprints(trainer: Trainer) -> dict[str, str]:
    """A hash of every source that the steps to come read: the tokens of data, and what is known of the teachers."""
    sources = {"data.train": trainer.data.train_set, "data.pretrain": trainer.data.pretrain_set}
    hashes = {key: source._fingerprint for key, source in sources.items() if source is not None}
    if trainer.teachers.are_several:
        names = json.dumps(trainer.data.teachers)
        hashes['data.train, column "teacher"'] = hashlib.sha256(names.encode()).hexdigest()
    if trainer.method.top_k:
        hashes["teacher.top_k"] = trainer.method.top_k.samples._fingerprint
    contents = {key: cache.content for key, cache in trainer.teachers.caches.items()}
    hashes |= {key: content for key, content in contents.items() if content is not None}
    return hashes


def read_alike(trainer: Trainer) -> dict:
    """What every rank must have read and chosen alike, as JSON values: else ranks would wait for each other forever."""
    data, contents = trainer.data, _fingerprints(trainer)
    if data.dev is not None:
        contents["data.dev"] = data.dev.dev_set._fingerprint
    for key, meta in ("student", trainer.student_meta), *trainer.teachers.metas.items():
        text = json.dumps(describe_model(meta.config))
        contents[f"config.json of {key}"] = hashlib.sha256(text.encode()).hexdigest()
    return {
        "device": trainer.device.type,
        "dtype": str(trainer.dtype).removeprefix("torch."),
        "number of steps": data.steps,
        "number of samples": len(data.train_set),
        "hash of": contents,
    }


def _environment(trainer: Trainer) -> dict[str, str | int]:
    device, processes = device_name(trainer.device), distributed.world_size()
    return {"PyTorch": torch.__version__, "device": device, "processes": processes}
