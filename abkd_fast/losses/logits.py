"""The divergence between logits, with its autograd."""

import torch
from torch import Tensor

from . import row_ops
from .arguments import LossSpec, Rows, check_label_range, check_loss, count_kept, loss_dtype, shared_vocabulary
from .divergences import Divergence, parse


@torch.library.custom_op("abkd_fast::divergence", mutates_args=())
def _divergence(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    divergence: str,
    temperature: float,
    hard_weight: float,
    factors: Tensor | None,
    need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of losses times factors [N], the losses [N], and the gradient [N, V] of the sum."""
    rows = Rows(student, teacher, labels, LossSpec(parse(divergence), temperature, hard_weight))
    if labels is not None:
        check_label_range(labels, rows.spec, student.shape[1])
    gradient = row_ops.new_large(student, *student.shape, dtype=student.dtype) if need_gradient else None
    if rows.spec.divergence.per == "batch":
        losses, statistics = row_ops.choose_branch(*row_ops.measure_rows(rows))
        if gradient is not None:
            row_ops.row_gradients(rows, statistics, torch.ones_like(losses) if factors is None else factors, gradient)
    else:
        losses = row_ops.row_losses(rows, gradient, upstream=factors)
    total = losses.sum() if factors is None else (losses * factors).sum()
    return total, losses, student.new_empty(0) if gradient is None else gradient


@_divergence.register_fake
def _(student, *arguments):  # noqa: ANN001
    need_gradient = arguments[-1]
    losses = student.new_empty(student.shape[0], dtype=loss_dtype(student))
    return losses.new_empty(()), losses, student.new_empty(student.shape if need_gradient else (0,))


def _save(ctx, inputs, output) -> None:  # noqa: ANN001
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2])


def _backward(ctx, of_total: Tensor, of_losses: Tensor, _: Tensor) -> tuple:  # noqa: ANN001
    row_ops.refuse_second_derivative()
    upstream = of_total if of_losses is None else of_losses[:, None]
    gradient = None if upstream is None else row_ops.scaled(ctx.saved_tensors[0], upstream)
    return gradient, *[None] * 7


_divergence.register_autograd(_backward, setup_context=_save)


def divergence_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: Divergence,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The divergence between the distributions of teacher and student, from logits; differentiable by the student's.

    Args:
        student_logits, teacher_logits: [N, V] or [B, T, V], as models give them; float32, float64, bfloat16 or float16,
            each in its own type (16 bits are read as such, and computed in float32). Vocabularies that differ by
            padding are compared over their common prefix.
        divergence: for example `AlphaBeta(0.2, 0.7)`; `abkd_fast.losses.divergences` has them all.
        labels: [N] or [B, T] integers; that of a row of logits is the token that follows it. Rows with -100 don't
            count. Other labels matter only with `hard_weight`.
        temperature: divides both logits inside the divergence. The loss is not multiplied by its square.
        hard_weight: w in (1 - w) divergence + w cross-entropy. The cross-entropy is at temperature 1.
        reduction: "mean" over the rows that count, "sum", or "none" ([N] or [B, T], 0 for rows that don't).

    Returns: float32 (float64 for float64 logits).

    Raises ValueError for shapes, sizes or numbers that don't fit together. On a GPU a label that the vocabulary lacks
    makes the loss infinite.

    The forward pass makes the gradient [N, V] with the losses, in the type of the logits, and keeps nothing else for
    backward.

    Source: ABKD (arXiv 2505.04560), equation 5. The gradient is u - q sum(u), u = p^a q^b ((q / p)^a - 1) / a.
    """
    shape = student_logits.shape[:-1]
    if len(shape) not in (1, 2) or teacher_logits.shape[:-1] != shape:
        shapes = f"{list(student_logits.shape)} and {list(teacher_logits.shape)}"
        raise ValueError(
            f"student and teacher logits have shapes {shapes}, expected [N, V] or [B, T, V], alike but for V"
        )
    if labels is not None and len(shape) == 2:
        if labels.shape != shape:
            raise ValueError(
                f"labels have shape {list(labels.shape)}, expected {list(shape)}, one for each row of logits"
            )
        labels = labels.reshape(-1)
    student_logits, teacher_logits = student_logits.flatten(0, -2), teacher_logits.flatten(0, -2)
    if not student_logits.is_floating_point():
        raise ValueError(f"student logits are {student_logits.dtype}, expected a floating-point type")
    labels = check_loss(LossSpec(divergence, temperature, hard_weight), reduction, labels, len(student_logits))
    vocab = shared_vocabulary(student_logits.shape[1], teacher_logits.shape[1])
    student, teacher = student_logits[:, :vocab], teacher_logits[:, :vocab].detach()
    if (student.dtype == torch.float64) != (teacher.dtype == torch.float64) or not teacher.is_floating_point():
        teacher = teacher.to(loss_dtype(student))
    student, teacher = (x if x.stride(1) == 1 else x.contiguous() for x in (student, teacher))
    factors = None
    if reduction == "mean":
        factors = count_kept(labels, student).reciprocal().expand(len(student)).contiguous()  # [N]
    need_gradient = torch.is_grad_enabled() and student.requires_grad
    options = str(divergence), temperature, hard_weight, factors, need_gradient
    total, losses, _ = _divergence(student, teacher, labels, *options)
    return losses.view(shape) if reduction == "none" else total
