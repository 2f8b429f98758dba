"""DistiLLM (Ko et al. 2024): the dev loss decides how much of the student's text is used; most of it is replayed."""

from __future__ import annotations

from ..config.schema import Config
from .base import OnPolicyMethod
from .kd import WordLevelKD
from .replay import ReplayBuffer
from .rollouts import Rollouts

THRESHOLD_GROWTH = 0.1  # added whenever the dev loss has risen


class DistiLLM(WordLevelKD, OnPolicyMethod):
    """About a share `threshold` of the steps trains on the student's responses, the others on the data's.

    Some of the former write new responses: fewer and fewer by default (on_policy.schedule). The others replay old ones,
    once the buffer is full. The paper's losses are the skew divergences, sfkl:0.1 and srkl:0.1.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        settings, self.max_concurrent_responses = config.on_policy, config.train.batch_size
        self.threshold, self.margin, self.schedule = settings.threshold, settings.loss_margin, settings.schedule
        self.off_policy_fraction = 1 - self.threshold  # at the start
        self.reference_loss: float | None = None
        self.buffer = ReplayBuffer(settings.replay_rows, config.run.seed)

    def select_batch(self, step: int, progress: float, samples: list[dict], rollouts: Rollouts) -> list[dict]:
        new_share = {"decreasing": 1 - progress, "constant": 0.5, "increasing": progress}[self.schedule]
        coin = self.buffer.coin()
        if coin >= self.threshold:
            return samples
        if coin >= self.threshold * new_share and self.buffer.is_full:
            return self.buffer.draw(len(samples))
        written = rollouts.write(samples, step)
        self.buffer.add(written)
        return written

    def on_eval(self, dev_loss: float) -> None:
        """Raises the threshold where the dev loss has risen by the margin since the last raise, or since the start."""
        if self.reference_loss is None:
            self.reference_loss = dev_loss
        elif dev_loss >= self.reference_loss + self.margin:
            self.threshold = min(1.0, self.threshold + THRESHOLD_GROWTH)
            self.reference_loss = dev_loss

    def metrics(self) -> dict[str, float]:
        return {"threshold": self.threshold}

    def state_dict(self) -> dict:
        names = "threshold", "reference_loss"
        return {"buffer": self.buffer.state_dict()} | {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict) -> None:
        self.threshold, self.reference_loss = state["threshold"], state["reference_loss"]
        self.buffer.load_state_dict(state["buffer"])
