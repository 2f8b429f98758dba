"""The row kernel's mathematics in plain PyTorch: slow, memory-hungry, and obviously right.

It replaces the extension if that is missing, in chunks of rows, and is one of the two oracles of the tests.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .arguments import Rows, loss_dtype
from .divergences import Divergence, Family

LOG_FLOOR = -1e30  # two masked logits (-inf) then differ by exactly 0
MAX_EXPONENT = {torch.float32: 64.0, torch.float64: 640.0}  # a term saturates at e^this
CHUNK_ELEMENTS = 1 << 24
# What the gradient of a row needs besides the logits, as `struct Statistics` in csrc/row_call.h: log sum exp of
# z / temperature, y / temperature and z, the sum of slopes, and two numbers that the divergence decided for the row.
STUDENT_LSE, TEACHER_LSE, PLAIN_LSE, SLOPE, STATE = range(5)
STATISTICS = 6
BOTH_BRANCHES = -1.0  # as the first of these two, for AlphaNet's `row_sums`


def row_losses(
    rows: Rows, gradient: Tensor | None = None, statistics: Tensor | None = None, upstream: Tensor | None = None
) -> Tensor:
    """`row_ops.row_losses` in plain PyTorch."""
    losses = rows.student.new_zeros(len(rows.student), dtype=loss_dtype(rows.student))
    for part, chunk in _chunks(rows):
        loss, slope, measured = _measure(chunk)
        losses[part] = loss.to(losses.dtype)
        if gradient is not None:
            slope = slope * rows.spec.student_map.slope(_wide(rows.student[part]))
            gradient[part] = (slope if upstream is None else slope * upstream[part, None]).to(gradient.dtype)
        if statistics is not None:
            statistics[part] = measured.to(statistics.dtype)
    return losses


def row_gradients(rows: Rows, statistics: Tensor, upstream: Tensor, gradient: Tensor) -> None:
    """`row_ops.row_gradients` in plain PyTorch."""
    for part, chunk in _chunks(rows):
        slope = _measure(chunk, statistics[part])[1] * rows.spec.student_map.slope(_wide(rows.student[part]))
        gradient[part] = (slope * upstream[part, None]).to(gradient.dtype)


def row_normalizers(rows: Rows, statistics: Tensor) -> None:
    """`row_ops.row_normalizers` in plain PyTorch, written to `statistics`."""
    for part, chunk in _chunks(rows):
        statistics[part] = _normalizers(chunk).to(statistics.dtype)


def row_sums(rows: Rows, statistics: Tensor) -> Tensor:
    """`row_ops.row_sums` in plain PyTorch."""
    values = rows.student.new_zeros(len(rows.student), dtype=loss_dtype(rows.student))
    for part, chunk in _chunks(rows):
        a, b = log_probs(chunk, statistics[part])
        if chunk.spec.divergence.family == Family.ALPHA_NET and (statistics[part, STATE] == BOTH_BRANCHES).all():
            both = [alpha_beta_terms(a, b, x, 1.0 - x)[0].sum(1) for x in chunk.spec.divergence.parameters]
            values[part], statistics[part, SLOPE] = both[0].to(values.dtype), both[1].to(statistics.dtype)
            continue
        value, slope, _ = terms(a, b, rows.spec.divergence, statistics[part, STATE:].to(a.dtype))
        values[part], statistics[part, SLOPE] = value.sum(1).to(values.dtype), slope.sum(1).to(statistics.dtype)
    return values


def _chunks(rows: Rows) -> Iterator[tuple[slice, Rows]]:
    """Parts of the rows, with logits in float64, and as the models' maps change them."""
    student, teacher, labels, spec = rows
    step = max(1, CHUNK_ELEMENTS // max(1, student.shape[1]))
    for part in (slice(start, start + step) for start in range(0, len(student), step)):
        logits = (student, spec.student_map), (teacher, spec.teacher_map)
        z, y = (None if x is None else map(_wide(x[part])) for x, map in logits)
        yield part, Rows(z, y, None if labels is None else labels[part], spec)


def _measure(rows: Rows, given: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [n] (meaningless if statistics are given), their gradient [n, V], and the statistics [n, 6].

    The models' maps are in the logits already, and not yet in the gradient."""
    z, y, labels, (divergence, temperature, hard_weight, *_) = rows
    statistics = _normalizers(rows) if given is None else given.to(z.dtype)
    losses, gradient = z.new_zeros(len(z)), torch.zeros_like(z)
    if y is not None:
        a, b = log_probs(rows, statistics)
        value, slope, state = terms(a, b, divergence, None if given is None else statistics[:, STATE:])
        if given is None:
            statistics[:, SLOPE], statistics[:, STATE:] = slope.sum(1), state
        losses += (1 - hard_weight) * value.sum(1)
        projected = slope - b.exp() * statistics[:, SLOPE, None]  # through log-softmax
        gradient += (1 - hard_weight) / temperature * projected
    if labels is not None:
        kept = labels != -100
        if hard_weight:
            b = _log_probs(z, statistics[:, PLAIN_LSE])
            if given is None:
                losses -= hard_weight * b.gather(1, labels.clamp(min=0)[:, None])[:, 0]
            is_label = labels[:, None] == torch.arange(z.shape[1], device=z.device)  # no token is, for -1
            gradient += hard_weight * (b.exp() - is_label.to(b.dtype))
        losses = torch.where(kept, losses, 0.0)
        gradient = torch.where(kept[:, None], gradient, 0.0)
    return losses, gradient, statistics


def _wide(logits: Tensor) -> Tensor:
    """In float64, because plain formulas cancel near p = q. Apple's devices have only float32."""
    return logits.to(torch.float32 if logits.device.type == "mps" else torch.float64)


def _normalizers(rows: Rows) -> Tensor:
    """Statistics [n, 6] with nothing but the log-normalizers."""
    statistics = rows.student.new_zeros(len(rows.student), STATISTICS)
    if rows.teacher is not None:
        statistics[:, STUDENT_LSE] = _log_sum_exp(rows.student / rows.spec.temperature)
        statistics[:, TEACHER_LSE] = _log_sum_exp(rows.teacher / rows.spec.temperature)
    if rows.spec.hard_weight:
        statistics[:, PLAIN_LSE] = _log_sum_exp(rows.student)
    return statistics


def _log_sum_exp(logits: Tensor) -> Tensor:
    return logits.clamp(min=LOG_FLOOR).logsumexp(1).clamp(min=LOG_FLOOR)


def _log_probs(logits: Tensor, normalizer: Tensor) -> Tensor:
    return (logits.clamp(min=LOG_FLOOR) - normalizer[:, None]).clamp(min=LOG_FLOOR)


def log_probs(rows: Rows, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """log p and log q [n, V] in float64, of logits whose log-normalizers are in `statistics`."""
    a, b = (_wide(x) / rows.spec.temperature for x in (rows.teacher, rows.student))
    return _log_probs(a, statistics[:, TEACHER_LSE].to(a)), _log_probs(b, statistics[:, STUDENT_LSE].to(b))


def terms(
    a: Tensor, b: Tensor, divergence: Divergence, state: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | float]:
    """Each token's share of the divergence and its derivative by log q, from a = log p and b = log q, all [n, V].

    The third result is what the divergence decides for each row, [n, 2]: `state` if that is given, and 0 if the
    divergence decides nothing.
    """
    match divergence.family:
        case Family.ALPHA_BETA:
            return *alpha_beta_terms(a, b, *divergence.parameters), 0.0
        case Family.ALPHA_NET:
            pairs = [alpha_beta_terms(a, b, alpha, 1.0 - alpha) for alpha in divergence.parameters]
            if state is None:
                second = pairs[0][0].sum(1) < pairs[1][0].sum(1)
                state = torch.stack((torch.zeros_like(second), second), 1).to(a.dtype)
            first = state[:, 1:] == 0
            return *(torch.where(first, left, right) for left, right in zip(*pairs, strict=True)), state
        case Family.WEIGHTED_KL:
            return *kl_terms(a, b, *divergence.parameters), 0.0
        case Family.BALANCED_KL:
            state = entropy_weights(entropies(a, b)) if state is None else state
            return *kl_terms(a, b, *state.split(1, 1)), state
        case Family.ADAPTIVE_KL:
            state = gap_weights(gaps(a, b, head(a, *divergence.parameters))) if state is None else state
            return *kl_terms(a, b, *state.split(1, 1)), state
        case Family.MIXTURE:
            return *mixture_terms(a, b, *divergence.parameters), 0.0
        case Family.TOTAL_VARIATION:
            p, q = a.exp(), b.exp()
            return (p - q).abs() / 2, q * (b - a).sign() / 2, 0.0
    raise ValueError(f"{divergence} compares no distributions")


def is_bounded(divergence: Divergence) -> bool:
    """Whether the divergence has a bound. The kernels may then center its slopes: see csrc/divergence/mixture.h."""
    if divergence.family == Family.ALPHA_BETA:
        return min(divergence.parameters) > 0 and sum(divergence.parameters) == 1
    return divergence.family in (Family.MIXTURE, Family.TOTAL_VARIATION)


def is_centered(a: Tensor, b: Tensor, divergence: Divergence) -> Tensor:
    """Whether the kernels center a row's slopes, if a = log p and b = log q are those of the student's likeliest token.

    They do if the divergence is bounded and this slope is closer to what it would be at p = 0 than to 0.
    """
    if not is_bounded(divergence):
        return torch.zeros_like(a, dtype=torch.bool)
    _, slope, _ = terms(a, b, divergence)
    _, without_teacher, _ = terms(torch.full_like(a, LOG_FLOOR), b, divergence)
    return 2 * slope > without_teacher


def kl_terms(a: Tensor, b: Tensor, forward: float | Tensor, reverse: float | Tensor) -> tuple[Tensor, Tensor]:
    """forward KL(p, q) + reverse KL(q, p). With sum (q - p) and sum (p - q), both 0, added no term is negative."""
    p, q, d = a.exp(), b.exp(), b - a
    return forward * (q - p - p * d) + reverse * (p - q + q * d), forward * (q - p) + reverse * q * d


def entropies(a: Tensor, b: Tensor) -> Tensor:
    """The entropies of teacher and student, [n, 2]."""
    return torch.stack([-(x.exp() * x).sum(1) for x in (a, b)], 1)


def entropy_weights(entropies: Tensor) -> Tensor:
    """BDKD: the weights [n, 2] of both directions."""
    return 1.0 + 2.0 * (entropies > entropies.flip(1))


def head(a: Tensor, mu: float) -> Tensor:
    """AKL: which tokens [n, V] are in the teacher's head."""
    ordered = a.sort(1, descending=True).values
    mass = ordered.exp().cumsum(1)
    # The first token that no longer fits. Tokens that tie with it do not fit either.
    beyond = ordered.gather(1, (mass <= mu).sum(1, keepdim=True).clamp(max=a.shape[1] - 1))
    return (a > beyond) | (a == ordered[:, :1])


def gaps(a: Tensor, b: Tensor, head: Tensor) -> Tensor:
    """AKL: the sums of |p - q| over the tokens of the head and over all tokens, [n, 2]."""
    gap = (a.exp() - b.exp()).abs()
    return torch.stack(((gap * head).sum(1), gap.sum(1)), 1)


def gap_weights(gaps: Tensor) -> Tensor:
    """AKL: the weights [n, 2] of both directions, which are the shares of head and tail in the gaps."""
    of_head, total = gaps.unbind(1)
    share = torch.where(total > 0, of_head / total, 0.5)
    return torch.stack((share, 1 - share), 1)


def mixture_terms(
    a: Tensor, b: Tensor, weight: float, from_student: float, from_teacher: float
) -> tuple[Tensor, Tensor]:
    """from_student KL(q, m) + from_teacher KL(p, m), with m = (1 - weight) p + weight q.

    sum (m - q) and sum (m - p), both 0, are added."""
    log_m = torch.logaddexp(a + math.log1p(-weight), b + math.log(weight))
    p, q, m = a.exp(), b.exp(), log_m.exp()
    student, teacher = b - log_m, a - log_m  # log-ratios
    value = from_student * (q * student - q + m) + from_teacher * (p * teacher - p + m)
    inner = from_student * (student - weight * torch.expm1(student)) - from_teacher * weight * torch.expm1(teacher)
    return value, q * inner


def alpha_beta_terms(a: Tensor, b: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """Each token's share of the alpha-beta divergence and its derivative by log q, from a = log p and b = log q.

    With d = b - a and s = alpha + beta, the share is (W(s) - W(beta)) / alpha. W(x) = p^s (e^(x d) - 1) / x is made
    from the larger of its two powers. If |beta| is larger than |alpha|, the roles are swapped. If both exponents times
    d are small, the power series of p^s Int_0^d e^(beta t) (e^(alpha t) - 1) / alpha dt takes over.
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
