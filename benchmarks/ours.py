"""Our way of a training step, for timing.py: the trainer's own, on a given batch."""

import dataclasses
import functools
from collections.abc import Callable
from unittest import mock

from abkd_fast.config.schema import Config
from abkd_fast.data.batches import make_step_batch
from abkd_fast.generation import sampling
from abkd_fast.methods import METHODS as TRAINED
from abkd_fast.methods.rollouts import Rollouts
from abkd_fast.teacher.teacher import CachedTeacher, OnPolicyTeacher, Teacher
from abkd_fast.training.trainer import Trainer
from baseline import METHODS, Key, Numbers, Turn, train_mode
from workload import response_lengths


class Ours:
    """The trainer's own steps."""

    def __init__(self, trainer: Trainer, live: Teacher, cached: CachedTeacher, config: Callable[[str], Config]) -> None:
        """`config` gives the configuration of a method."""
        self.trainer, self.teachers = trainer, {"ours": live, "cached": cached}
        data = trainer.config, trainer.tokenizer, trainer.data.train_set
        self.rollouts = Rollouts(*data, trainer.student, live.model, trainer.precision)
        self.rollouts.settings = dataclasses.replace(self.rollouts.settings, eos_token_ids=())
        self.written: dict[str, list[dict]] = {}
        self.method = functools.cache(lambda name, part: TRAINED[METHODS[name].method](config(name)))
        self.on_policy = functools.cache(lambda name: OnPolicyTeacher(live, live))

    def run(self, key: Key, turn: Turn) -> Numbers | None:
        """One step: writes responses, or trains. On responses the teacher's states are computed once, then kept."""
        name, way, part = key
        is_minillm, trainer = name == "MiniLLM", self.trainer
        method, teacher = self.method(name, "new" if part == "again" else part), self.teachers[way]
        if part == "rollout":
            lengths = response_lengths(turn.prompts)  # those of the samples come first
            self.rollouts.prompts = lambda count, turn_number: turn.prompts
            with mock.patch.object(sampling, "_limit", lambda models, prompt, settings, index: lengths[index]):
                written = method.select_batch(0, 1.0, turn.samples, self.rollouts)
            # MiniLLM keeps a whole round. Its first responses answer the prompts of the samples.
            self.written[name] = method.rollouts[: len(turn.samples)] if is_minillm else written
            return None
        with train_mode(trainer.student, dropout=not is_minillm):
            batch = turn.batch
            if part != "data":
                samples, teacher = self.written[name], self.on_policy(name)
                if is_minillm:
                    # In a round of these samples alone, step 1 is its second epoch, which writes nothing.
                    method.rollouts = samples
                    method.settings = dataclasses.replace(method.settings, rollouts=len(samples))
                    samples = method.select_batch(1, 1.0, turn.samples, self.rollouts)
                batch = make_step_batch(samples, turn.text, trainer.config.train.max_tokens)
            trainer.method, trainer.teachers.built = method, {"teacher": teacher} if METHODS[name].loss else {}
            return trainer.train_step(batch)[:2]
