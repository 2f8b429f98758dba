"""A vocabulary sharded over a process group: each rank has some rows of the projections, and all have the same tokens.

Each rank measures its own logits. The statistics of a row are merged, a few numbers per row: log-normalizers by an
all-gather, sums by an all-reduce. Each rank then has all that the gradient by its logits needs. The gradient of the
projection stays on the rank; the gradient of the hidden states is added up over the ranks, once per call.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .arguments import LinearHead, Rows, loss_dtype, shared_vocabulary
from .divergences import AlphaNet, Divergence, Family
from .reference import PLAIN_LSE, SLOPE, STATE
from .row_ops import row_normalizers, row_sums

DECIDING_ELEMENTS = 1 << 22  # logits from which BDKD and AKL decide at once, at about 40 bytes each
DIGIT = 4  # bits of AKL's threshold that one all-reduce finds


class Shard(NamedTuple):
    """A rank's part of the vocabulary, as plain values that an operator takes."""

    group: str  # the name of the process group
    first: int  # the first row of the vocabulary that this rank has
    widest: int  # rows of the largest part: it sets the sizes of chunks, which must be the same on all ranks

    def _group(self) -> dist.ProcessGroup:
        return dist.distributed_c10d._resolve_process_group(self.group)

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        dist.all_reduce(numbers, group=self._group())
        return numbers

    def local_labels(self, labels: Tensor, vocab: int) -> Tensor:
        """Labels [N] counted from this rank's first row. A label that another rank has becomes -1."""
        local = labels - self.first
        return torch.where((local >= 0) & (local < vocab), local, -1)

    def measure_rows(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """`row_ops.measure_rows` of the whole vocabulary, from this rank's logits [N, V] and `local_labels`."""
        student, teacher, _, (divergence, _, hard_weight, *_) = rows
        statistics, hard = self._normalize(rows)
        dtype = loss_dtype(student)
        if teacher is None:
            return (hard_weight * hard).to(dtype), statistics
        branches = divergence.branches if isinstance(divergence, AlphaNet) else (divergence,)
        statistics = statistics.repeat(len(branches), 1, 1)  # [branches, N, 6]
        if divergence.family in (Family.BALANCED_KL, Family.ADAPTIVE_KL):
            step = max(1, DECIDING_ELEMENTS // max(1, self.widest))
            for z, y, part in zip(*(x.split(step) for x in (student, teacher, statistics[0])), strict=True):
                part[:, STATE:] = self._decide(Rows(z, y, None, rows.spec), part)
        elif any(map(reference.is_bounded, branches)):
            statistics[..., STATE] = self._centered(rows, statistics[0], branches)
        sums = []
        for branch, part in zip(branches, statistics, strict=True):
            values = row_sums(rows._replace(spec=rows.spec._replace(divergence=branch)), part)
            sums += values.to(statistics.dtype), part[:, SLOPE]
        values, slopes = self.sum(torch.stack(sums)).unflatten(0, (-1, 2)).unbind(1)  # [branches, N] each
        losses = ((1 - hard_weight) * values + hard_weight * hard).to(dtype)
        statistics[..., SLOPE] = slopes
        if divergence.per == "batch":
            return losses, statistics
        if isinstance(divergence, AlphaNet):
            statistics[1, :, STATE + 1] = 1
            chosen = (values[0] < values[1]).long(), torch.arange(len(student), device=student.device)
            return losses[chosen], statistics[chosen]
        return losses[0], statistics[0]

    def _normalize(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Statistics [N, 6] with the log-normalizers of whole rows, and cross-entropies [N], 0 without hard_weight."""
        student, _, labels, spec = rows
        statistics = row_normalizers(rows)
        numbers = statistics[:, :SLOPE]
        if spec.hard_weight:
            # -inf adds nothing to a log sum exp: the result is the logit on the one rank that has the label.
            target = torch.full_like(statistics[:, 0], -math.inf)
            if student.shape[1]:
                own = student.gather(1, labels.clamp(min=0)[:, None])[:, 0]
                target = torch.where(labels >= 0, spec.student_map(own.to(target.dtype)), target)
            numbers = torch.cat((numbers, target[:, None]), 1)
        merged = _gather(numbers.contiguous(), self._group()).logsumexp(0)  # [N, 3 or 4]
        statistics[:, :SLOPE] = merged[:, :SLOPE]
        hard = merged[:, PLAIN_LSE] - merged[:, -1] if spec.hard_weight else torch.zeros_like(merged[:, 0])
        return statistics, hard

    def _decide(self, rows: Rows, statistics: Tensor) -> Tensor:
        """The weights [n, 2] of both directions, for BDKD and AKL."""
        maps = rows.spec.student_map, rows.spec.teacher_map
        z, y = (map(x.double()) for x, map in zip(rows[:2], maps, strict=True))
        a, b = reference.log_probs(rows._replace(student=z, teacher=y), statistics)  # [n, V]
        if rows.spec.divergence.family == Family.BALANCED_KL:
            return reference.entropy_weights(self.sum(reference.entropies(a, b)))
        head = self._head((-a).to(loss_dtype(rows.student)), *rows.spec.divergence.parameters)
        return reference.gap_weights(self.sum(reference.gaps(a, b, head)))

    def _centered(self, rows: Rows, statistics: Tensor, branches: Sequence[Divergence]) -> Tensor:
        """Whether the slopes of each row are centered, [branches, N]: see `reference.is_centered`."""
        # log q of this rank's likeliest token, and the answers
        own = statistics.new_full((1 + len(branches), len(statistics)), -math.inf)
        if rows.student.shape[1]:
            token = rows.student.argmax(1, keepdim=True)
            maps = rows.spec.student_map, rows.spec.teacher_map
            logits = (map(x.gather(1, token).double()) for x, map in zip(rows[:2], maps, strict=True))
            a, b = reference.log_probs(Rows(*logits, None, rows.spec), statistics)
            own = torch.cat((b, *(reference.is_centered(a, b, branch) for branch in branches)), 1).T.contiguous()
        gathered = _gather(own, self._group())  # [ranks, 1 + branches, N]
        rank = gathered[:, :1].argmax(0, keepdim=True)
        return gathered[:, 1:].gather(0, rank.expand(1, len(branches), -1))[0]

    def _head(self, surprisal: Tensor, mu: float) -> Tensor:
        """Whether each of this rank's tokens is in AKL's head, from their -log p, all [n, V].

        These numbers are not negative, so they have the same order as their bit patterns. The search finds, digit by
        digit, the largest pattern up to which tokens have at most `mu` together.
        """
        dtype = surprisal.dtype
        # A token of probability 0 is added, so that every rank has at least one.
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


def _gather(numbers: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The numbers of all ranks, stacked in a new first dimension."""
    parts = numbers.new_empty(group.size(), *numbers.shape)
    dist.all_gather(list(parts), numbers, group=group)
    return parts


def local_parts(
    student: LinearHead, teacher: LinearHead | None, group: dist.ProcessGroup | None
) -> tuple[LinearHead, LinearHead | None, dist.ProcessGroup | None]:
    """Both heads with the rows of this rank, and the group that has all rows: `group`, or that of the DTensors.

    Raises ValueError for DTensors that are not sharded by vocabulary, or are sharded over different groups.
    """
    heads = []
    for name, head in (("student", student), ("teacher", teacher)):
        if head is not None and _is_distributed(head.hidden):
            raise ValueError(
                f"{name}_hidden is a DTensor, expected a plain tensor, whole on every rank: {name}_hidden.full_tensor()"
            )
        for field in ("weight", "bias"):
            tensor = getattr(head, field, None)
            if _is_distributed(tensor):
                group = _common_group(f"{name}_{field}", tensor, group)
                head = head._replace(**{field: tensor.to_local()})
        heads.append(head)
    return *heads, group


def _is_distributed(tensor: Tensor | None) -> bool:
    """Whether it is a DTensor. The import of that class would take a second."""
    return hasattr(tensor, "device_mesh")


def _common_group(name: str, tensor: Tensor, group: dist.ProcessGroup | None) -> dist.ProcessGroup:
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


def divide_vocabulary(hidden: Tensor, student: int, teacher: int, group: dist.ProcessGroup) -> tuple[int, Shard]:
    """The number of this rank's rows that are in the common vocabulary, and their place in it.

    `student` and `teacher` are the numbers of rows that this rank has. Raises ValueError on all ranks if their numbers
    of tokens differ, or if the parts of both models don't fit together.
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
