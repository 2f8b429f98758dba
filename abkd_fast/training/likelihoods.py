"""How well student and teacher predict the data's responses: told once, because a wrong model shows there first."""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import distributed
from ..console import console, styled
from ..data.batches import Batch, StepBatch
from ..losses.arguments import LinearHead
from ..losses.fused_linear import fused_linear_cross_entropy

MARGIN = 1.0  # random weights are a little worse than a guess, and nothing is wrong with them


class ResponseLikelihoods:
    """Measures both models in the first step on the data's own responses, from the hidden states that it has anyway.

    The step's loss and gradient stay the same to the last bit. The student has its dropout.
    """

    def __init__(
        self, device: torch.device, count_labels: Callable[[list[dict]], dict[str, int]], is_wanted: bool
    ) -> None:
        """count_labels: gives the labels in samples by the key of their teacher."""
        self.device, self.count_labels, self.is_wanted = device, count_labels, is_wanted
        # While a step is measured, for each teacher: this rank's log-probabilities of the student and of the teacher.
        self.sums: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def measured(self, batch: StepBatch) -> Iterator[None]:
        """A context for a step. It prints the means if they are wanted and the responses are the data's. Collective."""
        # What a model has written itself, it predicts best.
        if not self.is_wanted or not batch.num_labels or any("index" not in sample for sample in batch.samples):
            yield
            return
        counts = self.count_labels(batch.samples)
        self.sums = {key: torch.zeros(2, dtype=torch.float64, device=self.device) for key in counts}
        yield
        for key, count in counts.items():
            student, teacher = (distributed.all_reduce_sum(self.sums[key]) / count).tolist()
            _print(key, student, teacher, self.vocab)
        self.is_wanted, self.sums = False, {}

    def add(self, key: str | None, batch: Batch, student: LinearHead, teacher: LinearHead | None) -> None:
        """Adds what both models say of a batch's labels, if this step is measured."""
        if self.sums and not batch.is_pretrain:
            self.vocab = student.weight.shape[0]
            self.sums[key] -= torch.stack([_cross_entropy(head, batch.labels) for head in (student, teacher)])


def _print(key: str, student: float, teacher: float, vocab: int) -> None:
    """key: the teacher's in the configuration. vocab: how many tokens the student knows."""
    console.print(f"  responses  mean log-probability of a token: student {student:.3f}, {key} {teacher:.3f}")
    if teacher < student:
        console.print(
            styled(
                f"  {key:10} predicts the data's responses worse than the student does: are the two swapped "
                f"(student.path, {key}.path), or does the teacher know another chat template (data.chat_template)?",
                "bold red",
            )
        )
    guess = -math.log(vocab)
    if student < guess - MARGIN:
        console.print(
            styled(
                f"  student    predicts them worse than a guess among its {vocab} tokens would ({guess:.3f}): losses that "
                "follow the student's own choices, as ab and rkl, hardly move such a model; train it with method=sft "
                "or loss=fkl first (docs/methods.md)",
                "bold red",
            )
        )


@torch.no_grad()
def _cross_entropy(head: LinearHead, labels: Tensor) -> Tensor:
    return fused_linear_cross_entropy(**head.arguments("student"), labels=labels, reduction="sum")
