"""The custom operators: the compiled row kernel, and the divergence between logits with its autograd.

`row_losses` is the one door to the kernels. Where no compiled kernel fits (the extension is missing, or float64
on a GPU) it says so once and goes through `reference.py`.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from . import reference
from .divergences import AlphaNet, Divergence, ReverseKL, parse
from .reference import SLOPE, STATE, STATISTICS, STUDENT_LSE

try:
    from . import _C
except ImportError as error:
    _C, _MISSING = None, str(error)
else:
    if torch.version.cuda and _C.build_info()["cuda"]:
        import importlib.util

        torch.ops.load_library(importlib.util.find_spec("abkd_fast.losses._cuda").origin)

    @torch.library.register_fake("abkd_fast::row_losses")
    def _row_losses_fake(student, *_):  # noqa: ANN001
        return student.new_empty(student.shape[0], dtype=loss_dtype(student))

    @torch.library.register_fake("abkd_fast::row_gradients")
    def _row_gradients_fake(*_):
        return None

    @torch.library.register_fake("abkd_fast::row_normalizers")
    def _row_normalizers_fake(*_):
        return None

    @torch.library.register_fake("abkd_fast::row_sums")
    def _row_sums_fake(student, *_):  # noqa: ANN001
        return student.new_empty(student.shape[0], dtype=loss_dtype(student))


def build_info() -> dict:
    """How the extension was built: `cuda` (version or None), `cuda_archs`, `simd` (what runs here), `compiler`.

    Without the extension every value is None and `missing` holds the reason.
    """
    if _C is None:
        return {"cuda": None, "cuda_archs": [], "simd": None, "compiler": None, "missing": _MISSING}
    return _C.build_info()


def loss_dtype(logits: Tensor) -> torch.dtype:
    """Of losses, and of sums over the vocabulary or the tokens, from logits or hidden states."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


_warned: set[str] = set()


def _compiled(logits: Tensor) -> bool:
    if _C is None:
        reason = f"the extension could not be imported ({_MISSING})"
    elif logits.is_cuda and _C.build_info()["cuda"] is None:
        reason = "the extension was built without CUDA kernels"
    elif logits.is_cuda and logits.dtype == torch.float64:
        reason = "float64 logits have no CUDA kernel"
    elif logits.device.type not in ("cpu", "cuda"):
        reason = f"there is no kernel for {logits.device.type} tensors"
    else:
        return True
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"abkd_fast: {reason}; using the slow PyTorch reference", RuntimeWarning, stacklevel=3)
    return False


def row_losses(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    divergence: Divergence,
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    gradient: Tensor | None = None,
    statistics: Tensor | None = None,
    upstream: Tensor | None = None,
) -> Tensor:
    """Losses [N] (float32; float64 for float64 logits) of logits [N, V]; see `csrc/rows.h` for the formula.

    `gradient` [N, V], which may be `student` itself, receives the derivative of each row's loss by its student
    logits, times `upstream` [N] (in the type of the losses) if that is given; `statistics` [N, 6] (float64) what
    `row_gradients` needs to make it later. Rows with label -100 get loss and gradient 0. AlphaNet compares its
    branches row by row here, whatever its `per`. No autograd.
    """
    if not _compiled(student):
        rows = (student, teacher, labels, divergence, temperature, hard_weight)
        return reference.row_losses(*rows, gradient, statistics, upstream)
    options = divergence.family, divergence.parameters, temperature, hard_weight
    return torch.ops.abkd_fast.row_losses(student, teacher, labels, *options, gradient, statistics, upstream)


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
    """Writes upstream [N] (in the type of the losses) times the derivative of each row's loss to `gradient` [N, V],
    which may be `student`. `statistics` come from `row_losses` of the same logits, or are merged from those that
    `row_normalizers` and `row_sums` made of all shards; a label that another shard has is -1. No autograd."""
    if not _compiled(student):
        rows = (student, teacher, labels, divergence, temperature, hard_weight)
        return reference.row_gradients(*rows, statistics, upstream, gradient)
    options = divergence.family, divergence.parameters, temperature, hard_weight
    return torch.ops.abkd_fast.row_gradients(student, teacher, labels, *options, statistics, upstream, gradient)


def row_normalizers(student: Tensor, teacher: Tensor | None, temperature: float, hard_weight: float) -> Tensor:
    """Statistics [N, 6] (float64) of logits [N, V], of which only the log-normalisers are made: those at `temperature`
    where there is a teacher, and the student's own where there is a `hard_weight`. No autograd."""
    statistics = student.new_zeros(len(student), STATISTICS, dtype=torch.float64)
    normalizers = torch.ops.abkd_fast.row_normalizers if _compiled(student) else reference.row_normalizers
    normalizers(student, teacher, temperature, hard_weight, statistics)
    return statistics


def row_sums(
    student: Tensor, teacher: Tensor, divergence: Divergence, temperature: float, statistics: Tensor
) -> Tensor:
    """The sums over V, [N] in the type of the losses, of the divergence's terms of logits [N, V].

    `statistics` [N, 6] must have the log-normalisers, of these logits or of all shards', and what the divergence has
    decided for each row; they receive the sum of slopes. No autograd.
    """
    if not _compiled(student):
        return reference.row_sums(student, teacher, divergence, temperature, statistics)
    kind = divergence.family, divergence.parameters
    return torch.ops.abkd_fast.row_sums(student, teacher, *kind, temperature, statistics)


def measure_rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    divergence: Divergence,
    temperature: float,
    hard_weight: float,
) -> tuple[Tensor, Tensor]:
    """Losses [N] and statistics [N, 6], for AlphaNet per batch those [2, N] and [2, N, 6] of both branches."""

    def measure(divergence: Divergence) -> tuple[Tensor, Tensor]:
        statistics = student.new_zeros(len(student), STATISTICS, dtype=torch.float64)
        rows = (student, teacher, labels, divergence, temperature, hard_weight)
        return row_losses(*rows, statistics=statistics), statistics

    if not decides_per_batch(divergence):
        return measure(divergence)
    first, second = (measure(branch) for branch in divergence.branches)
    return torch.stack((first[0], second[0])), torch.stack((first[1], second[1]))


def decides_per_batch(divergence: Divergence) -> bool:
    """Whether no row's gradient is known before all rows are measured."""
    return isinstance(divergence, AlphaNet) and divergence.per == "batch"


def choose_branch(losses: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """AlphaNet per batch: losses [N] and statistics [N, 6] of the branch whose mean is larger, without asking the
    device for it. Rows that don't count have loss 0 in both."""
    branch = (losses[0].sum() < losses[1].sum()).long().view(1)
    chosen = statistics.index_select(0, branch)[0]
    chosen[:, STATE] = branch
    return losses.index_select(0, branch)[0], chosen


def policy_rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    advantages: Tensor,
    log_probs: Tensor,
    clip_ratio: float,
    gradient: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """KL(q, p) [N] of logits [N, V], and the ratios r [N] = q(label) / e^log_probs, both in the type of the losses.

    `gradient` [N, V], which may be `student`, receives the derivative by the student's logits of each row's
    KL(q, p) + `clipped_surrogate`. Advantages and log_probs are [N], in the type of the losses; every label is a
    token. No autograd.
    """
    rows = student, teacher, labels, ReverseKL(), 1.0, 0.0
    divergences, statistics = measure_rows(*rows)
    log_q = student.gather(1, labels[:, None])[:, 0] - statistics[:, STUDENT_LSE]
    ratios = (log_q - log_probs).exp().to(divergences.dtype)
    if gradient is not None:
        # The divergence's derivative is u - q slope, the surrogate's w q - w onehot: the kernel makes all but the last.
        weights = torch.where(is_clipped(ratios, advantages, clip_ratio), 0.0, advantages * ratios)
        statistics[:, SLOPE] -= weights
        row_gradients(*rows, statistics, torch.ones_like(divergences), gradient)
        gradient.scatter_add_(1, labels[:, None], -weights[:, None].to(gradient.dtype))
    return divergences, ratios


def clipped_surrogate(ratios: Tensor, advantages: Tensor, clip_ratio: float) -> Tensor:
    """PPO's loss max(-A r, -A clip(r, 1 - clip_ratio, 1 + clip_ratio)) of each row (arXiv 1707.06347, equation 7)."""
    return -torch.minimum(advantages * ratios, advantages * ratios.clamp(1 - clip_ratio, 1 + clip_ratio))


def is_clipped(ratios: Tensor, advantages: Tensor, clip_ratio: float) -> Tensor:
    """Where the surrogate has no gradient: the ratio is beyond, on the side that the advantage asks for."""
    return torch.where(advantages >= 0, ratios > 1 + clip_ratio, ratios < 1 - clip_ratio)


def new_large(like: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    """`like.new_empty` for tensors of many megabytes: on the CPU in huge pages where the system has them."""
    tensor = like.new_empty(shape, dtype=dtype)
    if _C is not None and tensor.device.type == "cpu" and tensor.nbytes > 1 << 22:
        _C.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


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
    """The sum of losses times factors [N], the losses [N], and the gradient [N, V] of the former."""
    kind = parse(divergence)
    rows = (student, teacher, labels, kind, temperature, hard_weight)
    gradient = new_large(student, *student.shape, dtype=student.dtype) if need_gradient else None
    if decides_per_batch(kind):
        losses, statistics = choose_branch(*measure_rows(*rows))
        if gradient is not None:
            row_gradients(*rows, statistics, torch.ones_like(losses) if factors is None else factors, gradient)
    else:
        losses = row_losses(*rows, gradient=gradient, upstream=factors)
    total = losses.sum() if factors is None else losses @ factors
    return total, losses, student.new_empty(0) if gradient is None else gradient


@_divergence.register_fake
def _(student, *arguments):  # noqa: ANN001
    need_gradient = arguments[-1]
    losses = student.new_empty(student.shape[0], dtype=loss_dtype(student))
    return losses.new_empty(()), losses, student.new_empty(student.shape if need_gradient else (0,))


@torch.library.custom_op("abkd_fast::scale_", mutates_args=("gradient",))
def _scale_(gradient: Tensor, upstream: Tensor) -> None:
    """gradient *= upstream, without touching it where that is known to be 1."""
    known = upstream.device.type == "cpu" and upstream.dim() == 0
    if not (known and upstream.item() == 1.0):
        gradient.mul_(upstream)


def scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """`gradient`, saved in forward, times `upstream` in backward: in place, which spares memory and time, unless
    retain_graph=True says that the saved one may be needed again, or torch.compile traces."""
    if torch._C._autograd._get_current_graph_task_keep_graph() or type(gradient) is not Tensor:
        gradient = gradient.clone()
    _scale_(gradient, upstream)
    return gradient


def _save(ctx, inputs, output) -> None:  # noqa: ANN001
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2])


def _backward(ctx, of_total: Tensor, of_losses: Tensor, _: Tensor) -> tuple:  # noqa: ANN001
    refuse_second_derivative()
    upstream = of_total if of_losses is None else of_losses[:, None]
    gradient = None if upstream is None else scaled(ctx.saved_tensors[0], upstream)
    return gradient, *[None] * 7


_divergence.register_autograd(_backward, setup_context=_save)


def refuse_second_derivative() -> None:
    """Called in backward passes. Raises RuntimeError under create_graph=True."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the gradients of abkd_fast have no derivatives themselves: call backward without create_graph=True"
        )


def check_labels(labels: Tensor | None, rows: int, hard_weight: float) -> Tensor | None:
    """`labels` as contiguous int64 [rows]; raises ValueError where they are missing or have another shape."""
    if labels is None:
        if hard_weight:
            raise ValueError(f"hard_weight is {hard_weight}: the cross-entropy needs labels")
        return None
    if labels.shape != (rows,):
        raise ValueError(f"labels have shape {list(labels.shape)}, expected [{rows}], one for each row of logits")
    return labels.long().contiguous()


def check_numbers(temperature: float, hard_weight: float, reduction: str) -> None:
    """Raises ValueError for a temperature, hard_weight or reduction that means nothing."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, expected a positive number")
    if not 0 <= hard_weight <= 1:
        raise ValueError(f"hard_weight is {hard_weight}, expected 0 to 1")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction is "{reduction}", expected "mean", "sum" or "none"')


MAX_PADDING = 1024


def shared_vocabulary(student: int, teacher: int) -> int:
    """The length of the common prefix of two padded vocabularies.

    One tokenizer's vocabulary is padded to different sizes in different models (Qwen: 151,936 and 152,064); the
    distributions are then taken over the common prefix. Sizes further apart than any padding raise ValueError.
    """
    if abs(student - teacher) > MAX_PADDING:
        raise ValueError(
            f"the student has {student} vocabulary entries and the teacher {teacher}: distillation needs one "
            "vocabulary (sizes that differ only by padding are cut to the common prefix)"
        )
    return min(student, teacher)


def count_kept(labels: Tensor | None, rows: Tensor) -> Tensor:
    """The number of `rows` [N, ...] that count, at least 1, as a scalar of their loss on their device."""
    dtype = loss_dtype(rows)
    if labels is None:
        return torch.tensor(max(1, rows.shape[0]), dtype=dtype, device=rows.device)
    return (labels != -100).sum().clamp(min=1).to(rows.device, dtype)


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
    """The divergence between teacher and student distributions, given as logits, differentiable by the student's.

    Args:
        student_logits, teacher_logits: [N, V], float32, bfloat16, float16 (read as such, computed in float32) or
            float64. Vocabularies that differ by padding are compared over their common prefix.
        divergence: for example `AlphaBeta(0.2, 0.7)`; see `abkd_fast.divergences`.
        labels: [N] integers; rows with -100 don't count. The others matter only with `hard_weight`.
        temperature: divides both logits inside the divergence; the loss is not multiplied by its square.
        hard_weight: w in (1 - w) divergence + w cross-entropy; the cross-entropy is at temperature 1.
        reduction: "mean" over the rows that count, "sum", or "none" ([N], 0 for rows that don't).

    Returns: float32 (float64 for float64 logits).

    Raises ValueError for shapes, sizes or numbers that don't fit together.

    The gradient [N, V] is made with the losses, in the type of the logits, and nothing else is kept for backward.

    Source: ABKD (arXiv 2505.04560), equation 5; the gradient is u - q sum(u), u = p^a q^b ((q / p)^a - 1) / a.
    """
    check_numbers(temperature, hard_weight, reduction)
    if student_logits.dim() != 2 or teacher_logits.dim() != 2 or len(student_logits) != len(teacher_logits):
        shapes = f"{list(student_logits.shape)} and {list(teacher_logits.shape)}"
        raise ValueError(f"student and teacher logits have shapes {shapes}, expected [N, V] with one N")
    if not student_logits.is_floating_point():
        raise ValueError(f"student logits are {student_logits.dtype}, expected a floating-point type")
    labels = check_labels(labels, len(student_logits), hard_weight)
    vocab = shared_vocabulary(student_logits.shape[1], teacher_logits.shape[1])
    student, teacher = student_logits[:, :vocab], teacher_logits[:, :vocab].detach().to(student_logits.dtype)
    student, teacher = (x if x.stride(1) == 1 else x.contiguous() for x in (student, teacher))
    factors = None
    if reduction == "mean":
        factors = count_kept(labels, student).reciprocal().expand(len(student)).contiguous()  # [N]
    need_gradient = torch.is_grad_enabled() and student.requires_grad
    options = str(divergence), temperature, hard_weight, factors, need_gradient
    total, losses, _ = _divergence(student, teacher, labels, *options)
    return losses if reduction == "none" else total
