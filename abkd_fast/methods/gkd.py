"""Word-level distillation on responses that the student writes: ImitKD (Lin et al. 2020), GKD (Agarwal et al. 2024)."""

from __future__ import annotations

from ..config.schema import Config
from .base import OnPolicyMethod
from .kd import WordLevelKD
from .replay import ReplayBuffer
from .rollouts import Rollouts


class GKD(WordLevelKD, OnPolicyMethod):
    """A share of the steps, on_policy.fraction, trains on the student's responses, the others on the data's.

    New responses go through a replay buffer, and the step trains on a random batch of it, as in the published code of
    ABKD and DistiLLM. With on_policy.replay_rows = 0 the step trains on the new responses, as in the paper.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.fraction, self.max_concurrent_responses = config.on_policy.fraction, config.train.batch_size
        self.buffer = ReplayBuffer(config.on_policy.replay_rows, config.run.seed)

    @property
    def off_policy_fraction(self) -> float:
        return 1 - self.fraction

    def select_batch(self, step: int, progress: float, samples: list[dict], rollouts: Rollouts) -> list[dict]:
        if self.buffer.coin() >= self.fraction:
            return samples
        written = rollouts.write(samples, step)
        if not self.buffer.capacity:
            return written
        self.buffer.add(written)
        return self.buffer.draw(len(samples))

    def state_dict(self) -> dict:
        return self.buffer.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.buffer.load_state_dict(state)


class ImitKD(GKD):
    """GKD in which every step trains on the student's responses."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.fraction = 1.0
