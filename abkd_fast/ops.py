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
from .divergences import AlphaBeta, CrossEntropy, Divergence

try:
    from . import _C
except ImportError as error:
    _C, _MISSING = None, str(error)
else:
    if torch.version.cuda and _C.build_info()["cuda"]:
        import importlib.util

        torch.ops.load_library(importlib.util.find_spec("abkd_fast._cuda").origin)

    @torch.library.register_fake("abkd_fast::row_losses")
    def _row_losses_fake(student, teacher, labels, family, parameters, temperature, hard_weight, gradient):  # noqa: ANN001
        return student.new_empty(student.shape[0], dtype=_loss_dtype(student))


def build_info() -> dict:
    """How the extension was built: `cuda` (version or None), `cuda_archs`, `simd` (what runs here), `compiler`.

    Without the extension every value is None and `missing` holds the reason.
    """
    if _C is None:
        return {"cuda": None, "cuda_archs": [], "simd": None, "compiler": None, "missing": _MISSING}
    return _C.build_info()


def _loss_dtype(logits: Tensor) -> torch.dtype:
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
    divergence: Divergence | CrossEntropy,
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    gradient: Tensor | None = None,
) -> Tensor:
    """Losses [N] (float32; float64 for float64 logits) of logits [N, V]; see `csrc/rows.h` for the formula.

    `gradient` [N, V], which may be `student` itself, receives the derivative of each row's loss by its student
    logits. Rows with label -100 get loss and gradient 0. No autograd.
    """
    if not _compiled(student):
        return reference.row_losses(student, teacher, labels, divergence, temperature, hard_weight, gradient)
    return torch.ops.abkd_fast.row_losses(
        student, teacher, labels, divergence.family, divergence.parameters, temperature, hard_weight, gradient
    )


def restore(family: int, parameters: list[float]) -> Divergence | CrossEntropy:
    """The divergence that an operator received as its numbers."""
    return AlphaBeta(*parameters) if family == AlphaBeta.family else CrossEntropy()


@torch.library.custom_op("abkd_fast::divergence", mutates_args=())
def _divergence(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    family: int,
    parameters: list[float],
    temperature: float,
    hard_weight: float,
    need_gradient: bool,
) -> tuple[Tensor, Tensor]:
    gradient = torch.empty_like(student, memory_format=torch.contiguous_format) if need_gradient else None
    rows = (student, teacher, labels, restore(family, parameters), temperature, hard_weight)
    losses = row_losses(*rows, gradient=gradient)
    return losses, student.new_empty(0) if gradient is None else gradient


@_divergence.register_fake
def _(student, teacher, labels, family, parameters, temperature, hard_weight, need_gradient):  # noqa: ANN001
    losses = student.new_empty(student.shape[0], dtype=_loss_dtype(student))
    return losses, student.new_empty(student.shape if need_gradient else (0,))


def _save_gradient(ctx, inputs, output) -> None:  # noqa: ANN001
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(ctx, upstream: Tensor, _: Tensor) -> tuple:  # noqa: ANN001
    refuse_second_derivative()
    if upstream is None:
        return (None,) * 8
    (gradient,) = ctx.saved_tensors
    return (gradient * upstream[:, None]).to(gradient.dtype), *[None] * 7


_divergence.register_autograd(_backward, setup_context=_save_gradient)


def refuse_second_derivative() -> None:
    """Called in backward passes. Raises RuntimeError under create_graph=True: gradients are made in forward."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "abkd_fast computes gradients in its forward pass, so they have no derivatives themselves: "
            "call backward without create_graph=True"
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


def count_kept(labels: Tensor | None, losses: Tensor) -> Tensor:
    """The number of rows that count, at least 1, as a scalar tensor on the device of `losses`."""
    if labels is None:
        return torch.tensor(max(1, losses.shape[0]), dtype=losses.dtype, device=losses.device)
    return (labels != -100).sum().clamp(min=1).to(losses.device, losses.dtype)


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
        divergence: for example `AlphaBeta(0.2, 0.7)`.
        labels: [N] integers; rows with -100 don't count. The others matter only with `hard_weight`.
        temperature: divides both logits inside the divergence; the loss is not multiplied by its square.
        hard_weight: w in (1 - w) divergence + w cross-entropy; the cross-entropy is at temperature 1.
        reduction: "mean" over the rows that count, "sum", or "none" ([N], 0 for rows that don't).

    Returns: float32 (float64 for float64 logits).

    Raises ValueError for shapes, sizes or numbers that don't fit together.

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
    need_gradient = torch.is_grad_enabled() and student.requires_grad
    losses, _ = _divergence(
        student, teacher, labels, divergence.family, divergence.parameters, temperature, hard_weight, need_gradient
    )
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / count_kept(labels, losses)
