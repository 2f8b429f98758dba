"""How far a run is: its totals, and the sums since the last logged point."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass
class TrainState:
    """How far a run is, and the totals of its summary."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    window_seconds: float = 0.0
    skipped_steps: int = 0
    evaluated_step: int = -1
    first_dev_loss: float | None = None
    first_dev_rouge_l: float | None = None
    dev_loss: float | None = None
    dev_rouge_l: float | None = None
    # What is lowest at the best step after any (its loss, or ROUGE-L times -1), that step, its loss and its ROUGE-L.
    best: tuple[float, int, float, float | None] | None = None

    def evaluated(self, loss: float, rouge_l: float | None, by_rouge: bool) -> bool:
        """Notes an evaluation; whether its loss is the lowest after any step, or its ROUGE-L the highest."""
        self.dev_loss, self.dev_rouge_l, self.evaluated_step = loss, rouge_l, self.step
        if self.step == 0:
            self.first_dev_loss, self.first_dev_rouge_l = loss, rouge_l
            return False
        value = -rouge_l if by_rouge else loss
        improved = value < (self.best[0] if self.best else math.inf)  # never a loss that is no number
        if improved:
            self.best = value, self.step, loss, rouge_l
        return improved
