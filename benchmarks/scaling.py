"""What several GPUs would do: bytes that each mode moves in a step, and samples a second, predicted from shapes alone.

`python benchmarks/scaling.py` prints Markdown tables. Nothing is run on a GPU: work and sizes are those of
abkd_fast/costs.py, shares those that the trainer deals, and the machine is described by the options.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator
from unittest import mock

import numpy as np
from transformers import AutoConfig

from abkd_fast import distributed
from abkd_fast.data import batches
from abkd_fast.training.costs import ModelCost, StepCost
from workload import PROMPTS, RESPONSES, draw_lengths

BUCKET_BYTES = 25e6  # DistributedDataParallel's default: what it sums at a time
BACKWARD_SHARE = 2 / 3  # of a student's forward and backward passes
TEXT_LENGTH = 512
LLAMA = {"model_type": "llama", "vocab_size": 32000, "num_attention_heads": 32}


@dataclasses.dataclass(frozen=True)
class Pair:
    """Models of a packaged recipe, and what its step takes. `adapter`: rank of the q and v projections' adapters."""

    title: str
    student: dict
    teacher: dict
    batch_size: int
    max_tokens: int
    adapter: int | None = None

    def cost(self, cached: bool) -> StepCost:
        student, teacher = (ModelCost(AutoConfig.for_model(**shape)) for shape in (self.student, self.teacher))
        adapter = self.adapter and student.layers * 2 * self.adapter * 2 * student.width
        return StepCost(student, adapter, teacher, cached)


PAIRS = (
    Pair(
        "GPT-2 XL to GPT-2",
        {"model_type": "gpt2"},
        {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25},
        32,
        8192,
    ),
    Pair(
        "OpenLLaMA 7B to 3B, LoRA",
        {**LLAMA, "hidden_size": 3200, "intermediate_size": 8640, "num_hidden_layers": 26},
        {**LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
        16,
        4096,
        adapter=16,
    ),
)


@dataclasses.dataclass(frozen=True)
class Step:
    """One rank's part of a step, the longest: operations, and bytes that it sends, by mode."""

    flops: float
    micro_batches: int
    imbalance: float
    ddp: float
    fsdp: float


def samples(count: int) -> list[dict]:
    """As long as Dolly's."""
    generator = np.random.default_rng(0)
    prompts, responses = (draw_lengths(quantiles, 1, count, generator)[0] for quantiles in (PROMPTS, RESPONSES))
    whole = np.minimum(prompts + responses, TEXT_LENGTH)
    return [{"input_ids": range(n), "prompt_length": int(p)} for n, p in zip(whole, prompts, strict=True)]


def step(pair: Pair, cost: StepCost, ranks: int, batch_size: int) -> Step:
    """Of `batch_size` samples and as many blocks of plain text, as the trainer shares them out."""
    with mock.patch.object(distributed, "world", return_value=ranks):
        drawn = samples(batch_size)
        shares = batches.balance_by_tokens([len(sample["input_ids"]) for sample in drawn])
    of_samples = [cost.flops([drawn[place] for place in share]) for share in shares]
    blocks = -(-batch_size // ranks)
    of_text = cost.flops([{"input_ids": range(TEXT_LENGTH), "prompt_length": 1}] * blocks, taught=False)
    tokens = [sum(len(drawn[place]["input_ids"]) for place in share) for share in shares]
    micro_batches = -(-max(tokens) // pair.max_tokens) + -(-blocks * TEXT_LENGTH // pair.max_tokens)
    trained = cost.student.parameters if cost.adapter is None else cost.adapter
    ring = (ranks - 1) / ranks
    read = 0 if cost.cached else -(-max(tokens) // pair.max_tokens)  # micro-batches that the teacher reads
    gathers = 2 * (2 * cost.student.parameters * micro_batches + cost.teacher.parameters * read)  # bfloat16, twice
    return Step(
        max(of_samples) + of_text,
        micro_batches,
        max(tokens) * ranks / sum(tokens) - 1,
        ddp=ring * 2 * 4 * trained,  # a sum in float32 goes round twice
        fsdp=ring * (gathers + 4 * trained * micro_batches),
    )


def seconds(part: Step, mode: str, ranks: int, machine: argparse.Namespace) -> float:
    """Of a step. What a backward pass hides of the traffic, it hides; the last bucket, or the first layer, shows."""
    compute = part.flops / (machine.tflops * 1e12 * machine.mfu)
    if ranks == 1:
        return compute
    bandwidth = 1e9 * (machine.inside if ranks <= machine.node else machine.between)
    latency = 1e-6 * machine.latency * np.log2(ranks)
    if mode == "ddp":
        traffic = part.ddp / bandwidth + latency * max(1, part.ddp / 2 / BUCKET_BYTES)
        hidden = BACKWARD_SHARE * compute / part.micro_batches  # only the last one's gradients travel
        return compute + max(traffic - hidden, min(traffic, BUCKET_BYTES / bandwidth + latency))
    traffic = part.fsdp / bandwidth
    return max(compute, traffic) + (1 - 0.9) * traffic / part.micro_batches + latency


def rows(pair: Pair, machine: argparse.Namespace) -> Iterator[list[str]]:
    for cached, fixed in itertools.product((True, False), (True, False)):
        cost = pair.cost(cached)
        for ranks in (8, 64, 512):
            batch_size = pair.batch_size if fixed else pair.batch_size * ranks
            if batch_size < ranks:
                continue  # refused: a rank without a sample
            part = step(pair, cost, ranks, batch_size)
            alone = seconds(step(pair, cost, 1, batch_size), "ddp", 1, machine)
            gains = [alone / seconds(part, mode, ranks, machine) for mode in ("ddp", "fsdp")]
            yield [
                "cached" if cached else "in every step",
                f"{batch_size:,}",
                str(ranks),
                f"{part.imbalance:.1%}",
                *(f"{size / 1e9:.3g}" for size in (part.ddp, part.fsdp)),
                *(f"{gain:.1f}" for gain in gains),
            ]


def memory(pair: Pair, ranks: int, mode: str) -> float:
    """GB of weights, gradients and optimizer states on a rank, the teacher's body (no cache) included."""
    cost = pair.cost(cached=False)
    student, teacher, trained = cost.student.parameters, cost.teacher.parameters, cost.adapter
    bytes_ = 2 * teacher + (16 * student if trained is None else 2 * student + 16 * trained)
    return bytes_ / (ranks if mode == "fsdp" else 1) / 1e9


def print_table(columns: list[str], lines: list[list[str]]) -> None:
    for line in (columns, ["---"] * len(columns), *lines):
        print("|", " | ".join(line), "|")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = (
        ("--tflops", 989.0, "of a GPU, in bfloat16"),
        ("--mfu", 0.4, "share of them that a step reaches"),
        ("--node", 8, "GPUs of a machine"),
        ("--inside", 360.0, "GB/s that a GPU sends within a machine"),
        ("--between", 40.0, "GB/s that it sends where there are several machines"),
        ("--latency", 20.0, "microseconds of a collective, for every doubling of the GPUs"),
    )
    for name, default, text in numbers:
        parser.add_argument(name, type=type(default), metavar="N", default=default, help=f"{text} [{default}]")
    machine = parser.parse_args()
    columns = ["teacher", "samples a step", "GPUs", "imbalance", "GB sent, ddp", "fsdp", "times one GPU, ddp", "fsdp"]
    for pair in PAIRS:
        print(f"### {pair.title}\n")
        print_table(columns, list(rows(pair, machine)))
        sizes = [f"{memory(pair, ranks, mode):.2f}" for mode, ranks in (("ddp", 8), ("fsdp", 8), ("fsdp", 64))]
        what = "GB a rank (weights, gradients, optimizer, teacher's body)"
        print_table([f"{what}: ddp", "fsdp, 8 GPUs", "fsdp, 64 GPUs"], [sizes])


if __name__ == "__main__":
    main()
