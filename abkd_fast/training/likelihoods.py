"""How well student and teacher predict the data's responses: told once, because a wrong teacher shows there first."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import distributed
from ..console import console
from ..data.batches import Batch, StepBatch
from ..losses.arguments import LinearHead
from ..losses.fused_linear import fused_linear_cross_entropy


class ResponseLikelihoods:
    """Measures both models in the first step on the data's own responses, from the hidden states that it has anyway.

    The step's loss and gradient stay the same to the last bit. The student has its dropout.
    """

    def __init__(self, device: torch.device, is_wanted: bool) -> None:
        self.device, self.is_wanted = device, is_wanted
        self.sums: Tensor | None = None  # of this rank's log-probabilities: student, teacher; while a step is measured

    @contextlib.contextmanager
    def measured(self, batch: StepBatch) -> Iterator[None]:
        """A context for a step. It prints the means if they are wanted and the responses are the data's. Collective."""
        # What a model has written itself, it predicts best.
        if not self.is_wanted or not batch.num_labels or any("index" not in sample for sample in batch.samples):
            yield
            return
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        yield
        student, teacher = (distributed.all_reduce_sum(self.sums) / batch.num_labels).tolist()
        self.is_wanted, self.sums = False, None
        console.print(f"  responses  mean log-probability of a token: student {student:.3f}, teacher {teacher:.3f}")
        if teacher < student:
            console.print(
                "[bold red]  teacher    predicts the data's responses worse than the student does: are the two swapped "
                "(student.path, teacher.path), or does the teacher know another chat template (data.chat_template)?[/]"
            )

    def add(self, batch: Batch, student: LinearHead, teacher: LinearHead | None) -> None:
        """Adds what both models say of a batch's labels, if this step is measured."""
        if self.sums is not None and not batch.is_pretrain:
            self.sums -= torch.stack([_cross_entropy(head, batch.labels) for head in (student, teacher)])


@torch.no_grad()
def _cross_entropy(head: LinearHead, labels: Tensor) -> Tensor:
    return fused_linear_cross_entropy(**head.arguments("student"), labels=labels, reduction="sum")
