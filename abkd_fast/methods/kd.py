"""Word-level distillation on the data's own responses, by any divergence: ABKD by the alpha-beta one."""

from torch import Tensor

from ..config.schema import Config
from ..data.batches import Batch
from ..losses.arguments import LinearHead
from ..losses.divergences import parse
from ..losses.fused_linear import fused_linear_divergence
from ..losses.top_k import fused_linear_top_k
from .base import Method


class WordLevelKD(Method):
    """The divergence between teacher and student at every response token."""

    def __init__(self, config: Config) -> None:
        self.divergence = parse(config.loss)
        self.temperature = config.temperature
        self.hard_weight = config.hard_weight
        self.needs_teacher = config.served_teacher is None

    def loss(self, student: LinearHead, batch: Batch, teacher: LinearHead | None) -> Tensor:
        options = {
            "divergence": self.divergence,
            "labels": batch.labels,
            "hard_weight": self.hard_weight,
            "reduction": "sum",
            "scale": batch.loss_scale,
        }
        if self.top_k:
            top_ids, log_probs = self.top_k.of(batch.samples)
            return fused_linear_top_k(
                **student.arguments("student"), top_ids=top_ids, top_log_probs=log_probs, **options
            )
        heads = student.arguments("student") | teacher.arguments("teacher")
        return fused_linear_divergence(**heads, temperature=self.temperature, **options)
