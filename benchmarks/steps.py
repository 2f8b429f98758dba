"""The steps that timing.py times: every method's, by the trainer and in the published way, on the same weights."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from unittest import mock

from torch import Tensor, nn

import baseline
from abkd_fast import methods
from abkd_fast.config.schema import Config
from abkd_fast.data.batches import StepBatch, make_step_batch
from abkd_fast.generation import sampling
from abkd_fast.methods.rollouts import Rollouts
from abkd_fast.teacher.teacher import CachedTeacher, OnPolicyTeacher, Teacher
from abkd_fast.training.trainer import Trainer
from baseline import BaselineTrainer, PaddedBatch, RolloutBatch, pad_samples
from workload import LENGTH, response_lengths

Numbers = tuple[Tensor, Tensor]  # a step's loss and gradient norm
WAYS = {"published": "published way", "ours": "ours", "cached": "ours, teacher's states cached"}
PARTS = {
    "data": "trains on the data",
    "rollout": "writes responses",
    "new": "trains on new responses",
    "again": "trains on old responses",
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table."""

    method: str  # as in a configuration, like the loss
    loss: str | None = None  # None without a teacher
    baseline: baseline.Loss | None = None
    has_entropy: bool = False  # the baseline's value contains the teacher's entropy besides the divergence
    # How much of each part there is for a sample trained on: prompts answered for "rollout", else a share of the steps.
    parts: dict[str, float] = dataclasses.field(default_factory=lambda: {"data": 1.0})
    note: str | None = None  # the source of `parts`
    settings: dict = dataclasses.field(default_factory=dict)  # of the configuration: every step writes

    @property
    def is_on_policy(self) -> bool:
        return "rollout" in self.parts


METHODS = {
    "SFT": Method("sft"),
    "KD": Method("kd", "fkl", baseline.forward_kl, has_entropy=True),
    "MiniLLM": Method(
        "minillm",
        "rkl",
        parts={"rollout": 0.25, "new": 0.25, "again": 0.75},
        note="every response is trained on in 4 epochs, as published",
    ),
    "GKD": Method(
        "gkd",
        "jsd:0.1",
        baseline.jensen_shannon,
        parts={"data": 0.5, "rollout": 0.5, "new": 0.5},
        note="half of the steps write responses and train on as many, as published",
        settings={"on_policy": {"fraction": 1.0, "replay_rows": 0}},
    ),
    "DISTILLM": Method(
        "distillm",
        "sfkl:0.1",
        baseline.skew_forward_kl,
        has_entropy=True,
        parts={"data": 0.5, "rollout": 0.25, "new": 0.25, "again": 0.25},
        note="its threshold, which follows the dev loss, is assumed to be .5 on average, so half of the steps train on "
        "responses; by its decreasing schedule half of those write new ones, and the others replay",
        settings={"on_policy": {"threshold": 1.0}},
    ),
    "AlphaNet": Method("kd", "alphanet:0.2,0.8", baseline.alphanet),
    "ABKD": Method("ab", "ab:0.2,0.7", baseline.alpha_beta),
}


@dataclasses.dataclass(frozen=True)
class Turn:
    """One batch, for either side."""

    batch: StepBatch
    samples: list[dict]
    text: list[dict]  # blocks of plain text
    padded: PaddedBatch
    padded_text: PaddedBatch | None
    prompts: list[dict]  # answered by MiniLLM's rollouts; those of the samples come first

    @property
    def baseline_rollouts(self) -> int:
        """How many prompts the baseline's MiniLLM answers: a chunk, or as many as a step needs."""
        return max(baseline.CHUNK, len(self.samples))


class Responses(Rollouts):
    """Writes to the prompts in `waiting`, and ends every response at a length of its own."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.settings = dataclasses.replace(self.settings, eos_token_ids=())
        self.waiting: list[dict] = []

    def prompts(self, count: int, turn: int) -> list[dict]:
        return self.waiting

    def write(self, samples: list[dict], step: int) -> list[dict]:
        with _limits(samples):
            return super().write(samples, step)

    def write_mixed(self, samples: list[dict], step: int, teacher_weight: float) -> list[dict]:
        with _limits(samples):
            return super().write_mixed(samples, step, teacher_weight)


def _limits(samples: list[dict]) -> contextlib.AbstractContextManager:
    """Makes sampling end each response where `response_lengths` says."""
    lengths = response_lengths(samples)
    return mock.patch.object(sampling, "_limit", lambda models, prompt, settings, index: lengths[index])


@contextlib.contextmanager
def _mode(module: nn.Module, dropout: bool) -> Iterator[None]:
    """Trains without dropout, as MiniLLM does, unless `dropout`."""
    training = module.training
    module.train(training and dropout)
    yield
    module.train(training)


class Ours:
    """The trainer's own steps."""

    def __init__(self, trainer: Trainer, live: Teacher, cached: CachedTeacher, config: Callable[[str], Config]) -> None:
        """`config` gives the configuration of a method."""
        self.trainer, self.config = trainer, config
        self.teachers = {"ours": live, "cached": cached}
        data = trainer.config, trainer.tokenizer, trainer.train_set
        self.rollouts = Responses(*data, trainer.student, live.model, trainer.precision)
        self.written: dict[str, list[dict]] = {}

    def data(self, name: str, way: str) -> Callable[[Turn], Numbers]:
        method, teacher = self.method(name), self.teachers[way] if METHODS[name].loss else None
        return lambda turn: self._step(method, teacher, turn.batch)

    def rollout(self, name: str) -> Callable[[Turn], None]:
        method = self.method(name)

        def write(turn: Turn) -> None:
            self.rollouts.waiting = turn.prompts
            written = method.select_batch(0, 1.0, turn.samples, self.rollouts)
            # MiniLLM keeps a whole round. Its first responses answer the prompts of the samples.
            self.written[name] = method.rollouts[: len(turn.samples)] if name == "MiniLLM" else written

        return write

    def text(self, name: str) -> Callable[[Turn], Numbers]:
        """Trains on what has been written. The teacher's states are computed the first time, then kept with it."""
        method, live = self.method(name), self.teachers["ours"]
        teacher = OnPolicyTeacher(live, live)

        def step(turn: Turn) -> Numbers:
            samples = self.written[name]
            with _mode(self.trainer.student, dropout=name != "MiniLLM"):
                if name == "MiniLLM":
                    # In a round of these samples alone, step 1 is its second epoch, which writes nothing.
                    method.rollouts = samples
                    method.settings = dataclasses.replace(method.settings, rollouts=len(samples))
                    samples = method.select_batch(1, 1.0, turn.samples, self.rollouts)
                batch = make_step_batch(samples, turn.text, self.trainer.config.train.max_tokens)
                return self._step(method, teacher, batch)

        return step

    def method(self, name: str) -> object:
        return methods.find(METHODS[name].method)(self.config(name))

    def _step(self, method: object, teacher: object, batch: StepBatch) -> Numbers:
        self.trainer.method, self.trainer.teacher = method, teacher
        return self.trainer.train_step(batch)[:2]


class Baseline:
    """The published way's steps. Samples are padded to LENGTH."""

    def __init__(self, trainer: Trainer, teacher: Teacher) -> None:
        config = trainer.config
        self.trainer = BaselineTrainer(trainer.student.model, teacher.model.model, config.optim, config.minillm)
        self.precision, self.device = trainer.precision, trainer.device
        self.written: dict[str, list[dict] | RolloutBatch] = {}

    def pad(self, samples: list[dict]) -> PaddedBatch:
        return pad_samples(samples, LENGTH, self.device)

    def data(self, name: str) -> Callable[[Turn], Numbers]:
        def step(turn: Turn) -> Numbers:
            with self.precision():
                return self.trainer.step(turn.padded, METHODS[name].baseline, turn.padded_text)

        return step

    def rollout(self, name: str) -> Callable[[Turn], None]:
        def write(turn: Turn) -> None:
            samples = turn.prompts[: turn.baseline_rollouts] if name == "MiniLLM" else turn.samples
            make = self.trainer.roll_out if name == "MiniLLM" else self.trainer.write
            with self.precision():
                self.written[name] = make(samples, response_lengths(samples))

        return write

    def take(self, name: str, samples: list[dict]) -> None:
        """Replaces what was written by given responses."""
        with self.precision():
            self.written[name] = self.trainer.score(samples) if name == "MiniLLM" else samples

    def text(self, name: str) -> Callable[[Turn], Numbers]:
        """Trains on what has been written."""

        def step(turn: Turn) -> Numbers:
            written = self.written[name]
            with self.precision(), _mode(self.trainer.student, dropout=name != "MiniLLM"):
                if name == "MiniLLM":
                    rollouts = RolloutBatch(*(field[: len(turn.samples)] for field in written))
                    return self.trainer.policy_step(rollouts, turn.padded_text)
                return self.trainer.step(self.pad(written), METHODS[name].baseline, turn.padded_text)

        return step

    def entropy(self, name: str, part: str, turn: Turn) -> float:
        """The part of a loss's value that is not the divergence."""
        with self.precision():
            if name == "MiniLLM" and turn.padded_text is not None:
                return self.trainer.minillm.text_kd * self.trainer.teacher_entropy(turn.padded_text).item()
            if METHODS[name].has_entropy:
                samples = turn.samples if part == "data" else self.written[name]
                batch = pad_samples(samples, None, self.device)  # more padding would only cost time
                return self.trainer.teacher_entropy(batch).item()
        return 0.0
