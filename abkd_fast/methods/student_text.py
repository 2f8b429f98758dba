"""Word-level distillation on responses that the student writes: ImitKD (Lin et al. 2020), GKD (Agarwal et al. 2024)."""

from __future__ import annotations

import random

from ..config import Config
from ..rollouts import Rollouts
from .kd import WordLevelKD
from .replay import ReplayBuffer


class GKD(WordLevelKD):
    """A share of the steps, on_policy.fraction, trains on the student's responses, the others on the data's.

    As in the published code, responses go through a replay buffer; on_policy.replay_rows = 0 uses them as they come.
    """

    default_fraction = 0.5

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        fraction = config.on_policy.fraction
        self.fraction = self.default_fraction if fraction is None else fraction
        self.data_share = 1 - self.fraction
        self.random = random.Random(config.run.seed)  # every process draws the same
        self.buffer = ReplayBuffer(config.on_policy.replay_rows)
        self.steps = self.generating = 0

    def sequences(self, step: int, progress: float, samples: list[dict], rollouts: Rollouts) -> list[dict]:
        """What this step trains on, given its samples of the data; `progress` is the share of steps done."""
        self.steps += 1
        if self.random.random() >= self.fraction:
            return samples
        self.generating += 1
        written = rollouts.write(samples, step)
        if not self.buffer.capacity:
            return written
        self.buffer.add(written)
        return self.buffer.draw(len(samples), self.random)

    def evaluated(self, dev_loss: float) -> None:
        """Before the first step, too. Nothing depends on it here."""

    def numbers(self) -> dict[str, float]:
        """Since the last call."""
        share = self.generating / max(1, self.steps)
        self.steps = self.generating = 0
        return {"generating_share": share}

    def state_dict(self) -> dict:
        return {"random": self.random.getstate(), "buffer": self.buffer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        version, numbers, gauss = state["random"]
        self.random.setstate((version, tuple(numbers), gauss))
        self.buffer.load_state_dict(state["buffer"])


class ImitKD(GKD):
    """Every step trains on the student's responses."""

    default_fraction = 1.0
