"""The steps that timing.py times: every method's, by the trainer and in the published way, on the same weights."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from unittest import mock

from torch import Tensor, nn

import baseline
from abkd_fast.config.schema import Config
from abkd_fast.data.batches import StepBatch, make_step_batch
from abkd_fast.generation import sampling
from abkd_fast.methods import METHODS as TRAINED
from abkd_fast.methods.rollouts import Rollouts
from abkd_fast.teacher.teacher import CachedTeacher, OnPolicyTeacher, Teacher
from abkd_fast.training.trainer import Trainer
from baseline import BaselineTrainer, PaddedBatch, RolloutBatch, pad_samples
from workload import LENGTH, response_lengths

Numbers = tuple[Tensor, Tensor]  # a step's loss and gradient norm
WAYS = {"published": "published way", "ours": "ours", "cached": "ours, teacher's states cached"}
PARTS = {"data": "trains on the data", "rollout": "writes responses"}
PARTS |= {"new": "trains on new responses", "again": "trains on old responses"}
Key = tuple[str, str, str]  # method, way, part


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table."""

    method: str  # as in a configuration, like the loss
    loss: str | None = None  # None without a teacher
    baseline_loss: baseline.Loss | None = None
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
    """Trains without dropout, as MiniLLM does on responses, unless `dropout`."""
    training = module.training
    module.train(training and dropout)
    yield
    module.train(training)


class Ours:
    """The trainer's own steps."""

    def __init__(self, trainer: Trainer, live: Teacher, cached: CachedTeacher, config: Callable[[str], Config]) -> None:
        """`config` gives the configuration of a method."""
        self.trainer, self.teachers = trainer, {"ours": live, "cached": cached}
        data = trainer.config, trainer.tokenizer, trainer.data.train_set
        self.rollouts = Responses(*data, trainer.student, live.model, trainer.precision)
        self.written: dict[str, list[dict]] = {}
        self.method = functools.cache(lambda name, part: TRAINED[METHODS[name].method](config(name)))
        self.on_policy = functools.cache(lambda name: OnPolicyTeacher(live, live))

    def run(self, key: Key, turn: Turn) -> Numbers | None:
        """One step: writes responses, or trains. On responses the teacher's states are computed once, then kept."""
        name, way, part = key
        is_minillm, trainer = name == "MiniLLM", self.trainer
        method, teacher = self.method(name, "new" if part == "again" else part), self.teachers[way]
        if part == "rollout":
            self.rollouts.waiting = turn.prompts
            written = method.select_batch(0, 1.0, turn.samples, self.rollouts)
            # MiniLLM keeps a whole round. Its first responses answer the prompts of the samples.
            self.written[name] = method.rollouts[: len(turn.samples)] if is_minillm else written
            return None
        with _mode(trainer.student, dropout=not is_minillm):
            batch = turn.batch
            if part != "data":
                samples, teacher = self.written[name], self.on_policy(name)
                if is_minillm:
                    # In a round of these samples alone, step 1 is its second epoch, which writes nothing.
                    method.rollouts = samples
                    method.settings = dataclasses.replace(method.settings, rollouts=len(samples))
                    samples = method.select_batch(1, 1.0, turn.samples, self.rollouts)
                batch = make_step_batch(samples, turn.text, trainer.config.train.max_tokens)
            trainer.method, trainer.teacher = method, teacher if METHODS[name].loss else None
            return trainer.train_step(batch)[:2]


class Baseline:
    """The published way's steps. Samples are padded to LENGTH."""

    def __init__(self, trainer: Trainer, teacher: Teacher) -> None:
        models, config = (trainer.student.model, teacher.model.model), trainer.config
        self.trainer, self.device = BaselineTrainer(*models, config.optim, config.minillm), trainer.device
        self.precision = trainer.precision
        self.written: dict[str, list[dict] | RolloutBatch] = {}

    def pad(self, samples: list[dict]) -> PaddedBatch:
        return pad_samples(samples, LENGTH, self.device)

    def run(self, key: Key, turn: Turn) -> Numbers | None:
        """One step: writes responses, or trains."""
        name, _, part = key
        is_minillm, trainer = name == "MiniLLM", self.trainer
        with self.precision():
            if part == "rollout":
                samples = turn.prompts[: turn.baseline_rollouts] if is_minillm else turn.samples
                self.written[name] = (trainer.roll_out if is_minillm else trainer.write)(samples)
                return None
            if part != "data" and is_minillm:
                rollouts = RolloutBatch(*(field[: len(turn.samples)] for field in self.written[name]))
                with _mode(trainer.student, dropout=False):
                    return trainer.policy_step(rollouts, turn.padded_text)
            padded = turn.padded if part == "data" else self.pad(self.written[name])
            return trainer.step(padded, METHODS[name].baseline_loss, turn.padded_text)

    def take(self, name: str, samples: list[dict]) -> None:
        """Replaces what was written by given responses."""
        with self.precision():
            self.written[name] = self.trainer.score(samples) if name == "MiniLLM" else samples

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
