"""The custom operators: the compiled row kernel, and the divergence between logits with its autograd.

`row_losses` is the one door to the kernels. Where no compiled kernel fits (the extension is missing, or float64
on a GPU) it says so once and goes through `reference.py`.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from . import reference
from .arguments import loss_dtype
from .divergences import AlphaNet, Divergence
from .reference import STATE, STATISTICS

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
    """Losses [N] (float32; float64 for float64 logits) of logits [N, V]; see `csrc/row_call.h` for the formula.

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
    """Statistics [N, 6] (float64) of logits [N, V], of which only the log-normalizers are made: those at `temperature`
    where there is a teacher, and the student's own where there is a `hard_weight`. No autograd."""
    statistics = student.new_zeros(len(student), STATISTICS, dtype=torch.float64)
    normalizers = torch.ops.abkd_fast.row_normalizers if _compiled(student) else reference.row_normalizers
    normalizers(student, teacher, temperature, hard_weight, statistics)
    return statistics


def row_sums(
    student: Tensor, teacher: Tensor, divergence: Divergence, temperature: float, statistics: Tensor
) -> Tensor:
    """The sums over V, [N] in the type of the losses, of the divergence's terms of logits [N, V].

    `statistics` [N, 6] must have the log-normalizers, of these logits or of all shards', and what the divergence has
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


def new_large(like: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    """`like.new_empty` for tensors of many megabytes: on the CPU in huge pages where the system has them."""
    tensor = like.new_empty(shape, dtype=dtype)
    if _C is not None and tensor.device.type == "cpu" and tensor.nbytes > 1 << 22:
        _C.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


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


def refuse_second_derivative() -> None:
    """Called in backward passes. Raises RuntimeError under create_graph=True."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the gradients of abkd_fast have no derivatives themselves: call backward without create_graph=True"
        )
