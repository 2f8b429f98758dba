"""What the losses take, and the checks of it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class LinearHead(NamedTuple):
    """A model's hidden states and the output projection that reads them: logits = hidden weight^T + bias."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]


def loss_dtype(logits: Tensor) -> torch.dtype:
    """Of losses, and of sums over the vocabulary or the tokens, from logits or hidden states."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def check_labels(labels: Tensor | None, rows: int, hard_weight: float) -> Tensor | None:
    """`labels` as contiguous int64 [rows]; raises ValueError where they are missing or have another shape."""
    if labels is None:
        if hard_weight:
            raise ValueError(f"hard_weight is {hard_weight}: the cross-entropy needs labels")
        return None
    if labels.shape != (rows,):
        raise ValueError(f"labels have shape {list(labels.shape)}, expected [{rows}], one for each row of logits")
    return labels.long().contiguous()


def check_numbers(temperature: float, hard_weight: float, reduction: str) -> None:
    """Raises ValueError for a temperature, hard_weight or reduction that means nothing."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, expected a positive number")
    if not 0 <= hard_weight <= 1:
        raise ValueError(f"hard_weight is {hard_weight}, expected 0 to 1")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction is "{reduction}", expected "mean", "sum" or "none"')


MAX_PADDING = 1024


def shared_vocabulary(student: int, teacher: int) -> int:
    """The length of the common prefix of two padded vocabularies.

    One tokenizer's vocabulary is padded to different sizes in different models (Qwen: 151,936 and 152,064); the
    distributions are then taken over the common prefix. Sizes further apart than any padding raise ValueError.
    """
    if abs(student - teacher) > MAX_PADDING:
        raise ValueError(
            f"the student has {student} vocabulary entries and the teacher {teacher}: distillation needs one "
            "vocabulary (sizes that differ only by padding are cut to the common prefix)"
        )
    return min(student, teacher)


def count_kept(labels: Tensor | None, rows: Tensor) -> Tensor:
    """The number of `rows` [N, ...] that count, at least 1, as a scalar of their loss on their device."""
    dtype = loss_dtype(rows)
    if labels is None:
        return torch.tensor(max(1, rows.shape[0]), dtype=dtype, device=rows.device)
    return (labels != -100).sum().clamp(min=1).to(rows.device, dtype)
