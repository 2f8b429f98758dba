"""Supervised fine-tuning: the cross-entropy of the data's responses."""

from __future__ import annotations

from torch import Tensor

from ..data.batches import Batch
from ..losses.arguments import LinearHead
from .base import Method, cross_entropy


class SupervisedFineTuning(Method):
    """The baseline, and the training of teachers and initial students."""

    needs_teacher = False

    def loss(self, student: LinearHead, batch: Batch, teacher: LinearHead | None) -> Tensor:
        return cross_entropy(student, batch)
