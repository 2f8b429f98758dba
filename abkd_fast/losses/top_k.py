"""The divergence to a teacher of whom only the likeliest tokens are known: k tokens, and one outcome for all others.

The student's logits become k + 1 logits, a chunk at a time (`chunks.py`): log sum exp of the others, and those of the k
tokens. `divergence_loss` compares these. The backward pass makes the chunks again, so only one is ever held.
"""

import torch
from torch import Tensor

from . import row_ops
from .arguments import LinearHead, LogitMap, LossSpec, Rows, check_head, check_loss, count_kept, loss_dtype
from .chunks import Chunks, HeadGradients
from .divergences import CrossEntropy, Divergence
from .fused_linear import need_gradients
from .logits import divergence_loss
from .reference import LOG_FLOOR, PLAIN_LSE

TOLERANCE = 1e-3  # of a sum of probabilities: servers round
NORMALIZER = LossSpec(CrossEntropy(), hard_weight=1.0)  # with which `row_normalizers` gives log sum exp


class _OutcomeLogits(torch.autograd.Function):
    """The logits [N, 1 + M]: log sum exp of all tokens but the first k of `ids` [N, M], then those of `ids`.

    Rows with label -100 have 0.
    """

    @staticmethod
    def forward(
        ctx,  # noqa: ANN001
        need: list[bool],
        k: int,
        chunk_tokens: int,
        logit_map: LogitMap,
        labels: Tensor | None,
        ids: Tensor,
        *student: Tensor | None,
    ) -> Tensor:
        ctx.need, ctx.numbers = need, (k, chunk_tokens, logit_map)
        ctx.save_for_backward(labels, ids, *student)
        with torch.autocast(ids.device.type, enabled=False):
            chunks = _chunks(labels, student, chunk_tokens)
            outcomes = student[0].new_zeros(len(ids), 1 + ids.shape[1], dtype=chunks.dtype)
            for index, rows in chunks:
                _, *parts = _merge_others(logit_map(rows.student), ids[index], k)
                outcomes[index] = torch.cat(parts, 1)
        return outcomes

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple:  # noqa: ANN001
        row_ops.refuse_second_derivative()
        k, chunk_tokens, logit_map = ctx.numbers
        labels, ids, *student = ctx.saved_tensors
        with torch.autocast(ids.device.type, enabled=False):
            chunks = _chunks(labels, student, chunk_tokens)
            gradients = HeadGradients(chunks, ctx.need)
            for index, rows in chunks:
                others, total, _ = _merge_others(logit_map(rows.student), ids[index], k)
                of_total, of_ids = upstream[index].tensor_split([1], dim=1)
                slope = others.sub_(total.clamp(min=LOG_FLOOR)).exp_().mul_(of_total)
                slope.scatter_add_(1, ids[index], of_ids)
                slope *= logit_map.slope(rows.student)
                gradients.add(index, chunks.gradient_of(rows).copy_(slope))
        pairs = zip(gradients, student, ctx.need, strict=True)
        return *[None] * 6, *(gradient.to(like.dtype) if needed else None for gradient, like, needed in pairs)


def _chunks(labels: Tensor | None, student: tuple[Tensor | None, ...], chunk_tokens: int) -> Chunks:
    return Chunks(LinearHead(*student), None, labels, NORMALIZER, chunk_tokens, loss_dtype(student[0]))


def _merge_others(logits: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Takes the first k of `ids` [n, M] out of `logits` [n, V], in place: they become -inf.

    Returns these logits, their log sum exp [n, 1], and the logits of all `ids` as they were.
    """
    own = logits.gather(1, ids)
    logits.scatter_(1, ids[:, :k], -torch.inf)
    total = row_ops.row_normalizers(Rows(logits, None, None, NORMALIZER))[:, PLAIN_LSE, None]
    return logits, total.to(logits.dtype), own


def _teacher_outcomes(log_probs: Tensor, is_padding: Tensor, vocab: int) -> Tensor:
    """The teacher's log-probabilities [N, 1 + k] of all other tokens, then of the k tokens, in the given type."""
    log_probs = log_probs.masked_fill(is_padding, -torch.inf)
    rest = 1 - log_probs.double().exp().sum(1, keepdim=True)
    # What is less than the rounding of the sum is not known. With 0 a reverse divergence would be infinite.
    rest = rest.clamp(min=torch.finfo(log_probs.dtype).eps).log().to(log_probs.dtype)
    has_all = (~is_padding).sum(1, keepdim=True) == vocab
    return torch.cat((rest.masked_fill(has_all, -torch.inf), log_probs), 1)


def _checked_ids(ids: Tensor, log_probs: Tensor, labels: Tensor | None, rows: int, vocab: int) -> Tensor:
    """The ids as int64. Raises ValueError for ids and log-probabilities that can't be meant."""
    if ids.dim() != 2 or len(ids) != rows or log_probs.shape != ids.shape:
        shapes = f"{list(ids.shape)} and {list(log_probs.shape)}"
        raise ValueError(f"top_ids and top_log_probs have shapes {shapes}, expected [{rows}, k], both the same")
    are_whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if not log_probs.is_floating_point() or not are_whole:
        kinds = f"{ids.dtype} and {log_probs.dtype}"
        raise ValueError(f"top_ids and top_log_probs are {kinds}, expected whole numbers and a floating-point type")
    ids = ids.to(torch.int64)  # of unsigned types -1 would be a large number
    is_kept = slice(None) if labels is None else (labels != -100).to(ids.device)
    kept = ids[is_kept]
    if not kept.numel():
        if len(kept):
            raise ValueError("top_ids has no columns: every row needs a token")
        return ids
    ordered = kept.sort(1).values
    if ordered.min() < -1 or ordered.max() >= vocab:
        wrong = int(ordered.min()) if ordered.min() < -1 else int(ordered.max())
        raise ValueError(f"top_ids has {wrong}, expected ids below {vocab}, or -1 for padding")
    if (kept[:, 0] < 0).any():
        raise ValueError("top_ids begins with -1 in a row: every row needs a token, and padding comes last")
    if (is_twice := (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise ValueError(f"top_ids has id {int(ordered[:, 1:][is_twice][0])} twice in one row, expected distinct ids")
    if ids.is_cpu and log_probs.is_cpu:  # a GPU would have to be waited for
        _check_log_probs(log_probs[is_kept], kept < 0)
    return ids


def _check_log_probs(log_probs: Tensor, is_padding: Tensor) -> None:
    """Raises ValueError for numbers [n, k] that are no logarithms of probabilities."""
    numbers = log_probs.detach().double()
    # The loss computes in float32, where a larger number is infinite.
    if (wrong := ~(numbers.abs() <= torch.finfo(torch.float32).max) & ~is_padding).any():
        problem = f"top_log_probs has {numbers[wrong][0].item()}, expected a finite number of float32"
        raise ValueError(f"{problem}; pad in place of a token that has none: it counts among the others")
    sums = numbers.masked_fill(is_padding, -torch.inf).exp().sum(1)
    # Rounded logarithms change a sum by half of eps times the entropy, which is below 12 for any vocabulary.
    if sums.max() > 1 + TOLERANCE + 6 * torch.finfo(log_probs.dtype).eps:
        problem = f"top_log_probs has a row with probabilities that sum to {sums.max().item():.4g}, expected at most 1"
        raise ValueError(f"{problem}: these are logarithms over the whole vocabulary")


def fused_linear_top_k(
    student_hidden: Tensor,
    student_weight: Tensor,
    top_ids: Tensor,
    top_log_probs: Tensor,
    divergence: Divergence,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    hard_weight: float = 0.0,
    reduction: str = "mean",
    scale: float = 1.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """The divergence to a teacher of whom only some tokens of each row are known, as inference servers return them.

    Both distributions are those over k + 1 outcomes: the k tokens, and any other token. The second has the rest of each
    model's probability. The result is a lower bound of the forward and the reverse KL divergence, and of every other
    f-divergence, over the whole vocabulary. If the k tokens are the whole vocabulary, it is that of
    `fused_linear_divergence`.

    Args:
        student_hidden, student_weight, student_bias, student_logit_scale, student_softcap, divergence, labels,
            hard_weight, reduction, scale, chunk_tokens: as in `fused_linear_divergence`. The label need not be among
            the k tokens. There is no temperature: the rest of a distribution has none.
        top_ids: [N, k] of any integer type, distinct token ids in any order. A row with fewer of them is padded with
            -1, at its end.
        top_log_probs: [N, k], the teacher's log-probabilities over the whole vocabulary, finite, and not normalized
            over the k tokens. A sum of probabilities above 1 by rounding (up to 1.001; more in 16 bits) counts as 1.
            The rest is at least the resolution of this type (1.2e-7 for float32), because less than that is not known
            of it. The numbers are checked if both tensors are on the CPU.
            Both may stay on the CPU, which spares a GPU two synchronizations.

    Returns: float32 (float64 for float64 hidden states). Differentiable by student_hidden, student_weight and
        student_bias. The logits are made twice, in the forward and in the backward pass.

    Raises ValueError for shapes, sizes, ids or numbers that don't fit together.
    """
    student = LinearHead(student_hidden, student_weight, student_bias)
    check_head("student", student)
    (rows, _), vocab, device = student_hidden.shape, len(student_weight), student_hidden.device
    logit_map = LogitMap(student_logit_scale, student_softcap or 0.0)
    labels = check_loss(LossSpec(divergence, 1.0, hard_weight, logit_map), reduction, labels, rows)
    top_ids = _checked_ids(top_ids, top_log_probs, labels, rows, vocab)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, expected a positive number of tokens or None")
    k, ids = top_ids.shape[1], top_ids.to(device, non_blocking=True)
    is_padding, ids = ids < 0, torch.where(ids < 0, ids[:, :1], ids).clamp(min=0)
    near = None if labels is None else labels.to(device, non_blocking=True)
    wanted = torch.cat((ids, near.clamp(min=0)[:, None]), 1) if hard_weight else ids
    numbers = need_gradients(student), k, chunk_tokens or 0, logit_map
    logits = _OutcomeLogits.apply(*numbers, labels, wanted, *student.tensors)
    outcomes = logits[:, : 1 + k].masked_fill(torch.nn.functional.pad(is_padding, (1, 0)), -torch.inf)
    teacher = _teacher_outcomes(top_log_probs.to(device, non_blocking=True), is_padding, vocab)
    losses = divergence_loss(outcomes, teacher.to(logits.dtype), divergence, near, reduction="none")
    if hard_weight:
        cross_entropy = (outcomes.logsumexp(1) - logits[:, -1]).masked_fill(near == -100, 0.0)
        losses = (1 - hard_weight) * losses + hard_weight * cross_entropy
    if reduction == "none":
        return losses * scale
    return losses.sum() * (scale / count_kept(labels, student_hidden) if reduction == "mean" else scale)
