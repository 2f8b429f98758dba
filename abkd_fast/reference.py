"""The row kernel's mathematics in plain PyTorch: slow, memory-hungry, and obviously right.

It takes over, in chunks, where the extension is missing, and is one of the two oracles of the tests.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .divergences import Divergence, Family

LOG_FLOOR = -1e30  # two masked logits (-inf) then differ by exactly 0
MAX_EXPONENT = {torch.float32: 64.0, torch.float64: 640.0}  # beyond e^this a term saturates
CHUNK_ELEMENTS = 1 << 24
# Columns of the statistics: log sum exp z / temperature, the sum of a row's slopes, and which branch of AlphaNet it
# takes. The others are the kernels' own.
STUDENT_LSE, SLOPE, BRANCH = 0, 3, 4


def row_losses(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    divergence: Divergence,
    temperature: float,
    hard_weight: float,
    gradient: Tensor | None,
    statistics: Tensor | None = None,
    upstream: Tensor | None = None,
) -> Tensor:
    """The losses of rows of logits [N, V], as `ops.row_losses`: writes `gradient` (which may be `student`)."""
    losses = student.new_zeros(len(student), dtype=torch.promote_types(student.dtype, torch.float32))  # [N]
    for rows in _chunks(student):
        chunk = [None if x is None else x[rows] for x in (student, teacher, labels)]
        loss, slope, measured = _rows(*chunk, divergence, temperature, hard_weight, None)
        losses[rows] = loss.to(losses.dtype)
        if gradient is not None:
            gradient[rows] = (slope if upstream is None else slope * upstream[rows, None]).to(gradient.dtype)
        if statistics is not None:
            for column, numbers in measured.items():
                statistics[rows, column] = numbers.to(statistics.dtype)
    return losses


def row_gradients(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    divergence: Divergence,
    temperature: float,
    hard_weight: float,
    statistics: Tensor,
    upstream: Tensor,
    gradient: Tensor,
) -> None:
    """The gradients of `ops.row_gradients`, made afresh: of the statistics only branch and slope are read."""
    for rows in _chunks(student):
        chunk = [None if x is None else x[rows] for x in (student, teacher, labels)]
        options = divergence, temperature, hard_weight, statistics[rows]
        gradient[rows] = (_rows(*chunk, *options)[1] * upstream[rows, None]).to(gradient.dtype)


def _chunks(logits: Tensor) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, logits.shape[1]))
    return [slice(start, start + step) for start in range(0, len(logits), step)]


def _rows(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    divergence: Divergence,
    temperature: float,
    hard_weight: float,
    statistics: Tensor | None,
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """Losses [n], their gradient [n, V], and the columns of the statistics, which are those given if any are."""
    # Wide, for plain formulas cancel where p is near q; Apple's devices have no float64.
    dtype = torch.float32 if student.device.type == "mps" else torch.float64
    z = student.to(dtype)  # [n, V]
    losses, gradient, measured = z.new_zeros(len(z)), torch.zeros_like(z), {}
    if teacher is not None:
        a, b = _log_softmax(teacher.to(dtype) / temperature), _log_softmax(z / temperature)
        value, slope, branch = terms(a, b, divergence, None if statistics is None else statistics[:, BRANCH].to(dtype))
        total = slope.sum(1) if statistics is None else statistics[:, SLOPE].to(dtype)
        measured = {STUDENT_LSE: (z / temperature).logsumexp(1), SLOPE: total}
        if branch is not None:
            measured[BRANCH] = branch
        losses += (1 - hard_weight) * value.sum(1)
        projected = slope - b.exp() * total[:, None]  # through log-softmax
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
    return losses, gradient, measured


def _log_softmax(logits: Tensor) -> Tensor:
    logits = logits.clamp(min=LOG_FLOOR)
    return (logits - logits.logsumexp(1, keepdim=True)).clamp(min=LOG_FLOOR)


def terms(
    a: Tensor, b: Tensor, divergence: Divergence, branch: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Each token's share of the divergence and its derivative by log q, from a = log p and b = log q, all [n, V].

    Also which branch [n] AlphaNet takes: `branch`, or else that of the larger sum.
    """
    match divergence.family:
        case Family.ALPHA_BETA:
            return *alpha_beta_terms(a, b, *divergence.parameters), None
        case Family.ALPHA_NET:
            pairs = [alpha_beta_terms(a, b, alpha, 1.0 - alpha) for alpha in divergence.parameters]
            if branch is None:
                branch = (pairs[0][0].sum(1) < pairs[1][0].sum(1)).double()
            first = (branch == 0)[:, None]
            return *(torch.where(first, left, right) for left, right in zip(*pairs, strict=True)), branch
        case Family.WEIGHTED_KL:
            return *kl_terms(a, b, *divergence.parameters), None
        case Family.BALANCED_KL:
            return *kl_terms(a, b, *entropy_weights(a, b)), None
        case Family.ADAPTIVE_KL:
            head = head_share(a, b, *divergence.parameters)
            return *kl_terms(a, b, head, 1 - head), None
        case Family.MIXTURE:
            return *mixture_terms(a, b, *divergence.parameters), None
        case Family.TOTAL_VARIATION:
            p, q = a.exp(), b.exp()
            return (p - q).abs() / 2, q * (b - a).sign() / 2, None
    raise ValueError(f"{divergence} compares no distributions")


def kl_terms(a: Tensor, b: Tensor, forward: float | Tensor, reverse: float | Tensor) -> tuple[Tensor, Tensor]:
    """forward KL(p, q) + reverse KL(q, p), with sum (q - p) and sum (p - q), both 0, added: no term is negative."""
    p, q, d = a.exp(), b.exp(), b - a
    return forward * (q - p - p * d) + reverse * (p - q + q * d), forward * (q - p) + reverse * q * d


def entropy_weights(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """BDKD: the weights [n, 1] of both directions."""
    teacher, student = (-(x.exp() * x).sum(1, keepdim=True) for x in (a, b))
    return 1.0 + 2.0 * (teacher > student), 1.0 + 2.0 * (student > teacher)


def head_share(a: Tensor, b: Tensor, mu: float) -> Tensor:
    """AKL: the share [n, 1] of sum |p - q| in the teacher's head."""
    ordered = a.sort(1, descending=True).values
    mass = ordered.exp().cumsum(1)
    # The first token that no longer fits; what ties with it does not fit either.
    beyond = ordered.gather(1, (mass <= mu).sum(1, keepdim=True).clamp(max=a.shape[1] - 1))
    head = (a > beyond) | (a == ordered[:, :1])
    gap = (a.exp() - b.exp()).abs()
    total = gap.sum(1, keepdim=True)
    return torch.where(total > 0, (gap * head).sum(1, keepdim=True) / total, 0.5)


def mixture_terms(
    a: Tensor, b: Tensor, weight: float, from_student: float, from_teacher: float
) -> tuple[Tensor, Tensor]:
    """from_student KL(q, m) + from_teacher KL(p, m), m = (1 - weight) p + weight q, each sum with 0 = sum (m - q) or
    sum (m - p) added."""
    log_m = torch.logaddexp(a + math.log1p(-weight), b + math.log(weight))
    p, q, m = a.exp(), b.exp(), log_m.exp()
    student, teacher = b - log_m, a - log_m  # log-ratios
    value = from_student * (q * student - q + m) + from_teacher * (p * teacher - p + m)
    inner = from_student * (student - weight * torch.expm1(student)) - from_teacher * weight * torch.expm1(teacher)
    return value, q * inner


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

    exponent_p, exponent_m, exponent_q = s * a, s * a + beta * d, s * b
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
