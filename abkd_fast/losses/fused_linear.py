"""The losses of hidden states and output projections, whose logits are never held as a whole.

For each chunk of tokens (`chunks.py`) one row kernel turns the logits into losses and, in place, into their gradient.
No probability is stored. No logit is computed twice, except for `reduction="none"` and for AlphaNet per batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .arguments import LinearHead, LossSpec, check_head, check_loss, count_kept, loss_dtype, shared_vocabulary
from .chunks import Chunks, HeadGradients
from .divergences import CrossEntropy, Divergence, parse
from .row_ops import (
    STATISTICS,
    choose_branch,
    decides_per_batch,
    measure_rows,
    refuse_second_derivative,
    row_gradients,
    row_losses,
    scaled,
)
from .vocab_parallel import Shard, divide_vocabulary, local_parts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _losses_and_gradients(
    student: LinearHead,
    teacher: LinearHead | None,
    labels: Tensor | None,
    spec: LossSpec,
    chunk_tokens: int,
    logits_dtype: torch.dtype,
    shard: Shard | None,
    need: list[bool],
    upstream: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses [N], and the gradients of their sum by hidden states, projection and bias where `need` says so.

    With `upstream` [N] the gradients are those of the sum of upstream times losses. They are float32 (float64 for
    float64 hidden states), and not divided by the number of rows. `shard` is the part of the vocabulary that the
    projections have; None is all of it.
    """
    with torch.autocast(student.hidden.device.type, enabled=False):
        chunks = Chunks(student, teacher, labels, chunk_tokens, logits_dtype, shard)
        gradients = HeadGradients(chunks, need)
        losses, statistics = chunks.new_losses(), None
        measure = measure_rows if shard is None else shard.measure_rows
        if decides_per_batch(spec.divergence):
            losses, statistics = _measure_branches(chunks, spec, measure)
            if not any(need):
                return losses, *gradients
        for rows, *logits_and_labels in chunks:
            operands = *logits_and_labels, spec
            gradient = logits_and_labels[0] if any(need) else None
            factors = None if upstream is None else upstream[rows].contiguous()
            if statistics is None and shard is None:
                losses[rows] = row_losses(*operands, gradient=gradient, upstream=factors)
            else:
                if statistics is None:
                    losses[rows], measured = measure(*operands)
                else:
                    measured = statistics[rows]
                if gradient is not None:
                    factors = losses.new_ones(len(gradient)) if factors is None else factors
                    row_gradients(*operands, measured, factors, gradient)
            if gradient is not None:
                gradients.add(rows, gradient)
        if shard is not None and need[0]:
            shard.sum(gradients.hidden)
    return losses, *gradients


def _measure_branches(chunks: Chunks, spec: LossSpec, measure: Callable) -> tuple[Tensor, Tensor]:
    """AlphaNet per batch: measures all chunks, then takes one branch for all rows. Losses [N] and statistics [N, 6]."""
    losses = chunks.new_losses().repeat(2, 1)
    statistics = losses.new_zeros(*losses.shape, STATISTICS, dtype=torch.float64)
    for rows, *logits_and_labels in chunks:
        losses[:, rows], statistics[:, rows] = measure(*logits_and_labels, spec)
    return choose_branch(losses, statistics)


@torch.library.custom_op("abkd_fast::fused_linear", mutates_args=())
def _fused_linear(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    divergence: str,
    temperature: float,
    hard_weight: float,
    chunk_tokens: int,
    logits_dtype: torch.dtype,
    group: str,
    first: int,
    widest: int,
    need: list[bool],
    upstream: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum of the losses, the losses [N], and the gradients of the sum by hidden states, projection and bias.

    `divergence` is empty for the cross-entropy alone. `group`, `first` and `widest` are a `Shard`; `group` is empty if
    the projections are whole.
    """
    losses, *gradients = _losses_and_gradients(
        LinearHead(student_hidden, student_weight, student_bias),
        None if teacher_hidden is None else LinearHead(teacher_hidden, teacher_weight, teacher_bias),
        labels,
        LossSpec(parse(divergence) if divergence else CrossEntropy(), temperature, hard_weight),
        chunk_tokens,
        logits_dtype,
        Shard(group, first, widest) if group else None,
        need,
        upstream,
    )
    return losses.sum(), losses, *gradients


@_fused_linear.register_fake
def _(student_hidden, student_weight, *arguments):  # noqa: ANN001
    (*_, need, _) = arguments
    dtype = loss_dtype(student_hidden)

    def like(needed: bool, *shape: int) -> Tensor:
        return student_hidden.new_empty(shape if needed else (0,), dtype=dtype)

    tokens, vocab = student_hidden.shape[0], student_weight.shape[0]
    gradients = like(need[0], *student_hidden.shape), like(need[1], *student_weight.shape), like(need[2], vocab)
    return student_hidden.new_empty((), dtype=dtype), like(True, tokens), *gradients


def _save(ctx, inputs, output) -> None:  # noqa: ANN001
    ctx.set_materialize_grads(False)
    ctx.need = inputs[-2]
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.save_for_backward(*output[2:])


def _backward(ctx, upstream: Tensor, *_: Tensor) -> tuple:  # noqa: ANN001
    return *saved_gradients(ctx, upstream), *[None] * 14


def saved_gradients(ctx, upstream: Tensor | None) -> list[Tensor | None]:  # noqa: ANN001
    """In backward: the gradients by hidden states, projection and bias, from those that the forward pass has saved."""
    refuse_second_derivative()
    return [
        scaled(gradient, upstream).to(dtype) if needed and upstream is not None else None
        for gradient, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.need, strict=True)
    ]


_fused_linear.register_autograd(_backward, setup_context=_save)


class _LossPerRow(torch.autograd.Function):
    """reduction="none": the upstream gradient of each row is known only in backward, which makes the logits again."""

    @staticmethod
    def forward(ctx, need: list[bool], numbers: tuple, *tensors: Tensor | None) -> Tensor:  # noqa: ANN001
        ctx.need, ctx.numbers = need, numbers
        ctx.save_for_backward(*tensors)
        return _fused_linear(*tensors, *numbers, [False] * 3, None)[1]

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple:  # noqa: ANN001
        refuse_second_derivative()
        tensors = ctx.saved_tensors
        gradients = _fused_linear(*tensors, *ctx.numbers, ctx.need, upstream)[2:]
        cast = [
            gradient.to(x.dtype) if needed else None
            for gradient, x, needed in zip(gradients, tensors, ctx.need, strict=False)
        ]
        return None, None, *cast, *[None] * 4


def need_gradients(head: LinearHead) -> list[bool]:
    """Whether hidden states, projection and bias need gradients."""
    return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in head]


def _prefix(rows: Tensor | None, count: int) -> Tensor | None:
    """The first rows. All rows are the tensor itself: the backward pass of a slice would copy the gradient."""
    return rows if rows is None or len(rows) == count else rows[:count]


def pair_heads(
    student: LinearHead, teacher: LinearHead, group: ProcessGroup | None = None
) -> tuple[LinearHead, LinearHead, Shard | None]:
    """Both heads over their shared vocabulary, or over this rank's part of it. The teacher's is detached.

    Raises ValueError for shapes that don't fit together.
    """
    if len(student.hidden) != len(teacher.hidden):
        raise ValueError(f"student_hidden has {len(student.hidden)} rows and teacher_hidden {len(teacher.hidden)}")
    sizes, shard = (len(student.weight), len(teacher.weight)), None
    if group is None:
        vocab = shared_vocabulary(*sizes)
    else:
        vocab, shard = divide_vocabulary(student.hidden, *sizes, group)
    student, teacher = (
        LinearHead(x.hidden, _prefix(x.weight, vocab), _prefix(x.bias, vocab)) for x in (student, teacher)
    )
    check_head("student", student)  # after the exchange, so that no rank waits for one that raises
    check_head("teacher", teacher)
    return student, LinearHead(*(None if x is None else x.detach() for x in teacher)), shard


def _loss(
    student: LinearHead,
    teacher: LinearHead | None,
    labels: Tensor | None,
    spec: LossSpec,
    reduction: str,
    chunk_tokens: int | None,
    logits_dtype: torch.dtype | None,
    shard: Shard | None,
) -> Tensor:
    labels = check_loss(spec, reduction, labels, len(student.hidden))
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, expected a positive number of tokens or None")
    accumulate = loss_dtype(student.hidden)
    allowed = [torch.float64] if accumulate == torch.float64 else [torch.float32, torch.bfloat16, torch.float16]
    if logits_dtype is not None and logits_dtype not in allowed:
        names = " or ".join(map(str, allowed))
        raise ValueError(f"logits_dtype is {logits_dtype}, expected {names} for {student.hidden.dtype} hidden states")
    divergence, temperature, hard_weight = spec
    spelling = "" if teacher is None else str(divergence)
    numbers = (spelling, temperature, hard_weight, chunk_tokens or 0, logits_dtype or accumulate)
    numbers += shard or Shard("", 0, 0)
    tensors = (*student, *(teacher or (None, None, None)), labels)
    need = need_gradients(student)
    if reduction == "none":
        return _LossPerRow.apply(need, numbers, *tensors)
    total, losses, *_ = _fused_linear(*tensors, *numbers, need, None)
    return total if reduction == "sum" else total / count_kept(labels, losses)


def fused_linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    divergence: Divergence,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """`divergence_loss` from hidden states and output projections, without holding the logits as a whole.

    Args:
        student_hidden, teacher_hidden: [N, Hs] and [N, Ht], final hidden states.
        student_weight, teacher_weight: [V, Hs] and [V, Ht], output projections. V may differ by padding.
        divergence, labels, temperature, hard_weight, reduction: as in `divergence_loss`. Rows with label -100 are
            dropped before any product. Labels may stay on the CPU, which spares a GPU one synchronization.
        student_bias, teacher_bias: [V].
        chunk_tokens: rows of logits held at once. None chooses from the vocabulary, the type and the device.
        logits_dtype: the type of a chunk's logits and of their gradient. None is float32 (float64 for float64 hidden
            states). torch.bfloat16 saves memory traffic on a GPU and costs digits: about 5e-3 of the gradient.
        group: the ranks over which the vocabulary is sharded, or None. Weights and biases are then this rank's
            consecutive rows, in the order of ranks, in any sizes. Student and teacher must be cut at the same rows,
            except for padding at the end. All other arguments, and the loss, are the same on all ranks. DTensors placed
            by Shard(0) on a mesh of one dimension need no group, and get DTensors as gradients. Parameters that FSDP
            shards over ranks with different tokens are not allowed.

    Returns: float32 (float64 for float64 hidden states). Differentiable by student_hidden, student_weight and
        student_bias; a gradient that is not required costs nothing. "mean" and "sum" make the gradients in the forward
        pass; "none" makes the logits again in the backward pass.

    With a group, every rank has to call this function, and for "none" also its backward pass. The gradient of the
    hidden states is complete on every rank, added up over the group: it must not be added up again. The gradients of
    projection and bias are those of this rank's rows. The ranks exchange a few numbers per row, in an all-gather and an
    all-reduce per chunk, and [N, Hs] once. For every 4 million logits BDKD takes 1 more all-reduce, and AKL 10 (18 in
    float64). These two decide a row's weights in plain PyTorch in float64; the row kernels do all other work.

    Raises ValueError for shapes, sizes or numbers that don't fit together. With a group, a label beyond the vocabulary
    makes the loss infinite.
    """
    student = LinearHead(student_hidden, student_weight, student_bias)
    teacher = LinearHead(teacher_hidden, teacher_weight, teacher_bias)
    student, teacher, shard = pair_heads(*local_parts(student, teacher, group))
    spec = LossSpec(divergence, temperature, hard_weight)
    return _loss(student, teacher, labels, spec, reduction, chunk_tokens, logits_dtype, shard)


def fused_linear_cross_entropy(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    *,
    student_bias: Tensor | None = None,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The cross-entropy of labels [N] (-100 is ignored) for hidden states [N, H] and an output projection [V, H].

    This is `fused_linear_divergence` without a teacher: arguments, result and errors are the same.
    """
    student, _, group = local_parts(LinearHead(student_hidden, student_weight, student_bias), None, group)
    sizes = len(student.weight), len(student.weight)
    shard = None if group is None else divide_vocabulary(student_hidden, *sizes, group)[1]
    check_head("student", student)  # after the exchange, so that no rank waits for one that raises
    spec = LossSpec(CrossEntropy(), hard_weight=1.0)
    return _loss(student, None, labels, spec, reduction, chunk_tokens, logits_dtype, shard)
