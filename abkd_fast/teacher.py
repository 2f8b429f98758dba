"""The teacher: a frozen forward pass up to the hidden states that its output projection reads."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .data import Batch
from .models import PackedCausalLM


@dataclasses.dataclass(frozen=True)
class TeacherStates:
    """All that a divergence needs of a teacher for one batch: logits = hidden weight^T + bias."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]


class Teacher:
    def __init__(self, model: PackedCausalLM) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def states(self, batch: Batch) -> TeacherStates:
        head = self.model.head
        return TeacherStates(self.model.hidden_states(batch).to(head.weight.dtype), head.weight, head.bias)
