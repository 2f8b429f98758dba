"""Responses of the student, kept to be trained on again."""

from __future__ import annotations

import collections
import random

from ..config import ConfigError


class ReplayBuffer:
    """The newest `capacity` samples. Each keeps the teacher's states once they are known: no replay computes them."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.samples: collections.deque[dict] = collections.deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self.samples)

    def add(self, samples: list[dict]) -> None:
        self.samples.extend(samples)

    def draw(self, count: int, generator: random.Random) -> list[dict]:
        """So many samples, none twice. Raises ConfigError where the buffer holds fewer."""
        if count > len(self.samples):
            raise ConfigError(
                f"on_policy.replay_rows: {count} samples are asked of a replay buffer of {len(self.samples)}"
            )
        return generator.sample(list(self.samples), count)

    def state_dict(self) -> list[dict]:
        """Tokens alone: the teacher's states are computed again when they are first needed."""
        return [{name: sample[name] for name in ("input_ids", "prompt_length")} for sample in self.samples]

    def load_state_dict(self, samples: list[dict]) -> None:
        self.samples = collections.deque(samples, maxlen=self.capacity)
