"""One vocabulary over the ranks of a process group: each has a part of the projections' rows, all have the same tokens.

A row's statistics are made of each rank's logits and merged, a few numbers a row: log-normalizers by one all-gather,
sums by one all-reduce. What a gradient by logits needs besides is at hand then, so projections keep theirs to
themselves; each rank's part of the hidden states' gradient is added up once a call.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .arguments import loss_dtype, shared_vocabulary
from .divergences import AlphaNet, Divergence, Family
from .reference import PLAIN_LSE, SLOPE, STATE
from .row_ops import decides_per_batch, row_normalizers, row_sums

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Model = tuple[Tensor | None, Tensor | None, Tensor | None]  # hidden states, projection, bias
DECIDING_ELEMENTS = 1 << 22  # logits that BDKD and AKL look at at once, in some 40 bytes each
DIGIT = 4  # bits of AKL's threshold that one all-reduce settles


class Shard(NamedTuple):
    """A rank's part of the vocabulary, as plain values that an operator takes."""

    group: str  # the name of the process group
    first: int  # the first row that this rank has
    widest: int  # rows of the largest part: what all ranks do in turns is cut by it

    def _group(self) -> ProcessGroup:
        return dist.distributed_c10d._resolve_process_group(self.group)

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        dist.all_reduce(numbers, group=self._group())
        return numbers

    def local_labels(self, labels: Tensor, vocab: int) -> Tensor:
        """Labels [N] counted from this rank's first row; -1 where another rank has them."""
        local = labels - self.first
        return torch.where((local >= 0) & (local < vocab), local, -1)

    def measure_rows(
        self,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor | None,
        divergence: Divergence,
        temperature: float,
        hard_weight: float,
    ) -> tuple[Tensor, Tensor]:
        """`ops.measure_rows` of logits [N, V] of which this is one rank's part, with `local_labels`."""
        statistics, hard = self._normalize(student, teacher, labels, temperature, hard_weight)
        dtype = loss_dtype(student)
        if teacher is None:
            return (hard_weight * hard).to(dtype), statistics
        if divergence.family in (Family.BALANCED_KL, Family.ADAPTIVE_KL):
            step = max(1, DECIDING_ELEMENTS // max(1, self.widest))
            for parts in zip(*(x.split(step) for x in (student, teacher, statistics)), strict=True):
                parts[2][:, STATE:] = self._decide(*parts, divergence, temperature)
        branches = divergence.branches if isinstance(divergence, AlphaNet) else (divergence,)
        sums = torch.stack([x for kind in branches for x in _sums(student, teacher, kind, temperature, statistics)])
        values, slopes = self.sum(sums).unflatten(0, (-1, 2)).unbind(1)  # [branches, N] each
        losses = ((1 - hard_weight) * values + hard_weight * hard).to(dtype)
        statistics = statistics.repeat(len(branches), 1, 1)  # [branches, N, 6]
        statistics[..., SLOPE] = slopes
        if decides_per_batch(divergence):
            return losses, statistics
        if isinstance(divergence, AlphaNet):
            statistics[1, :, STATE] = 1
            chosen = (values[0] < values[1]).long(), torch.arange(len(student), device=student.device)
            return losses[chosen], statistics[chosen]
        return losses[0], statistics[0]

    def _normalize(
        self, student: Tensor, teacher: Tensor | None, labels: Tensor | None, temperature: float, hard_weight: float
    ) -> tuple[Tensor, Tensor]:
        """Statistics [N, 6] with whole rows' log-normalizers, and cross-entropies [N], 0 without `hard_weight`."""
        statistics = row_normalizers(student, teacher, temperature, hard_weight)
        numbers = statistics[:, :SLOPE]
        if hard_weight:
            # -inf adds nothing to a log sum exp: what comes out is the logit of the one rank that has the label.
            target = torch.full_like(statistics[:, 0], -math.inf)
            if student.shape[1]:
                own = student.gather(1, labels.clamp(min=0)[:, None])[:, 0]
                target = torch.where(labels >= 0, own.to(target.dtype), target)
            numbers = torch.cat((numbers, target[:, None]), 1)
        merged = _gather(numbers.contiguous(), self._group()).logsumexp(0)  # [N, 3 or 4]
        statistics[:, :SLOPE] = merged[:, :SLOPE]
        hard = merged[:, PLAIN_LSE] - merged[:, -1] if hard_weight else torch.zeros_like(merged[:, 0])
        return statistics, hard

    def _decide(
        self, student: Tensor, teacher: Tensor, statistics: Tensor, divergence: Divergence, temperature: float
    ) -> Tensor:
        """BDKD's and AKL's weights [n, 2] of both directions."""
        a, b = reference.log_probs(student, teacher, temperature, statistics)  # [n, V]
        if divergence.family == Family.BALANCED_KL:
            return reference.entropy_weights(self.sum(reference.entropies(a, b)))
        head = self._head((-a).to(loss_dtype(student)), *divergence.parameters)
        return reference.gap_weights(self.sum(reference.gaps(a, b, head)))

    def _head(self, surprisal: Tensor, mu: float) -> Tensor:
        """Which of this rank's tokens are in AKL's head, from their -log p, all [n, V].

        These are positive numbers, which are in the order of their bit patterns. The largest pattern up to which
        tokens have `mu` together, at most, is found digit by digit.
        """
        dtype = surprisal.dtype
        # A token of probability 0, so that no rank has none.
        surprisal = F.pad(surprisal.clamp(min=0), (0, 1), value=math.inf)
        ordered = surprisal.sort(1).values
        mass = F.pad(ordered.double().neg().exp().cumsum(1), (1, 0))  # [n, V + 2], of the likeliest k tokens
        likeliest = ordered[:, :1].clone()
        dist.all_reduce(likeliest, dist.ReduceOp.MIN, group=self._group())
        pattern = torch.int32 if dtype == torch.float32 else torch.int64
        limit = torch.zeros_like(likeliest, dtype=pattern)  # [n, 1]
        digits = torch.arange(1, 1 << DIGIT, dtype=pattern, device=limit.device)
        for shift in reversed(range(0, 8 * dtype.itemsize, DIGIT)):
            probes = limit + (digits << shift)  # [n, 15]; negative where the first digit reaches the sign
            within = self.sum(mass.gather(1, torch.searchsorted(ordered, probes.view(dtype), right=True)))
            limit += ((within <= mu) & (probes >= 0)).sum(1, keepdim=True).to(pattern) << shift
        return ((surprisal <= limit.view(dtype)) | (surprisal == likeliest))[:, :-1]


def _sums(
    student: Tensor, teacher: Tensor, divergence: Divergence, temperature: float, statistics: Tensor
) -> tuple[Tensor, Tensor]:
    """This rank's sums of values and slopes, [N] in float64."""
    values = row_sums(student, teacher, divergence, temperature, statistics)
    return values.to(statistics.dtype), statistics[:, SLOPE].clone()


def _gather(numbers: Tensor, group: ProcessGroup) -> Tensor:
    """Those of all ranks, in a new first dimension."""
    parts = numbers.new_empty(group.size(), *numbers.shape)
    dist.all_gather(list(parts), numbers, group=group)
    return parts


def local_parts(student: Model, teacher: Model, group: ProcessGroup | None) -> tuple[Model, Model, ProcessGroup | None]:
    """Both models with the rows that this rank has, and the group that has all: DTensors bring theirs.

    Raises ValueError for DTensors that are not sharded by vocabulary, or by different groups.
    """
    models = []
    for name, (hidden, *projection) in (("student", student), ("teacher", teacher)):
        if _is_distributed(hidden):
            raise ValueError(
                f"{name}_hidden is a DTensor, expected a plain tensor, whole on every rank: {name}_hidden.full_tensor()"
            )
        for i, tensor in enumerate(projection):
            if _is_distributed(tensor):
                group = _common_group(f"{name}_{('weight', 'bias')[i]}", tensor, group)
                projection[i] = tensor.to_local()
        models.append((hidden, *projection))
    return *models, group


def _is_distributed(tensor: Tensor | None) -> bool:
    """Whether it is a DTensor, without the second that importing these takes."""
    return hasattr(tensor, "device_mesh")


def _common_group(name: str, tensor: Tensor, group: ProcessGroup | None) -> ProcessGroup:
    mesh, placements = tensor.device_mesh, tensor.placements
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise ValueError(
            f"{name} is a DTensor placed as {placements}, expected (Shard(0),), that is by vocabulary on a mesh of one "
            "dimension: redistribute it, or, where FSDP shards it too, call the loss inside the module's forward"
        )
    ranks, expected = mesh.mesh.tolist(), dist.get_process_group_ranks(group or mesh.get_group())
    if ranks != expected:
        raise ValueError(f"{name} is sharded over ranks {ranks}, expected {expected}, those of the group in its order")
    return group or mesh.get_group()


def divide_vocabulary(hidden: Tensor, student: int, teacher: int, group: ProcessGroup) -> tuple[int, Shard]:
    """How many rows of this rank's `student` and `teacher` are in the common vocabulary, and where they are in it.

    Raises ValueError on all ranks where their tokens or the parts of both models don't fit together.
    """
    own = torch.tensor([len(hidden), student, teacher], device=hidden.device)
    tokens, ours, theirs = _gather(own, group).T.tolist()
    if len(set(tokens)) > 1:
        raise ValueError(f"the ranks have {tokens} hidden states, expected the same ones on all ranks of the group")
    vocab = shared_vocabulary(sum(ours), sum(theirs))
    sizes = _cut(ours, vocab)
    if sizes != _cut(theirs, vocab):
        raise ValueError(
            f"the ranks have {ours} rows of the student's projection and {theirs} of the teacher's: shard both at the "
            "same rows of the vocabulary (only what pads one at its end may make a difference)"
        )
    rank = group.rank()
    return sizes[rank], Shard(group.group_name, sum(sizes[:rank]), max(sizes))


def _cut(sizes: list[int], vocab: int) -> list[int]:
    """The sizes of consecutive parts within the first `vocab` rows."""
    ends = [min(end, vocab) for end in itertools.accumulate(sizes)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
