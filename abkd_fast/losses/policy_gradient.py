"""MiniLLM's loss: a clipped policy gradient and the reverse KL divergence, from one set of logits."""

import torch
from torch import Tensor

from .arguments import LinearHead, LogitMap, LossSpec, Rows, check_loss, loss_dtype
from .chunks import Chunks, HeadGradients
from .divergences import ReverseKL
from .fused_linear import need_gradients, pair_heads, saved_gradients
from .reference import SLOPE, STUDENT_LSE, TEACHER_LSE
from .row_ops import measure_rows, row_gradients

REVERSE_KL = LossSpec(ReverseKL())


def policy_rows(
    rows: Rows,
    advantages: Tensor,
    log_probs: Tensor,
    clip_ratio: float,
    gradient: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """KL(q, p) [N] of rows whose divergence is the reverse KL, and the ratios r = q(label) / e^log_probs [N].

    Both have the type of the losses, as advantages and log_probs [N] must. `gradient` [N, V], which may be
    `rows.student`, receives `scale` times the derivative of each row's KL(q, p) + `clipped_surrogate` by the student's
    logits. Every label is a token. No autograd.
    """
    labels = rows.labels[:, None]
    divergences, statistics = measure_rows(rows)
    of_student, of_teacher = (x.gather(1, labels)[:, 0].double() for x in (rows.student, rows.teacher))
    log_q, log_p = rows.spec.student_map(of_student), rows.spec.teacher_map(of_teacher)
    log_q, log_p = log_q - statistics[:, STUDENT_LSE], log_p - statistics[:, TEACHER_LSE]
    ratios = (log_q - log_probs).exp().to(divergences.dtype)
    if gradient is not None:
        # The derivative is u - q slope + w (q - onehot), with w from the surrogate. The kernel makes all but the
        # label's: there the terms may cancel, which a gradient of 16 bits could not make good.
        weights = torch.where(is_clipped(ratios, advantages, clip_ratio), 0.0, advantages * ratios)
        of_label = log_q.exp() * (log_q - log_p - statistics[:, SLOPE]) + weights * log_q.expm1()
        statistics[:, SLOPE] -= weights
        row_gradients(rows, statistics, torch.full_like(divergences, scale), gradient)
        of_label = scale * of_label * rows.spec.student_map.slope(of_student)
        gradient.scatter_(1, labels, of_label[:, None].to(gradient.dtype))
    return divergences, ratios


def clipped_surrogate(ratios: Tensor, advantages: Tensor, clip_ratio: float) -> Tensor:
    """PPO's loss max(-A r, -A clip(r, 1 - clip_ratio, 1 + clip_ratio)) of each row (arXiv 1707.06347, equation 7)."""
    return -torch.minimum(advantages * ratios, advantages * ratios.clamp(1 - clip_ratio, 1 + clip_ratio))


def is_clipped(ratios: Tensor, advantages: Tensor, clip_ratio: float) -> Tensor:
    """Whether the surrogate has no gradient: the ratio is beyond the bound to which the advantage pulls it."""
    return torch.where(advantages >= 0, ratios > 1 + clip_ratio, ratios < 1 - clip_ratio)


class _PolicyGradient(torch.autograd.Function):
    """The sum of divergences and surrogates, the divergences [N] and the ratios [N].

    The forward pass makes the gradients of the sum.
    """

    @staticmethod
    def forward(
        ctx,  # noqa: ANN001
        need: list[bool],
        labels: Tensor,
        advantages: Tensor,
        log_probs: Tensor,
        clip_ratio: float,
        scale: float,
        maps: list[float],
        teacher: LinearHead,
        *student: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        student = LinearHead(*student)
        dtype = loss_dtype(student.hidden)
        advantages, log_probs = advantages.to(dtype), log_probs.to(dtype)
        with torch.autocast(student.hidden.device.type, enabled=False):
            spec = LossSpec.of(REVERSE_KL.divergence, 1.0, 0.0, maps)
            chunks = Chunks(student, teacher, labels, spec, 0, dtype)
            gradients = HeadGradients(chunks, need)
            divergences, ratios, surrogates = (torch.zeros_like(advantages) for _ in range(3))
            for index, rows in chunks:
                gradient = chunks.gradient_of(rows) if any(need) else None
                policy = advantages[index], log_probs[index], clip_ratio
                divergences[index], ratios[index] = policy_rows(rows, *policy, gradient, scale)
                surrogates[index] = clipped_surrogate(ratios[index], advantages[index], clip_ratio)
                if gradient is not None:
                    gradients.add(index, gradient)
        ctx.need, ctx.dtypes = need, [None if x is None else x.dtype for x in student.tensors]
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(divergences, ratios)
        return scale * (divergences + surrogates).sum(), divergences, ratios

    @staticmethod
    def backward(ctx, upstream: Tensor, *_: Tensor) -> tuple:  # noqa: ANN001
        return *[None] * 8, *saved_gradients(ctx, upstream)


def fused_linear_policy_gradient(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    advantages: Tensor,
    log_probs: Tensor,
    clip_ratio: float,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum over tokens of KL(q, p) + max(-A r, -A clip(r, 1 - clip_ratio, 1 + clip_ratio)), r = q(label) / b(label).

    This is MiniLLM's loss: PPO's clipped policy gradient for samples of a policy b, and the exact divergence of the
    next token. Both come from the same logits, so it costs hardly more than the divergence alone.

    Args:
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, and the factors and
            softcaps of both: as in `fused_linear_divergence`.
        labels: [N], the tokens that the policy b chose; rows with -100 don't count. Labels may stay on the CPU.
        advantages: [N], A. log_probs: [N], log b(label). Both on the student's device.
        scale: multiplies the sum, at no cost.

    Returns: the sum, differentiable by student_hidden, student_weight and student_bias; then KL(q, p) [N] and r [N],
        which have no gradients. All are float32 (float64 for float64 hidden states).

    Raises ValueError for shapes and sizes that don't fit together.

    Source: MiniLLM (arXiv 2306.08543), section 2.2. The gradient by the logits is q (d - KL(q, p)) with
    d = log q - log p, plus -A r (onehot - q) if r is not clipped.
    """
    student = LinearHead(student_hidden, student_weight, student_bias)
    teacher = LinearHead(teacher_hidden, teacher_weight, teacher_bias)
    student, teacher, _ = pair_heads(student, teacher)
    maps = LogitMap(student_logit_scale, student_softcap or 0.0), LogitMap(teacher_logit_scale, teacher_softcap or 0.0)
    spec = REVERSE_KL._replace(student_map=maps[0], teacher_map=maps[1])
    labels = check_loss(spec._replace(hard_weight=1.0), "sum", labels, len(student_hidden))
    for name, values in (("advantages", advantages), ("log_probs", log_probs)):
        if values.shape != labels.shape:
            raise ValueError(f"{name} have shape {list(values.shape)}, expected [{len(labels)}], one for each label")
    need = need_gradients(student)
    return _PolicyGradient.apply(
        need, labels, advantages, log_probs, clip_ratio, scale, spec.maps, teacher, *student.tensors
    )
