"""How much longer the fused head takes on an H100 than its bare products, by counting: a section of predict.py.

Each step of the head takes as long as its products, or as its bytes, whichever is longer. The row kernel's loads and
its arithmetic come one after the other. Times are picoseconds per logit, that is per token and entry of the vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

from harness import Report

ALIGNED, MISALIGNED = 650e12, 200e12  # operations a second of products in bfloat16, by the alignment of their rows
BANDWIDTH, CACHE = 3e12, 50e6  # bytes a second of the memory, bytes of the second-level cache
PROCESSORS, SHARED = 132, 232448  # multiprocessors, and the bytes of shared memory that a block may have
ISSUE_SLOTS = PROCESSORS * 4 * 32 * 1.755e9  # instructions a second: 4 schedulers, each a warp of 32 a cycle
GIB, ALIGNMENT, TILE, TOKENS = 1 << 30, 64, 128, 8192  # TOKENS: of a micro-batch


class Case(NamedTuple):
    """The widths of a student and its teacher (0: none), and the vocabulary."""

    name: str
    width: int
    teacher: int
    vocab: int
    frozen: bool = False  # the student's projection has no gradient, as with LoRA


CASES = (
    Case("GPT-2 XL to GPT-2", 768, 1600, 50257),
    Case("GPT-2 without a teacher", 768, 0, 50257),
    Case("Llama 7B to 3B, LoRA", 3200, 4096, 32000, frozen=True),
    Case("Qwen, 5120 to 4096 wide", 4096, 5120, 151936),
)


@dataclass(frozen=True)
class Design:
    """What the head does between its products."""

    name: str
    gradient_bytes: int  # of a logit's gradient, as the row kernel writes it
    casts: bool  # each product that reads the gradient makes a copy of 16 bits, with rows as long as the vocabulary
    chunk_bytes: int  # that a chunk's buffers may have
    power_of_two: bool  # a chunk's rows
    with_teacher: tuple[float, ...]  # instructions per logit of each pass
    without_teacher: tuple[float, ...]

    def rows(self, case: Case) -> int:
        """Of a chunk."""
        models, own_buffer = 2 if case.teacher else 1, 0 if self.casts else self.gradient_bytes
        width = -(-case.vocab // ALIGNMENT) * ALIGNMENT
        fitting = self.chunk_bytes // (width * (4 * models + own_buffer))
        fitting = 1 << (fitting.bit_length() - 1) if self.power_of_two else fitting // TILE * TILE
        return min(fitting, TOKENS)

    def passes(self, case: Case) -> tuple[float, ...]:
        return self.with_teacher if case.teacher else self.without_teacher


# Alpha-beta and cross-entropy for sm_90. AFTER is what `python tests/csrc/machine_code.py` prints, the shortest way:
# one pass and the gradient of 16 bits; both passes of the cross-entropy. BEFORE is what it printed for the kernel of
# commit 454c8fc, which wrote a gradient of 32 bits after three passes.
BEFORE = Design("before", 4, True, GIB, True, (41.0, 103.8, 62.5), (17.0, 23.5))
# REFUSED: rows where student and teacher nearly agree take the one pass for nothing, and then the exact ones.
AFTER = Design("after", 2, False, 4 * GIB, False, (31.9, 25.5), (21.5, 27.5))
REFUSED = Design("refused", 2, False, 4 * GIB, False, (31.9, 38.0, 90.2, 66.0), (21.5, 27.5))


class Step(NamedTuple):
    """What a step takes, per logit."""

    bytes: float
    operations: float = 0.0
    rate: float = ALIGNED
    instructions: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.operations / self.rate, self.bytes / BANDWIDTH) + self.instructions / ISSUE_SLOTS


def row_kernel(case: Case, design: Design) -> Step:
    """Reads rows once if shared memory and the second-level cache hold those of all blocks, else in each pass."""
    models, passes = 2 if case.teacher else 1, design.passes(case)
    kept = min(models, SHARED // (4 * case.vocab))
    again = models - kept if PROCESSORS * (models - kept) * 4 * case.vocab > CACHE else 0
    size = 4 * (models + again * (len(passes) - 1)) + design.gradient_bytes
    return Step(size, instructions=sum(passes))


def steps(case: Case, design: Design) -> list[Step]:
    rows, backward = design.rows(case), 1 if case.frozen else 2
    weights = 2 / rows  # bytes of a projection per logit and column: each chunk reads it
    found = [Step(4 + weights * width, 2 * width) for width in (case.width, case.teacher) if width]
    found.append(row_kernel(case, design))
    if design.casts:
        found += backward * [Step(design.gradient_bytes + 2)]
    rate = MISALIGNED if design.casts and case.vocab % ALIGNMENT else ALIGNED
    found.append(Step(2 + weights * case.width, 2 * case.width, rate))
    if not case.frozen:
        found.append(Step(2 + 8 * case.width / rows, 2 * case.width, rate))  # a float32 sum, read and written
    return found


def products_seconds(case: Case) -> float:
    """Of the bare products, with aligned rows."""
    return 2 * (case.width * (2 if case.frozen else 3) + case.teacher) / ALIGNED


def predict_heads(report: Report) -> None:
    rows, columns = [], {"products": "products, ps|.1f"}
    for case in CASES:
        row = {"name": f"{case.name}, {case.vocab:,}", "products": 1e12 * products_seconds(case)}
        for design in (BEFORE, AFTER, REFUSED):
            taken, passes = steps(case, design), design.passes(case)
            row |= {
                f"rows_{design.name}": design.rows(case),
                f"bytes_{design.name}": sum(step.bytes for step in taken),
                f"instructions_{design.name}": sum(passes),
                f"head_{design.name}": sum(step.seconds for step in taken) / products_seconds(case),
            }
        rows.append(row)
    for key, title in (("rows", "rows a chunk"), ("bytes", "bytes"), ("instructions", "instructions")):
        columns |= {f"{key}_before": f"{title}, before|.0f", f"{key}_after": "after|.0f"}
    columns |= {"head_before": "head / products, before|.2f", "head_after": "after|.2f"}
    columns |= {"head_refused": "after, all rows refused|.2f"}
    report.table("head", "per logit on one H100, estimated from counts", rows, columns)
