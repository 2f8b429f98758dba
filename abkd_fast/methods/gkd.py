"""Word-level distillation on responses that the student writes: ImitKD (Lin et al. 2020), GKD (Agarwal et al. 2024)."""

from __future__ import annotations

from ..config.schema import Config
from .kd import WordLevelKD
from .replay import ReplayBuffer
from .rollouts import Rollouts


class GKD(WordLevelKD):
    """A share of the steps, on_policy.fraction, trains on the student's responses, the others on the data's.

    As in the published code of ABKD and DistiLLM, new responses go through a replay buffer, and the step gets a random
    batch of it; with on_policy.replay_rows = 0 it trains on the new ones, as the paper has it.
    """

    generators = ("student",)

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

    def on_eval(self, dev_loss: float) -> None:
        """Nothing depends on it."""

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict:
        return self.buffer.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.buffer.load_state_dict(state)


class ImitKD(GKD):
    """Every step trains on the student's responses."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.fraction = 1.0
