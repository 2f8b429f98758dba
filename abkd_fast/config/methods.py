"""The methods: their names, those without a teacher, and the sections that only some methods read."""

import dataclasses
from typing import Annotated, Literal

from ..errors import ConfigError
from .section import Section

METHODS = ("sft", "ab", "kd", "seqkd", "imitkd", "gkd", "distillm", "minillm")
WITHOUT_TEACHER = ("sft", "seqkd")
WITH_SERVED_TEACHER = ("ab", "kd")  # those that read teacher.top_k: no model writes while they train
ON_POLICY_READERS = {  # by key of on_policy: the methods that read it
    "fraction": ("gkd",),
    "replay_rows": ("imitkd", "gkd", "distillm"),
    "threshold": ("distillm",),
    "loss_margin": ("distillm",),
    "schedule": ("distillm",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnPolicyConfig(Section):
    """How often imitkd, gkd and distillm train on responses of the student, and how they replay them."""

    fraction: Annotated[float, "gkd: share of the steps that train on responses of the student", 0, 1] = 0.5
    replay_rows: Annotated[
        int, "size of the replay buffer, in responses (imitkd, gkd: 0 means that only new responses are used)", 0
    ] = 1000
    threshold: Annotated[float, "distillm: share of such steps at the start", 0, 1] = 0.0
    loss_margin: Annotated[float, "distillm: that share grows by 0.1 when the dev loss has risen by this", 0] = 0.1
    schedule: Annotated[
        Literal["decreasing", "constant", "increasing"], "distillm: how many such steps use new responses, over time"
    ] = "decreasing"

    def check_method(self, method: str) -> None:
        """Raises ConfigError for a value that would have no effect because the method doesn't read its key."""
        for field in dataclasses.fields(self):
            value, readers = getattr(self, field.name), ON_POLICY_READERS[field.name]
            if value != field.default and method not in readers:
                key = f"on_policy.{field.name}"
                problem = f'{key} is {value}, but method "{method}" has no such choice'
                raise ConfigError(f"{problem}, only {', '.join(readers)}: leave it out", key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiniLLMConfig(Section):
    """Policy gradient of minillm. The defaults are those of the paper. `loss` must be rkl."""

    rollouts: Annotated[int, "responses that one round generates", 1] = 256
    inner_epochs: Annotated[int, "passes over the responses of a round", 1] = 4
    teacher_weight: Annotated[float, "weight of the teacher in the mixture that generates", 0, 1] = 0.2
    gamma: Annotated[float, "discount of later rewards", 0, 1] = 0.95
    reward_scale: Annotated[float, "rewards are divided by this", 1e-6] = 0.5
    clip_reward: Annotated[float, "limit of a reward's absolute value", 0] = 100.0
    clip_ratio: Annotated[float, "how far the ratio of probabilities may move from 1", 0, 1] = 0.2
    text_kd: Annotated[float, "w in (1 - w) cross-entropy + w divergence to the teacher on data.pretrain", 0, 1] = 0.5
