"""The compiled row kernels as functions of tensors, and what the losses around them share.

If no compiled kernel fits (the extension is missing, or logits are float64 on a GPU), the functions warn once and call
`reference.py`.
"""

import importlib.util
import warnings

import torch
from torch import Tensor

from . import reference
from .arguments import Rows, loss_dtype
from .reference import BOTH_BRANCHES, PLAIN_LSE, SLOPE, STATE, STATISTICS

try:
    from . import _C
except ImportError as error:
    _C, _MISSING = None, str(error)
else:
    if torch.version.cuda and _C.build_info()["cuda"]:
        torch.ops.load_library(importlib.util.find_spec("abkd_fast.losses._cuda").origin)

    def _losses_fake(student, *_):  # noqa: ANN001
        return student.new_empty(student.shape[0], dtype=loss_dtype(student))

    for _name in ("row_losses", "row_sums"):
        torch.library.register_fake(f"abkd_fast::{_name}", _losses_fake)
    for _name in ("row_gradients", "row_normalizers"):
        torch.library.register_fake(f"abkd_fast::{_name}", lambda *_: None)


def build_info() -> dict:
    """How the extension was built: `cuda` (version or None), `cuda_archs`, `simd` (in use on this CPU), `compiler`.

    Without the extension `cuda_archs` is empty, the other values are None, and `missing` holds the reason. Raises
    ValueError where the environment variable ABKD_SIMD names no instruction set.
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


def _operands(rows: Rows) -> tuple:
    """The rows as the compiled operators take them."""
    divergence, temperature, hard_weight, *_ = rows.spec
    return *rows[:3], divergence.family, divergence.parameters, temperature, hard_weight, rows.spec.maps


def row_losses(
    rows: Rows, gradient: Tensor | None = None, statistics: Tensor | None = None, upstream: Tensor | None = None
) -> Tensor:
    """Losses [N] (float32; float64 for float64 logits); `csrc/row_call.h` has the formula.

    `gradient` [N, V], which may be `rows.student` or have another type, receives the derivative of each row's loss by
    its student logits, times `upstream` [N] (in the type of the losses) if that is given. `statistics` [N, 6] (float64)
    receive what `row_gradients` needs to make the gradient later. Rows with label -100 get loss and gradient 0.
    AlphaNet compares its branches row by row here, for any `per`. No autograd.

    On a GPU a gradient of 16 bits costs one pass less where the divergence allows it, with a relative error of the loss
    up to 1e-3 in rows where student and teacher nearly agree: csrc/cuda/online.cuh has the bounds.
    """
    if not _compiled(rows.student):
        return reference.row_losses(rows, gradient, statistics, upstream)
    return torch.ops.abkd_fast.row_losses(*_operands(rows), gradient, statistics, upstream)


def row_gradients(rows: Rows, statistics: Tensor, upstream: Tensor, gradient: Tensor) -> None:
    """Writes the derivative of each row's loss by its student logits, times `upstream` [N] (in the type of the losses),
    to `gradient` [N, V], which may be `rows.student`.

    `statistics` come from `row_losses` of the same logits, or are merged from `row_normalizers` and `row_sums` of all
    shards. A label that another shard has is -1. No autograd.
    """
    if not _compiled(rows.student):
        return reference.row_gradients(rows, statistics, upstream, gradient)
    return torch.ops.abkd_fast.row_gradients(*_operands(rows), statistics, upstream, gradient)


def row_normalizers(rows: Rows) -> Tensor:
    """Statistics [N, 6] (float64) with nothing but the log-normalizers: those at the temperature if there is a
    teacher, and the student's own if there is a hard_weight. No autograd."""
    statistics = rows.student.new_zeros(len(rows.student), STATISTICS, dtype=torch.float64)
    if _compiled(rows.student):
        _, temperature, hard_weight, *_ = rows.spec
        options = temperature, hard_weight, rows.spec.maps
        torch.ops.abkd_fast.row_normalizers(rows.student, rows.teacher, *options, statistics)
    else:
        reference.row_normalizers(rows, statistics)
    return statistics


def row_sums(rows: Rows, statistics: Tensor) -> Tensor:
    """The divergence's terms, summed over the vocabulary: [N] in the type of the losses.

    `statistics` [N, 6] must have the log-normalizers, of these logits or of all shards, and what the divergence has
    decided for each row. They receive the sum of slopes. With the state `BOTH_BRANCHES` AlphaNet's first branch is
    summed, and the statistics receive the second branch's terms as their sum of slopes. No autograd.
    """
    if not _compiled(rows.student):
        return reference.row_sums(rows, statistics)
    student, teacher, _, family, parameters, temperature, _, maps = _operands(rows)
    return torch.ops.abkd_fast.row_sums(student, teacher, family, parameters, temperature, maps, statistics)


def measure_rows(rows: Rows) -> tuple[Tensor, Tensor]:
    """Losses [N] and statistics [N, 6]. For AlphaNet per batch they are [2, N] and [2, N, 6], one for each branch."""
    if rows.spec.divergence.per == "batch":
        return _measure_branches(rows)
    statistics = rows.student.new_zeros(len(rows.student), STATISTICS, dtype=torch.float64)
    return row_losses(rows, statistics=statistics), statistics


def _measure_branches(rows: Rows) -> tuple[Tensor, Tensor]:
    """Both branches of AlphaNet, in one pass after that of the log-normalizers."""
    statistics = row_normalizers(rows)
    statistics[:, STATE] = BOTH_BRANCHES
    losses = torch.stack((row_sums(rows, statistics), statistics[:, SLOPE].to(loss_dtype(rows.student))))
    statistics = statistics.repeat(2, 1, 1)
    statistics[..., STATE] = 0.0  # slopes are not centered
    # An alpha-divergence is (1 - M) / (alpha (1 - alpha)), and its slopes come to (1 - M) / alpha.
    for alpha, values, branch in zip(rows.spec.divergence.parameters, losses, statistics, strict=True):
        branch[:, SLOPE] = (1.0 - alpha) * values
    if rows.spec.hard_weight:
        losses = torch.lerp(losses, cross_entropies(rows, statistics[0]).to(losses.dtype), rows.spec.hard_weight)
    return losses if rows.labels is None else torch.where(rows.labels == -100, 0.0, losses), statistics


def cross_entropies(rows: Rows, statistics: Tensor) -> Tensor:
    """log sum exp z - z[label] [N] in float64, from `row_normalizers`. Meaningless for rows that don't count."""
    target = rows.student.gather(1, rows.labels.clamp(min=0)[:, None])[:, 0]
    return statistics[:, PLAIN_LSE] - rows.spec.student_map(target.double())


def choose_branch(losses: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """AlphaNet per batch: losses [N] and statistics [N, 6] of the branch with the larger mean, chosen without a
    synchronization with the device. Rows that don't count have loss 0 in both branches."""
    branch = (losses[0].sum() < losses[1].sum()).long().view(1)
    chosen = statistics.index_select(0, branch)[0]
    chosen[:, STATE + 1] = branch
    return losses.index_select(0, branch)[0], chosen


def new_large(like: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    """`like.new_empty` for tensors of many megabytes: on the CPU they lie in huge pages, if the system has them."""
    tensor = like.new_empty(shape, dtype=dtype)
    if _C is not None and tensor.device.type == "cpu" and tensor.nbytes > 1 << 22:
        _C.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


@torch.library.custom_op("abkd_fast::scale_", mutates_args=("gradient",))
def _scale_(gradient: Tensor, upstream: Tensor) -> None:
    """gradient *= upstream. If `upstream` is the number 1, nothing is moved: `loss.backward()` begins with it."""
    is_number = upstream.dim() == 0
    if is_number and upstream.device.type == "cpu" and upstream.item() == 1.0:
        return
    both = (gradient.dtype, upstream.dtype) == (torch.float32, torch.float32)
    if is_number and both and gradient.is_cuda and gradient.is_contiguous() and _compiled(gradient):
        torch.ops.abkd_fast.scale_known_later_(gradient, upstream)
    else:
        gradient.mul_(upstream)


def scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """In backward: `gradient`, which forward has saved, times `upstream`.

    The product is in place, which spares memory and time, except if retain_graph=True says that the saved gradient may
    be needed again, or if torch.compile traces.
    """
    if torch._C._autograd._get_current_graph_task_keep_graph() or type(gradient) is not Tensor:
        gradient = gradient.clone()
    _scale_(gradient, upstream)
    return gradient


def refuse_second_derivative() -> None:
    """In backward: raises RuntimeError for create_graph=True."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the gradients of abkd_fast have no derivatives themselves: call backward without create_graph=True"
        )
