"""Supervised fine-tuning: the cross-entropy of the data's responses. The baseline, and the teacher's own training."""

from __future__ import annotations

from torch import Tensor

from ..config.schema import Config
from ..data.batches import Batch
from ..losses.fused_linear import fused_linear_cross_entropy


def cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: Batch, teacher: None = None) -> Tensor:
    """The sum over the labels of a batch, from their hidden states [N, H]."""
    return fused_linear_cross_entropy(hidden, weight, batch.labels, student_bias=bias, reduction="sum")


class SupervisedFineTuning:
    needs_teacher = False
    off_policy_fraction = 1.0
    loss = staticmethod(cross_entropy)

    def __init__(self, config: Config) -> None:
        del config  # nothing to choose
