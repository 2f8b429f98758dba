"""Launches the row kernels for every divergence, type and vocabulary near a limit; prints those that CUDA refuses.

A limit is where one more row no longer fits into the shared memory of the GPU that CARD_SM names. Nothing computes.
"""

import collections
import json
import sys

import card
import torch

from abkd_fast.losses import row_ops
from abkd_fast.losses.arguments import LossSpec, Rows
from abkd_fast.losses.divergences import CrossEntropy, parse

DIVERGENCES = [
    *map(parse, ("ab", "hellinger", "alphanet:0.2,0.8,token", "wsd", "bdkd", "akl", "jsd", "tvd")),
    CrossEntropy(),
]
# Of student, teacher and gradient.
TYPES = [3 * (dtype,) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
TYPES += [(torch.float32, torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32, torch.bfloat16)]
COMMON = 1, 7, 8, 1000, 1003, 32000, 50257, 50264, 100277, 128256, 151643, 151936, 256000, 262144
STATIC = 1100  # more bytes of static shared memory than a kernel has


def vocabularies(types: tuple[torch.dtype, ...], limit: int) -> set[int]:
    """Common ones, and all at which one or two rows may stop to fit. Rows are kept in multiples of 16 bytes."""
    student, teacher, _ = (dtype.itemsize for dtype in types)
    near = {(limit - used) // bytes_of for used in range(0, STATIC, 8) for bytes_of in (student, student + teacher)}
    return near | set(COMMON)


def calls(rows: Rows, gradient: torch.Tensor) -> dict[str, object]:
    """Every kind of call; the first two keep rows in shared memory."""
    student, teacher = rows.student, rows.teacher
    statistics = student.new_zeros(len(student), row_ops.STATISTICS, dtype=torch.float64)
    upstream = torch.ones(len(student), device=student.device)
    kinds = {
        "losses and gradient": lambda: row_ops.row_losses(rows, gradient, statistics),
        "losses": lambda: row_ops.row_losses(rows),
        "gradient": lambda: row_ops.row_gradients(rows, statistics, upstream, gradient),
        "normalizers": lambda: row_ops.row_normalizers(rows),
    }
    if teacher is not None:
        kinds["sums"] = lambda: row_ops.row_sums(rows, statistics)
    return kinds


def refused(divergence, types: tuple[torch.dtype, ...], limit: int) -> dict[str, list[int]]:
    """The vocabularies at which a kind of call is refused."""
    found, hard_weight = collections.defaultdict(list), 1.0 if isinstance(divergence, CrossEntropy) else 0.3
    labels = torch.zeros(2, dtype=torch.long, device="cuda")
    for vocab in sorted(vocabularies(types, limit)):
        student, teacher, gradient = (torch.empty(2, vocab, dtype=dtype, device="cuda") for dtype in types)
        teacher = None if isinstance(divergence, CrossEntropy) else teacher
        rows = Rows(student, teacher, labels, LossSpec(divergence, 2.0, hard_weight))
        for kind, call in calls(rows, gradient).items():
            first = card.count_launches()
            try:
                call()
            except RuntimeError:
                card.SHIM.cudaGetLastError()
                found[kind].append(vocab)
            else:
                launched = [x for x in card.launches(first) if b"row_kernel" in x.name]
                assert launched, (kind, vocab)
    return found


def main() -> None:
    limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    found = {}
    for divergence in DIVERGENCES:
        for types in TYPES:
            for kind, vocabs in refused(divergence, types, limit).items():
                found[f"{divergence or 'ce'} {types} {kind}"] = f"{len(vocabs)}: {vocabs[0]} to {vocabs[-1]}"
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
