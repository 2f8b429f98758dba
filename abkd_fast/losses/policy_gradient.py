"""MiniLLM's loss: a clipped policy gradient and the reverse KL divergence, from one set of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .divergences import ReverseKL
from .reference import SLOPE, STUDENT_LSE
from .row_ops import measure_rows, row_gradients


def policy_rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    advantages: Tensor,
    log_probs: Tensor,
    clip_ratio: float,
    gradient: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """KL(q, p) [N] of logits [N, V], and the ratios r [N] = q(label) / e^log_probs, both in the type of the losses.

    `gradient` [N, V], which may be `student`, receives the derivative by the student's logits of each row's
    KL(q, p) + `clipped_surrogate`. Advantages and log_probs are [N], in the type of the losses; every label is a
    token. No autograd.
    """
    rows = student, teacher, labels, ReverseKL(), 1.0, 0.0
    divergences, statistics = measure_rows(*rows)
    log_q = student.gather(1, labels[:, None])[:, 0] - statistics[:, STUDENT_LSE]
    ratios = (log_q - log_probs).exp().to(divergences.dtype)
    if gradient is not None:
        # The divergence's derivative is u - q slope, the surrogate's w q - w onehot: the kernel makes all but the last.
        weights = torch.where(is_clipped(ratios, advantages, clip_ratio), 0.0, advantages * ratios)
        statistics[:, SLOPE] -= weights
        row_gradients(*rows, statistics, torch.ones_like(divergences), gradient)
        gradient.scatter_add_(1, labels[:, None], -weights[:, None].to(gradient.dtype))
    return divergences, ratios


def clipped_surrogate(ratios: Tensor, advantages: Tensor, clip_ratio: float) -> Tensor:
    """PPO's loss max(-A r, -A clip(r, 1 - clip_ratio, 1 + clip_ratio)) of each row (arXiv 1707.06347, equation 7)."""
    return -torch.minimum(advantages * ratios, advantages * ratios.clamp(1 - clip_ratio, 1 + clip_ratio))


def is_clipped(ratios: Tensor, advantages: Tensor, clip_ratio: float) -> Tensor:
    """Where the surrogate has no gradient: the ratio is beyond, on the side that the advantage asks for."""
    return torch.where(advantages >= 0, ratios > 1 + clip_ratio, ratios < 1 - clip_ratio)
