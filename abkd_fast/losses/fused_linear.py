"""The losses of hidden states and output projections, whose logits are never held as a whole.

For each chunk of tokens (`chunks.py`) one row kernel turns the logits into losses and, in place, into their gradient.
No probability is stored. No logit is computed twice, except for `reduction="none"` and for AlphaNet per batch.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from . import row_ops
from .arguments import LinearHead, LogitMap, LossSpec, check_head, check_loss, count_kept, loss_dtype, shared_vocabulary
from .chunks import Chunks, HeadGradients
from .divergences import CrossEntropy, Divergence, parse
from .vocab_parallel import Shard, divide_vocabulary, local_parts


def _measure_branches(chunks: Chunks, losses: Tensor, shard: Shard | None) -> tuple[Tensor, Tensor]:
    """AlphaNet per batch: measures all chunks, then takes one branch for all rows. Losses [N] and statistics [N, 6]."""
    measure = row_ops.measure_rows if shard is None else shard.measure_rows
    losses = losses.repeat(2, 1)
    statistics = losses.new_zeros(*losses.shape, row_ops.STATISTICS, dtype=torch.float64)
    for index, rows in chunks:
        losses[:, index], statistics[:, index] = measure(rows)
    return row_ops.choose_branch(losses, statistics)


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
    maps: list[float],
    chunk_tokens: int,
    logits_dtype: torch.dtype,
    group: str,
    first: int,
    widest: int,
    need: list[bool],
    upstream: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum of the losses, the losses [N], and its gradients by hidden states, projection and bias.

    All results are float32 (float64 for float64 hidden states). With `upstream` [N] the sum is that of upstream times
    losses. The gradients that `need` doesn't ask for have no elements. `divergence` is empty for the cross-entropy
    alone. `maps` are those of `LossSpec`. `group`, `first` and `widest` are a `Shard`; `group` is empty if the
    projections are whole.
    """
    student = LinearHead(student_hidden, student_weight, student_bias)
    teacher = None if teacher_hidden is None else LinearHead(teacher_hidden, teacher_weight, teacher_bias)
    kind = CrossEntropy() if teacher is None else parse(divergence)
    spec = LossSpec.of(kind, temperature, hard_weight, maps)
    shard = Shard(group, first, widest) if group else None
    with torch.autocast(student_hidden.device.type, enabled=False):
        chunks = Chunks(student, teacher, labels, spec, chunk_tokens, logits_dtype, shard)
        gradients = HeadGradients(chunks, need)
        losses, statistics = student_hidden.new_zeros(len(student_hidden), dtype=chunks.dtype), None
        if spec.divergence.per == "batch":
            losses, statistics = _measure_branches(chunks, losses, shard)
            if not any(need):
                return losses.sum() if upstream is None else (losses * upstream).sum(), losses, *gradients
        for index, rows in chunks:
            gradient = chunks.gradient_of(rows) if any(need) else None
            factors = None if upstream is None else upstream[index].contiguous()
            if statistics is not None:
                measured = statistics[index]
            elif shard is not None:
                losses[index], measured = shard.measure_rows(rows)
            else:
                losses[index], measured = row_ops.row_losses(rows, gradient, upstream=factors), None
            if gradient is not None:
                if measured is not None:
                    factors = losses.new_ones(len(gradient)) if factors is None else factors
                    row_ops.row_gradients(rows, measured, factors, gradient)
                gradients.add(index, gradient)
        if shard is not None and need[0]:
            shard.sum(gradients.hidden)
    return losses.sum() if upstream is None else (losses * upstream).sum(), losses, *gradients


@_fused_linear.register_fake
def _(student_hidden, student_weight, *arguments):  # noqa: ANN001
    need, dtype = arguments[-2], loss_dtype(student_hidden)
    gradients = zip(need, (student_hidden.shape, student_weight.shape, student_weight.shape[:1]), strict=True)
    shapes = (), student_hidden.shape[:1], *(shape if needed else (0,) for needed, shape in gradients)
    return tuple(student_hidden.new_empty(shape, dtype=dtype) for shape in shapes)


def _save(ctx, inputs, output) -> None:  # noqa: ANN001
    ctx.set_materialize_grads(False)
    ctx.need = inputs[-2]
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.save_for_backward(*output[2:])


def _backward(ctx, upstream: Tensor, *_: Tensor) -> tuple:  # noqa: ANN001
    return *saved_gradients(ctx, upstream), *[None] * 15


def saved_gradients(ctx, upstream: Tensor | None) -> list[Tensor | None]:  # noqa: ANN001
    """In backward: the gradients by hidden states, projection and bias, from those that the forward pass has saved."""
    row_ops.refuse_second_derivative()
    return [
        row_ops.scaled(gradient, upstream).to(dtype) if needed and upstream is not None else None
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
        row_ops.refuse_second_derivative()
        tensors = ctx.saved_tensors
        gradients = _fused_linear(*tensors, *ctx.numbers, ctx.need, upstream)[2:]
        triples = zip(gradients, tensors, ctx.need, strict=False)
        return None, None, *(x.to(like.dtype) if needed else None for x, like, needed in triples), *[None] * 4


def need_gradients(head: LinearHead) -> list[bool]:
    """Whether hidden states, projection and bias need gradients."""
    return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in head.tensors]


def pair_heads(
    student: LinearHead, teacher: LinearHead, group: dist.ProcessGroup | None = None
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
    student, teacher = student.prefix(vocab), teacher.prefix(vocab)
    check_head("student", student)  # after the exchange, so that no rank waits for one that raises
    check_head("teacher", teacher)
    return student, LinearHead(*(None if x is None else x.detach() for x in teacher.tensors)), shard


def _loss(
    student: LinearHead,
    teacher: LinearHead | None,
    labels: Tensor | None,
    spec: LossSpec,
    reduction: str,
    scale: float,
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
    numbers = (str(spec.divergence), *spec[1:3], spec.maps, chunk_tokens or 0, logits_dtype or accumulate)
    numbers += shard or Shard("", 0, 0)
    tensors = (*student.tensors, *(teacher.tensors if teacher else (None, None, None)), labels)
    need = need_gradients(student)
    if reduction == "none":
        losses = _LossPerRow.apply(need, numbers, *tensors)
        return losses if scale == 1 else losses * scale
    factor = None
    if reduction == "mean":
        factor = scale / count_kept(labels, student.hidden)
    elif scale != 1:
        factor = torch.full((), scale, dtype=accumulate, device=student.hidden.device)
    if factor is None or torch.float16 in (student.hidden.dtype, logits_dtype):
        total = _fused_linear(*tensors, *numbers, need, None)[0]
        return total if factor is None else total * factor  # float16 has no numbers that small
    # In the gradient of the logits the factor costs nothing. Later it would cost a pass over the projection's gradient.
    return _fused_linear(*tensors, *numbers, need, factor.expand(len(student.hidden)).contiguous())[0]


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
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    reduction: str = "mean",
    scale: float = 1.0,
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`divergence_loss` from hidden states and output projections, without holding the logits as a whole.

    Args:
        student_hidden, teacher_hidden: [N, Hs] and [N, Ht], final hidden states.
        student_weight, teacher_weight: [V, Hs] and [V, Ht], output projections. V may differ by padding.
        divergence, labels, temperature, hard_weight, reduction: as in `divergence_loss`. Rows with label -100 are
            dropped before any product. Labels may stay on the CPU, which spares a GPU one synchronization.
        student_bias, teacher_bias: [V].
        student_logit_scale, teacher_logit_scale: factors of the logits (Cohere's logit_scale, 1 / Granite's
            logits_scaling).
        student_softcap, teacher_softcap: c in logits = c tanh(logits / c) (Gemma's final_logit_softcapping), after the
            factor. None is no softcap.
        scale: multiplies the loss, at no cost.
        chunk_tokens: rows of logits held at once. None chooses from the vocabulary, the type and the device.
        logits_dtype: the type of a chunk's logits. None is float32 (float64 for float64 hidden states). torch.bfloat16
            saves memory traffic on a GPU and costs digits: about 5e-3 of the gradient. The gradient of the logits has
            the type of the products that read it: that of the hidden states if they have 16 bits on a GPU.
        group: the ranks over which the vocabulary is sharded, or None. Weights and biases are then this rank's
            consecutive rows, in the order of ranks, in any sizes. Student and teacher must be cut at the same rows,
            except for padding at the end. All other arguments, and the loss, are the same on all ranks. DTensors placed
            by Shard(0) on a mesh of one dimension need no group, and get DTensors as gradients. Parameters that FSDP
            shards over ranks with different tokens are not allowed.

    Returns: float32 (float64 for float64 hidden states). Differentiable by student_hidden, student_weight and
        student_bias; a gradient that is not required costs nothing. "mean" and "sum" make the gradients in the forward
        pass; "none" makes the logits again in the backward pass.

    On a GPU the products are fast in 16 bits alone: float32 hidden states are multiplied in float32, about 13 times
    slower on an H100. Call this under torch.autocast's types, or cast hidden states yourself. Float32 weights of 16-bit
    hidden states are cast, and get a float32 gradient that was never rounded.

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
    maps = LogitMap(student_logit_scale, student_softcap or 0.0), LogitMap(teacher_logit_scale, teacher_softcap or 0.0)
    spec = LossSpec(divergence, temperature, hard_weight, *maps)
    return _loss(student, teacher, labels, spec, reduction, scale, chunk_tokens, logits_dtype, shard)


def fused_linear_cross_entropy(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    *,
    student_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    reduction: str = "mean",
    scale: float = 1.0,
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The cross-entropy of labels [N] (-100 is ignored) for hidden states [N, H] and an output projection [V, H].

    This is `fused_linear_divergence` without a teacher: arguments, result and errors are the same.
    """
    student, _, group = local_parts(LinearHead(student_hidden, student_weight, student_bias), None, group)
    sizes = len(student.weight), len(student.weight)
    shard = None if group is None else divide_vocabulary(student_hidden, *sizes, group)[1]
    check_head("student", student)  # after the exchange, so that no rank waits for one that raises
    spec = LossSpec(CrossEntropy(), 1.0, 1.0, LogitMap(student_logit_scale, student_softcap or 0.0))
    return _loss(student, None, labels, spec, reduction, scale, chunk_tokens, logits_dtype, shard)
