"""Hidden states times output projections to losses and gradients, in chunks of tokens.

Two matrix products make the logits of a chunk, one row kernel turns them into losses and, in place, into their
gradient, two more products turn that into gradients of the hidden states and of the projection. No logit is computed
twice, no probability is ever stored, and memory does not grow with the number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .arguments import check_labels, check_numbers, count_kept, loss_dtype, shared_vocabulary
from .divergences import CrossEntropy, Divergence, ReverseKL, parse
from .policy_gradient import clipped_surrogate, policy_rows
from .row_ops import (
    STATISTICS,
    choose_branch,
    decides_per_batch,
    measure_rows,
    new_large,
    refuse_second_derivative,
    row_gradients,
    row_losses,
    scaled,
)
from .vocab_parallel import Shard, divide_vocabulary, local_parts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}  # logits of one chunk, student's and teacher's together
TILE = {"cpu": 16, "cuda": 128}  # rows of a chunk are a multiple of what the matrix product works in
ROW_ALIGNMENT = 64  # columns: every row of a logits buffer starts on a 128-byte boundary at 2 bytes an element


def choose_chunk_tokens(tokens: int, vocab: int, models: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a chunk: as few equal chunks as the memory budget allows, one where everything fits.

    Where it doesn't, chunks have at most a power of two of rows, as numbers of tokens mostly are: memory is then the
    same for 512 tokens and for 8,192.
    """
    row_bytes = _round_up(vocab, ROW_ALIGNMENT) * dtype.itemsize * models
    tile = TILE.get(device.type, 16)
    fitting = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // row_bytes
    if _round_up(tokens, tile) <= fitting:
        return max(tile, _round_up(tokens, tile))
    most = max(tile, 1 << max(0, fitting.bit_length() - 1))
    return min(most, _round_up(math.ceil(tokens / math.ceil(tokens / most)), tile))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _operands(model: tuple[Tensor, Tensor, Tensor | None], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, projection and bias in one type: 16 bits on a GPU, whose products of those are exact in float32,
    where the hidden states have 16; else `dtype`."""
    hidden, weight, bias = model
    if not (hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16)):
        hidden = hidden.to(dtype)
    return hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


def _product(left: Tensor, right: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = left right (or out += left right), summed in the precision of `out`, or in float32 if that has less.

    Where the operands have 16 bits and `out` 32 (on a GPU only), the product writes its float32 sums unrounded.
    """
    left = left.to(right.dtype)
    if right.dtype == out.dtype:
        out.addmm_(left, right, beta=1.0 if accumulate else 0.0)
    elif right.dtype.itemsize > out.dtype.itemsize:
        out.copy_(torch.mm(left, right))
    elif accumulate:
        torch.ops.aten.addmm.dtype_out(out, left, right, out.dtype, out=out)
    else:
        torch.ops.aten.mm.dtype_out(left, right, out.dtype, out=out)


class _Chunks:
    """Logits of both models, a chunk of the rows that count at a time, in one buffer."""

    def __init__(
        self,
        student: tuple[Tensor, Tensor, Tensor | None],
        teacher: tuple[Tensor, Tensor, Tensor | None] | None,
        labels: Tensor | None,
        logits_dtype: torch.dtype,
        chunk_tokens: int,
        widest: int | None,
    ) -> None:
        hidden, weight, _ = student
        self.models = [student] if teacher is None else [student, teacher]
        self.kept = None  # indices of the rows that count, or None where all do
        if labels is not None:
            # On the labels' own device: labels that stayed on the CPU cost no synchronization with the GPU.
            kept = (labels != -100).nonzero()[:, 0]
            self.kept = None if len(kept) == len(labels) else kept.to(hidden.device, non_blocking=True)
        self.count = len(hidden) if self.kept is None else len(self.kept)
        self.vocab = len(weight)
        sizes = self.count, self.vocab if widest is None else widest, len(self.models)
        self.step = chunk_tokens or choose_chunk_tokens(*sizes, logits_dtype, hidden.device)
        shape = len(self.models), min(self.step, self.count), _round_up(self.vocab, ROW_ALIGNMENT)
        self.buffer = new_large(hidden, *shape, dtype=logits_dtype)
        self.held = None  # where the chunk starts whose logits the buffer holds

    def rows(self, start: int) -> slice | Tensor:
        """The rows of the chunk that starts at `start`, as an index of the hidden states."""
        rows = slice(start, min(start + self.step, self.count))
        return rows if self.kept is None else self.kept[rows]

    def __iter__(self) -> Iterator[tuple[slice | Tensor, Tensor, Tensor | None]]:
        """Rows, student logits and teacher logits [n, V] of each chunk; the student's may be overwritten."""
        for start in range(0, self.count, self.step):
            rows, size = self.rows(start), min(self.step, self.count - start)
            logits = [buffer[:size, : self.vocab] for buffer in self.buffer]
            if self.held != start:
                for (hidden, weight, bias), out in zip(self.models, logits, strict=True):
                    _product(hidden[rows], weight.T, out)
                    if bias is not None:
                        out += bias
            self.held = start
            yield rows, logits[0], logits[1] if len(logits) > 1 else None


def _run(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None] | None,
    labels: Tensor | None,
    divergence: Divergence,
    temperature: float,
    hard_weight: float,
    chunk_tokens: int,
    logits_dtype: torch.dtype,
    need: list[bool],
    upstream: Tensor | None = None,
    policy: tuple[Tensor, Tensor, float, Tensor] | None = None,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The chunk loop: losses [N], and the gradients of their sum (or of upstream [N] times them) where `need`ed.

    Every gradient is in float32 (float64 for float64 hidden states) and not divided by the number of rows.

    policy: advantages [N], log_probs [N] and clip_ratio for `policy_rows`, whose gradients are then made and whose
        divergences are the losses, and [N] numbers that receive its ratios.
    shard: which part of the vocabulary the projections are; None is all of it.
    """
    with torch.autocast(student[0].device.type, enabled=False):
        dtype = loss_dtype(student[0])
        student = hidden, weight, _ = _operands(student, dtype)
        teacher = None if teacher is None else _operands(teacher, dtype)
        need_hidden, need_weight, need_bias = need
        losses = hidden.new_zeros(len(hidden), dtype=dtype)  # [N]
        grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else 0, dtype=dtype)  # [N, H]
        grad_weight = new_large(hidden, *(weight.shape if need_weight else (0,)), dtype=dtype)  # [V, H]
        grad_bias = hidden.new_zeros(len(weight) if need_bias else 0, dtype=dtype)  # [V]

        chunks = _Chunks(student, teacher, labels, logits_dtype, chunk_tokens, shard and shard.widest)
        if labels is not None:
            labels = labels.to(hidden.device, non_blocking=True)
        if shard is not None and labels is not None:
            labels = shard.local_labels(labels, len(weight))
        measure = measure_rows if shard is None else shard.measure_rows
        if need_weight and chunks.count == 0:
            grad_weight.zero_()
        options = divergence, temperature, hard_weight
        statistics = None
        if decides_per_batch(divergence):
            losses, statistics = _decide(chunks, labels, options, losses, measure)
            if not any(need):
                return losses, grad_hidden, grad_weight, grad_bias

        accumulate = False
        for rows, logits, teacher_logits in chunks:
            models = logits, teacher_logits, None if labels is None else labels[rows]
            if policy is not None:
                advantages, log_probs, clip_ratio, ratios = policy
                numbers = advantages[rows], log_probs[rows], clip_ratio
                losses[rows], ratios[rows] = policy_rows(*models, *numbers, gradient=logits if any(need) else None)
            elif statistics is None and shard is None:
                factors = None if upstream is None else upstream[rows].contiguous()
                losses[rows] = row_losses(*models, *options, gradient=logits if any(need) else None, upstream=factors)
            else:
                if statistics is None:
                    losses[rows], measured = measure(*models, *options)
                else:
                    measured = statistics[rows]
                if any(need):
                    factors = torch.ones_like(losses) if upstream is None else upstream
                    row_gradients(*models, *options, measured, factors[rows], gradient=logits)
            if need_hidden:
                chunk_gradient = hidden.new_empty(len(logits), hidden.shape[1], dtype=dtype)  # [n, H]
                _product(logits, weight, chunk_gradient)
                grad_hidden[rows] = chunk_gradient
            if need_weight:
                _product(logits.T, hidden[rows], grad_weight, accumulate)
            if need_bias:
                grad_bias += logits.sum(0, dtype=dtype)
            chunks.held, accumulate = None, True
        if shard is not None and need_hidden:
            shard.sum(grad_hidden)
    return losses, grad_hidden, grad_weight, grad_bias


def _decide(
    chunks: _Chunks, labels: Tensor | None, options: tuple, losses: Tensor, measure: Callable
) -> tuple[Tensor, Tensor]:
    """AlphaNet per batch: a pass over all chunks that only measures, then one branch for all rows."""
    both = losses.new_zeros(2, len(losses))
    statistics = losses.new_zeros(2, len(losses), STATISTICS, dtype=torch.float64)
    for rows, logits, teacher_logits in chunks:
        models = logits, teacher_logits, None if labels is None else labels[rows]
        both[:, rows], statistics[:, rows] = measure(*models, *options)
    return choose_branch(both, statistics)


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
    """The sum of the losses, the losses, and the gradients of the sum by hidden states, projection and bias.

    `divergence` is empty for the cross-entropy alone, and `group` where the projections are whole; else `group`,
    `first` and `widest` are a `Shard`.
    """
    teacher = None if teacher_hidden is None else (teacher_hidden, teacher_weight, teacher_bias)
    losses, *gradients = _run(
        (student_hidden, student_weight, student_bias),
        teacher,
        labels,
        parse(divergence) if divergence else CrossEntropy(),
        temperature,
        hard_weight,
        chunk_tokens,
        logits_dtype,
        need,
        upstream,
        shard=Shard(group, first, widest) if group else None,
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
    return *_saved_gradients(ctx, upstream), *[None] * 14


def _saved_gradients(ctx, upstream: Tensor | None) -> list[Tensor | None]:  # noqa: ANN001
    """By hidden states, projection and bias, from those made in the forward pass."""
    refuse_second_derivative()
    return [
        scaled(gradient, upstream).to(dtype) if needed and upstream is not None else None
        for gradient, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.need, strict=True)
    ]


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


class _PolicyGradient(torch.autograd.Function):
    """The sum of divergences and surrogates, whose gradient is made in the forward pass; divergences, and ratios."""

    @staticmethod
    def forward(
        ctx,  # noqa: ANN001
        need: list[bool],
        labels: Tensor,
        advantages: Tensor,
        log_probs: Tensor,
        clip_ratio: float,
        teacher: tuple[Tensor, Tensor, Tensor | None],
        *student: Tensor | None,
    ):
        dtype = loss_dtype(student[0])
        advantages, log_probs = advantages.to(dtype), log_probs.to(dtype)
        ratios = torch.zeros_like(advantages)  # [N]
        policy = advantages, log_probs, clip_ratio, ratios
        divergences, *gradients = _run(student, teacher, labels, ReverseKL(), 1.0, 0.0, 0, dtype, need, policy=policy)
        ctx.need, ctx.dtypes = need, [None if x is None else x.dtype for x in student]
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(divergences, ratios)
        return (divergences + clipped_surrogate(ratios, advantages, clip_ratio)).sum(), divergences, ratios

    @staticmethod
    def backward(ctx, upstream: Tensor, *_: Tensor) -> tuple:  # noqa: ANN001
        return *[None] * 6, *_saved_gradients(ctx, upstream)


def _needs(student: tuple[Tensor, Tensor, Tensor | None]) -> list[bool]:
    return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in student]


def _loss(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor | None, Tensor | None, Tensor | None],
    labels: Tensor | None,
    divergence: Divergence | None,
    temperature: float,
    hard_weight: float,
    reduction: str,
    chunk_tokens: int | None,
    logits_dtype: torch.dtype | None,
    shard: Shard | None,
) -> Tensor:
    check_numbers(temperature, hard_weight, reduction)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, expected a positive number of tokens or None")
    _check_shapes(student, teacher)
    labels = check_labels(labels, len(student[0]), hard_weight)
    need = _needs(student)
    accumulate = loss_dtype(student[0])
    allowed = [torch.float64] if accumulate == torch.float64 else [torch.float32, torch.bfloat16, torch.float16]
    if logits_dtype is not None and logits_dtype not in allowed:
        names = " or ".join(map(str, allowed))
        raise ValueError(f"logits_dtype is {logits_dtype}, expected {names} for {student[0].dtype} hidden states")
    spelling = "" if divergence is None else str(divergence)
    numbers = (spelling, temperature, hard_weight, chunk_tokens or 0, logits_dtype or accumulate)
    numbers += shard or Shard("", 0, 0)
    tensors = (*student, *teacher, labels)
    if reduction == "none":
        return _LossPerRow.apply(need, numbers, *tensors)
    total, losses, *_ = _fused_linear(*tensors, *numbers, need, None)
    return total if reduction == "sum" else total / count_kept(labels, losses)


def _check_shapes(
    student: tuple[Tensor, Tensor, Tensor | None], teacher: tuple[Tensor | None, Tensor | None, Tensor | None]
) -> None:
    for name, (hidden, weight, bias) in (("student", student), ("teacher", teacher)):
        if hidden is not None and (hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]):
            shapes = f"{list(hidden.shape)} and {list(weight.shape)}"
            raise ValueError(f"{name} hidden states and projection have shapes {shapes}, expected [N, H] and [V, H]")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{name} bias has shape {list(bias.shape)}, expected [{len(weight)}]")


def _prefix(rows: Tensor | None, count: int) -> Tensor | None:
    """The first rows; the tensor itself where that is all of it, for a slice's backward would copy its gradient."""
    return rows if rows is None or len(rows) == count else rows[:count]


def _pair(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None],
    group: ProcessGroup | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None], Shard | None]:
    """Both models over their shared vocabulary, or this rank's part of it; the teacher without gradients."""
    if len(student[0]) != len(teacher[0]):
        raise ValueError(f"student_hidden has {len(student[0])} rows and teacher_hidden {len(teacher[0])}")
    sizes, shard = (len(student[1]), len(teacher[1])), None
    if group is None:
        vocab = shared_vocabulary(*sizes)
    else:
        vocab, shard = divide_vocabulary(student[0], *sizes, group)
    student, teacher = ((hidden, _prefix(w, vocab), _prefix(b, vocab)) for hidden, w, b in (student, teacher))
    return student, tuple(None if x is None else x.detach() for x in teacher), shard


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
    """`divergence_loss` of logits that are never held as a whole: hidden states and output projections go in.

    Args:
        student_hidden, teacher_hidden: [N, Hs] and [N, Ht], final hidden states.
        student_weight, teacher_weight: [V, Hs] and [V, Ht], output projections; V may differ by padding.
        divergence, labels, temperature, hard_weight, reduction: as in `divergence_loss`; rows with label -100 are
            dropped before any product. Labels may stay on the CPU, which spares a GPU one synchronization.
        student_bias, teacher_bias: [V].
        chunk_tokens: rows of logits held at once; None chooses from the vocabulary, the type and the device.
        logits_dtype: of the logits of a chunk and their gradient; None is float32 (float64 for float64 hidden states).
            torch.bfloat16 saves memory traffic on a GPU and costs digits: about 5e-3 of the gradient.
        group: over whose ranks the vocabulary is sharded. Weights and biases are then this rank's consecutive rows, in
            the order of ranks, in any sizes, the student's and the teacher's the same rows but for padding at the end;
            all else, labels among it, is the same on all ranks, and so is the loss. DTensors placed by Shard(0) on a
            mesh of one dimension need no group, and get DTensors as gradients; not so parameters that FSDP shards over
            ranks with different tokens.

    Returns: float32 (float64 for float64 hidden states). Differentiable by student_hidden, student_weight and
        student_bias; what does not require a gradient costs none. With "mean" and "sum" the gradients are made in
        the forward pass; "none" makes the logits again in the backward pass.

    With a group, every rank has to call this, and with "none" also its backward pass. The hidden states' gradient comes
    out whole on every rank, added up over the group: it must not be added up again. Those of projection and bias are
    of this rank's rows. The ranks exchange a few numbers a row, by an all-gather and an all-reduce a chunk, and [N, Hs]
    once. For every 4 million logits BDKD takes 1 all-reduce more and AKL 10 (18 in float64), and what these two decide
    for a row is made in plain PyTorch in float64; all else is the row kernels' work.

    Raises ValueError for shapes, sizes or numbers that don't fit together. With a group, a label beyond the vocabulary
    is an infinite loss.
    """
    models = (student_hidden, student_weight, student_bias), (teacher_hidden, teacher_weight, teacher_bias)
    student, teacher, shard = _pair(*local_parts(*models, group))
    options = divergence, temperature, hard_weight, reduction, chunk_tokens, logits_dtype
    return _loss(student, teacher, labels, *options, shard)


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
    """The cross-entropy of labels [N] (-100 = ignored) under hidden states [N, H] and a projection [V, H].

    The same driver as `fused_linear_divergence`, without a teacher; arguments, result and errors as there.
    """
    no_teacher = None, None, None
    student, _, group = local_parts((student_hidden, student_weight, student_bias), no_teacher, group)
    sizes = len(student[1]), len(student[1])
    shard = None if group is None else divide_vocabulary(student_hidden, *sizes, group)[1]
    return _loss(student, no_teacher, labels, None, 1.0, 1.0, reduction, chunk_tokens, logits_dtype, shard)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum over tokens of KL(q, p) + max(-A r, -A clip(r, 1 - clip_ratio, 1 + clip_ratio)), r = q(label) / b(label).

    That is MiniLLM's loss: the gradient of a policy b's samples, clipped as PPO's, and the exact divergence of the next
    token. Both come from the same logits, so this costs hardly more than the divergence alone.

    Args:
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias: as in
            `fused_linear_divergence`.
        labels: [N], the tokens that the policy b chose. Those with -100 don't count. They may stay on the CPU.
        advantages: [N], A. log_probs: [N], log b(label). Both on the student's device.

    Returns: the sum, differentiable by student_hidden, student_weight and student_bias, and without gradients KL(q, p)
        [N] and r [N]; float32 (float64 for float64 hidden states).

    Raises ValueError for shapes and sizes that don't fit together.

    Source: MiniLLM (arXiv 2306.08543), section 2.2. The gradient by the logits is
    -A r (onehot - q) where r is not clipped, plus q (d - KL(q, p)) with d = log q - log p.
    """
    student, teacher, _ = _pair(
        (student_hidden, student_weight, student_bias), (teacher_hidden, teacher_weight, teacher_bias)
    )
    _check_shapes(student, teacher)
    labels = check_labels(labels, len(student_hidden), 1.0)
    for name, values in (("advantages", advantages), ("log_probs", log_probs)):
        if values.shape != labels.shape:
            raise ValueError(f"{name} have shape {list(values.shape)}, expected [{len(labels)}], one for each label")
    return _PolicyGradient.apply(_needs(student), labels, advantages, log_probs, clip_ratio, teacher, *student)
