"""Word-level distillation on the data's own responses, by any divergence: ABKD by the alpha-beta one."""

from torch import Tensor

from ..config.schema import Config
from ..data.batches import Batch
from ..losses.arguments import LinearHead
from ..losses.divergences import parse
from ..losses.fused_linear import fused_linear_divergence
from .base import Method


class WordLevelKD(Method):
    """The divergence between teacher and student at every response token."""

    def __init__(self, config: Config) -> None:
        self.divergence = parse(config.loss)
        self.temperature = config.temperature
        self.hard_weight = config.hard_weight

    def loss(self, student: LinearHead, batch: Batch, teacher: LinearHead | None) -> Tensor:
        return fused_linear_divergence(
            **student.arguments("student"),
            **teacher.arguments("teacher"),
            divergence=self.divergence,
            labels=batch.labels,
            temperature=self.temperature,
            hard_weight=self.hard_weight,
            reduction="sum",
            scale=batch.loss_scale,
        )
