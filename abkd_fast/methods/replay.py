"""The replay buffer: responses of the student, kept to be trained on again."""

import collections
import random

from ..errors import ConfigError


class ReplayBuffer:
    """The newest `capacity` samples, and the coin that decides when they are used.

    Every process of a run draws the same numbers, so all do the same in a step. With a coin each, all would wait for
    the one that generates. A sample keeps the teacher's hidden states once they are known, so no replay computes them.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity, self.random = capacity, random.Random(seed)
        self.samples: collections.deque[dict] = collections.deque(maxlen=capacity)

    @property
    def is_full(self) -> bool:
        return len(self.samples) == self.capacity

    def coin(self) -> float:
        """A number drawn uniformly from [0, 1)."""
        return self.random.random()

    def add(self, samples: list[dict]) -> None:
        self.samples.extend(samples)

    def draw(self, count: int) -> list[dict]:
        """`count` random samples, none twice. Raises ConfigError where the buffer holds fewer."""
        if count > len(self.samples):
            raise ConfigError(
                f"on_policy.replay_rows: {count} samples are asked of a replay buffer that holds {len(self.samples)}"
            )
        return self.random.sample(list(self.samples), count)

    def state_dict(self) -> dict:
        """The state as JSON values, without the teacher's hidden states: they are computed again when needed."""
        columns = "input_ids", "spans", "row", "teacher_input_ids", "teacher_spans"
        samples = [{name: sample[name] for name in columns if name in sample} for sample in self.samples]
        return {"samples": samples, "random": self.random.getstate()}

    def load_state_dict(self, state: dict) -> None:
        self.samples = collections.deque(state["samples"], maxlen=self.capacity)
        version, words, gauss = state["random"]
        self.random.setstate((version, tuple(words), gauss))
