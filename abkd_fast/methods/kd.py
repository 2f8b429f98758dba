"""Word-level distillation on the data's own responses, by any divergence: ABKD with the alpha-beta divergence."""

from __future__ import annotations

from torch import Tensor

from ..config.schema import Config
from ..data.batches import Batch
from ..losses.arguments import LinearHead
from ..losses.divergences import parse
from ..losses.fused_linear import fused_linear_divergence


class WordLevelKD:
    needs_teacher = True
    off_policy_fraction = 1.0

    def __init__(self, config: Config) -> None:
        self.divergence = parse(config.loss)
        self.temperature = config.temperature
        self.hard_weight = config.hard_weight

    def loss(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: Batch, teacher: LinearHead) -> Tensor:
        """The summed loss of the response tokens, from their hidden states [N, H]."""
        return fused_linear_divergence(
            hidden,
            weight,
            teacher.hidden,
            teacher.weight,
            self.divergence,
            batch.labels,
            student_bias=bias,
            teacher_bias=teacher.bias,
            temperature=self.temperature,
            hard_weight=self.hard_weight,
            reduction="sum",
        )
