"""Hidden states times output projections to losses and gradients, in chunks of tokens.

Two matrix products make the logits of a chunk, one row kernel turns them into losses and, in place, into their
gradient, two more products turn that into gradients of the hidden states and of the projection. No logit is computed
twice, no probability is ever stored, and memory does not grow with the number of tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .divergences import CrossEntropy, Divergence
from .ops import (
    check_labels,
    check_numbers,
    count_kept,
    refuse_second_derivative,
    restore,
    row_losses,
    shared_vocabulary,
)

CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}  # logits of one chunk, student's and teacher's together
TILE = {"cpu": 16, "cuda": 128}  # rows of a chunk are a multiple of what the matrix product works in
ROW_ALIGNMENT = 64  # columns: every row of a logits buffer starts on a 128-byte boundary at 2 bytes an element


def choose_chunk_tokens(tokens: int, vocab: int, models: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a chunk: as few equal chunks as the memory budget allows, one where everything fits."""
    row_bytes = _round_up(vocab, ROW_ALIGNMENT) * dtype.itemsize * models
    tile = TILE.get(device.type, 16)
    budget = max(tile, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // row_bytes // tile * tile)
    chunks = max(1, math.ceil(tokens / budget))
    return min(budget, _round_up(max(1, math.ceil(tokens / chunks)), tile))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _logits_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _operands(model: tuple[Tensor, Tensor, Tensor | None], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, projection and bias in one type: 16 bits on a GPU, whose products of those are exact in float32,
    where the hidden states have 16; else that of the logits."""
    hidden, weight, bias = model
    if not (hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16)):
        hidden = hidden.to(dtype)
    return hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = hidden weight^T + bias, in the precision of `out`: never rounded to the 16 bits of the inputs."""
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.T, out=out)
    else:
        out.copy_(torch.mm(hidden, weight.T, out_dtype=out.dtype))
    if bias is not None:
        out += bias


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left right, accumulated and returned in `dtype`; `left` is rounded to the type of `right` first."""
    left = left.to(right.dtype)
    return torch.mm(left, right) if right.dtype == dtype else torch.mm(left, right, out_dtype=dtype)


def _run(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None] | None,
    labels: Tensor | None,
    divergence: Divergence | CrossEntropy,
    temperature: float,
    hard_weight: float,
    chunk_tokens: int,
    need: list[bool],
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The chunk loop: losses [N], and the gradients of their sum (or of upstream [N] times them) where `need`ed.

    Every gradient is in the precision of the logits and not divided by the number of rows.
    """
    with torch.autocast(student[0].device.type, enabled=False):
        dtype = _logits_dtype(student[0])
        hidden, weight, bias = _operands(student, dtype)
        teacher = None if teacher is None else _operands(teacher, dtype)
        vocab, width = weight.shape
        need_hidden, need_weight, need_bias = need
        losses = hidden.new_zeros(len(hidden), dtype=dtype)  # [N]
        grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else 0, dtype=dtype)  # [N, H]
        grad_weight = hidden.new_empty((vocab, width) if need_weight else 0, dtype=dtype)  # [V, H]
        grad_bias = hidden.new_zeros(vocab if need_bias else 0, dtype=dtype)  # [V]

        kept = None  # indices of the rows that count, or None where all do
        if labels is not None:
            # On the labels' own device: labels that stayed on the CPU cost no synchronisation with the GPU.
            kept = (labels != -100).nonzero()[:, 0]
            kept = None if len(kept) == len(labels) else kept.to(hidden.device, non_blocking=True)
            labels = labels.to(hidden.device, non_blocking=True)
        count = len(hidden) if kept is None else len(kept)
        if need_weight and count == 0:
            grad_weight.zero_()

        models = 1 if teacher is None else 2
        step = chunk_tokens or choose_chunk_tokens(count, vocab, models, dtype, hidden.device)
        buffer = hidden.new_empty(models, min(step, count), _round_up(vocab, ROW_ALIGNMENT), dtype=dtype)
        for start in range(0, count, step):
            size = min(step, count - start)
            rows = slice(start, start + size) if kept is None else kept[start : start + size]
            chunk = hidden[rows]  # [n, H]
            logits = buffer[0, :size, :vocab]
            _project(chunk, weight, bias, logits)
            teacher_logits = None
            if teacher is not None:
                teacher_logits = buffer[1, :size, :vocab]
                _project(teacher[0][rows], teacher[1], teacher[2], teacher_logits)
            losses[rows] = row_losses(
                logits,
                teacher_logits,
                None if labels is None else labels[rows],
                divergence,
                temperature,
                hard_weight,
                gradient=logits if any(need) else None,
            )
            if upstream is not None:
                logits *= upstream[rows, None]
            if need_hidden:
                grad_hidden[rows] = _product(logits, weight, dtype)
            if need_weight:
                _accumulate(grad_weight, logits, chunk, first=start == 0)
            if need_bias:
                grad_bias += logits.sum(0)
    return losses, grad_hidden, grad_weight, grad_bias


def _accumulate(total: Tensor, gradient: Tensor, hidden: Tensor, first: bool) -> None:
    """total += gradient^T hidden, in the precision of `total`; the first chunk stores."""
    left = gradient.to(hidden.dtype).T
    if hidden.dtype == total.dtype:
        total.addmm_(left, hidden, beta=0.0 if first else 1.0)
    elif first:
        total.copy_(torch.mm(left, hidden, out_dtype=total.dtype))
    else:
        total.copy_(torch.addmm(total, left, hidden, out_dtype=total.dtype))


@torch.library.custom_op("abkd_fast::fused_linear", mutates_args=())
def _fused_linear(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    family: int,
    parameters: list[float],
    temperature: float,
    hard_weight: float,
    chunk_tokens: int,
    need: list[bool],
    upstream: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum of the losses, the losses, and the gradients of the sum by hidden states, projection and bias."""
    teacher = None if teacher_hidden is None else (teacher_hidden, teacher_weight, teacher_bias)
    losses, *gradients = _run(
        (student_hidden, student_weight, student_bias),
        teacher,
        labels,
        restore(family, parameters),
        temperature,
        hard_weight,
        chunk_tokens,
        need,
        upstream,
    )
    return losses.sum(), losses, *gradients


@_fused_linear.register_fake
def _(student_hidden, student_weight, *arguments):  # noqa: ANN001
    (*_, need, _) = arguments
    dtype = _logits_dtype(student_hidden)

    def like(needed: bool, *shape: int) -> Tensor:
        return student_hidden.new_empty(shape if needed else (0,), dtype=dtype)

    tokens, vocab = student_hidden.shape[0], student_weight.shape[0]
    gradients = like(need[0], *student_hidden.shape), like(need[1], *student_weight.shape), like(need[2], vocab)
    return student_hidden.new_empty((), dtype=dtype), like(True, tokens), *gradients


def _save(ctx, inputs, output) -> None:  # noqa: ANN001
    ctx.set_materialize_grads(False)
    ctx.need = inputs[12]
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.save_for_backward(*output[2:])


def _backward(ctx, upstream: Tensor, *_: Tensor) -> tuple:  # noqa: ANN001
    refuse_second_derivative()
    if upstream is None:
        return (None,) * 14
    gradients = [
        (gradient * upstream).to(dtype) if needed else None
        for gradient, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.need, strict=True)
    ]
    return *gradients, *[None] * 11


_fused_linear.register_autograd(_backward, setup_context=_save)


class _LossPerRow(torch.autograd.Function):
    """reduction="none": each row has its own upstream gradient, known only in backward, so logits are made again."""

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


def _loss(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor | None, Tensor | None, Tensor | None],
    labels: Tensor | None,
    divergence: Divergence | CrossEntropy,
    temperature: float,
    hard_weight: float,
    reduction: str,
    chunk_tokens: int | None,
) -> Tensor:
    check_numbers(temperature, hard_weight, reduction)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, expected a positive number of tokens or None")
    for name, (hidden, weight, bias) in (("student", student), ("teacher", teacher)):
        if hidden is not None and (hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]):
            shapes = f"{list(hidden.shape)} and {list(weight.shape)}"
            raise ValueError(f"{name} hidden states and projection have shapes {shapes}, expected [N, H] and [V, H]")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{name} bias has shape {list(bias.shape)}, expected [{len(weight)}]")
    labels = check_labels(labels, len(student[0]), hard_weight)
    need = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in student]
    numbers = (divergence.family, divergence.parameters, temperature, hard_weight, chunk_tokens or 0)
    tensors = (*student, *teacher, labels)
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
) -> Tensor:
    """`divergence_loss` of logits that are never held as a whole: hidden states and output projections go in.

    Args:
        student_hidden, teacher_hidden: [N, Hs] and [N, Ht], final hidden states.
        student_weight, teacher_weight: [V, Hs] and [V, Ht], output projections; V may differ by padding.
        divergence, labels, temperature, hard_weight, reduction: as in `divergence_loss`; rows with label -100 are
            dropped before any product. Labels may stay on the CPU, which spares a GPU one synchronisation.
        student_bias, teacher_bias: [V].
        chunk_tokens: rows of logits held at once; None chooses from the vocabulary, the type and the device.

    Returns: float32 (float64 for float64 hidden states). Differentiable by student_hidden, student_weight and
        student_bias; what does not require a gradient costs none. With "mean" and "sum" the gradients are made in
        the forward pass; "none" makes the logits again in the backward pass.

    Raises ValueError for shapes, sizes or numbers that don't fit together.
    """
    if len(student_hidden) != len(teacher_hidden):
        raise ValueError(f"student_hidden has {len(student_hidden)} rows and teacher_hidden {len(teacher_hidden)}")
    vocab = shared_vocabulary(len(student_weight), len(teacher_weight))
    teacher = (
        teacher_hidden.detach(),
        teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
    )
    student, teacher = (
        (hidden, weight[:vocab], None if bias is None else bias[:vocab])
        for hidden, weight, bias in ((student_hidden, student_weight, student_bias), teacher)
    )
    return _loss(student, teacher, labels, divergence, temperature, hard_weight, reduction, chunk_tokens)


def fused_linear_cross_entropy(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    *,
    student_bias: Tensor | None = None,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
) -> Tensor:
    """The cross-entropy of labels [N] (-100 = ignored) under hidden states [N, H] and a projection [V, H].

    The same driver as `fused_linear_divergence`, without a teacher; arguments, result and errors as there.
    """
    student = (student_hidden, student_weight, student_bias)
    return _loss(student, (None, None, None), labels, CrossEntropy(), 1.0, 1.0, reduction, chunk_tokens)
