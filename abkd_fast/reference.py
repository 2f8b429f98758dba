"""The row kernel's mathematics in plain PyTorch: slow, memory-hungry, and obviously right.

It takes over, in chunks, where the extension is missing, and is one of the two oracles of the tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .divergences import CrossEntropy, Divergence

LOG_FLOOR = -1e30  # two masked logits (-inf) then differ by exactly 0
MAX_EXPONENT = {torch.float32: 64.0, torch.float64: 640.0}  # beyond e^this a term saturates
CHUNK_ELEMENTS = 1 << 24


def row_losses(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    divergence: Divergence | CrossEntropy,
    temperature: float,
    hard_weight: float,
    gradient: Tensor | None,
) -> Tensor:
    """The losses of rows of logits [N, V], as `ops.row_losses`: writes `gradient` (which may be `student`)."""
    accumulate = torch.float64 if student.dtype == torch.float64 else torch.float32
    losses = student.new_zeros(len(student), dtype=accumulate)  # [N]
    step = max(1, CHUNK_ELEMENTS // max(1, student.shape[1]))
    for start in range(0, len(student), step):
        rows = slice(start, start + step)
        chunk = [None if x is None else x[rows] for x in (student, teacher, labels)]
        losses[rows], slope = _rows(*chunk, divergence, temperature, hard_weight, accumulate)
        if gradient is not None:
            gradient[rows] = slope.to(gradient.dtype)
    return losses


def _rows(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    divergence: Divergence | CrossEntropy,
    temperature: float,
    hard_weight: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    z = student.to(dtype)  # [n, V]
    losses, gradient = z.new_zeros(len(z)), torch.zeros_like(z)
    if teacher is not None:
        a, b = _log_softmax(teacher.to(dtype) / temperature), _log_softmax(z / temperature)
        value, slope = alpha_beta_terms(a, b, *divergence.parameters)
        losses += (1 - hard_weight) * value.sum(1)
        projected = slope - b.exp() * slope.sum(1, keepdim=True)  # through log-softmax
        gradient += (1 - hard_weight) / temperature * projected
    if labels is not None:
        kept = labels != -100
        if hard_weight:
            b = _log_softmax(z)
            target = labels.clamp(min=0)[:, None]  # [n, 1]
            losses -= hard_weight * b.gather(1, target)[:, 0]
            gradient += hard_weight * (b.exp() - torch.zeros_like(b).scatter_(1, target, 1.0))
        losses = torch.where(kept, losses, 0.0)
        gradient = torch.where(kept[:, None], gradient, 0.0)
    return losses, gradient


def _log_softmax(logits: Tensor) -> Tensor:
    logits = logits.clamp(min=LOG_FLOOR)
    return (logits - logits.logsumexp(1, keepdim=True)).clamp(min=LOG_FLOOR)


def alpha_beta_terms(a: Tensor, b: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """Each token's share of the alpha-beta divergence and its derivative by log q, from a = log p and b = log q.

    With d = b - a and s = alpha + beta, the share is (W(s) - W(beta)) / alpha, where W(x) = p^s (e^(x d) - 1) / x is
    anchored at the larger of its two powers. Where |beta| is larger the roles are swapped, and where both
    exponents times d are small the power series of p^s Int_0^d e^(beta t) (e^(alpha t) - 1) / alpha dt takes over.
    """
    s, d = alpha + beta, b - a
    top = MAX_EXPONENT[a.dtype]

    def power(exponent: Tensor) -> Tensor:
        return exponent.clamp(max=top).exp()

    def difference(x: float, low: Tensor, high: Tensor) -> Tensor:
        """(e^high - e^low) / x where high - low = x d."""
        if x == 0:
            return power(low) * d
        rising = power(high) * -torch.expm1(-(x * d).clamp(min=0)) / x
        return torch.where(x * d > 0, rising, power(low) * torch.expm1((x * d).clamp(max=0)) / x)

    exponent_p, exponent_m, exponent_q = s * a, s * a + beta * d, s * a + s * d
    slope = difference(alpha, exponent_m, exponent_q)
    if abs(alpha) >= abs(beta):
        rest = difference(s, exponent_p, exponent_q) - difference(beta, exponent_p, exponent_m)
        value = rest / (alpha or 1.0)
    else:
        value = (slope - difference(s, exponent_p, exponent_q)) / beta
    x, y = beta * d, s * d
    h, term, total = 1.0, 0.5, torch.full_like(d, 0.5)
    for k in range(1, 14):  # complete homogeneous polynomials h_k(beta d, s d) over (k + 2)!
        h = h * x + y**k
        term = term / (k + 2)
        total = total + h * term
    small = torch.maximum(torch.maximum(x.abs(), y.abs()), (alpha * d).abs()) < 0.25
    return torch.where(small, power(exponent_p) * d * d * total, value), slope
