"""The cost of a sample, from shapes alone, and a prediction for GPUs: `python benchmarks/predict.py`.

Operations are those of abkd_fast/training/costs.py, for samples as long as Dolly's. Nothing is measured. On a GPU,
products take a stated share of its peak; logits in memory and AdamW take a stated share of its bandwidth.
"""

import argparse
import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

import harness
from abkd_fast.data.batches import balance_by_tokens, count_labels
from abkd_fast.losses import reference
from abkd_fast.losses.arguments import LossSpec, Rows
from abkd_fast.losses.divergences import BY_NAME
from abkd_fast.models.loading import meta_model
from abkd_fast.training.costs import PEAK_FLOPS, ModelCost, StepCost
from baseline import alpha_beta, cross_entropy
from harness import Report
from head import predict_heads
from model_recipes import BANDWIDTH, OPTIMIZER_BYTES, predict_recipes
from workload import LENGTH, SCALES, draw_samples

LOGITS_PASSES = 7  # ours: the student's written, read, overwritten, read twice; the teacher's written, read
KERNEL_BYTES = 12  # a logit: the kernel reads the student's and the teacher's in float32, and writes the gradient
BUCKET_BYTES = 25e6  # DistributedDataParallel's default: it sums so many at a time
BACKWARD_SHARE = 2 / 3  # of a student's forward and backward passes


class Pair:
    """A student and its teacher, what a sample costs with them, and what their recipe's step takes."""

    def __init__(self, *shapes: dict, times=1, adapter_rank=0, batch_size=32, max_tokens=8192) -> None:
        """`times`: how many times as long samples are. `adapter_rank`: of the q and v projections' adapters."""
        self.models = student, teacher = [ModelCost(meta_model(AutoConfig.for_model(**shape))) for shape in shapes]
        self.adapter = student.layers * 2 * adapter_rank * 2 * student.width or None
        self.batch_size, self.max_tokens = batch_size, max_tokens
        prompts, responses = draw_samples(64, 16, np.random.default_rng(0)) * times
        lengths, nothing = np.minimum(prompts + responses, LENGTH * times), np.zeros_like(prompts)
        padded, unpadded = make_samples(np.full_like(lengths, LENGTH * times), nothing), make_samples(lengths, nothing)
        self.samples = {"published": padded, "unpadded": unpadded, "ours": make_samples(lengths, prompts)}
        self.tokens, self.response_tokens = lengths.mean(), (lengths - prompts).mean()
        # Operations of a sample by part, and in all, for each way. An adapter's frozen weights have no gradient.
        self.ways, passes = {}, 2 if adapter_rank else 3
        for way, samples in self.samples.items():
            tokens = [len(sample["input_ids"]) for sample in samples]
            responses = sum(map(count_labels, samples)) / len(samples)
            self.ways[way] = {
                "student's layers": passes * student.body_flops(tokens) / len(samples),
                "student's output projection": passes * student.head_flops(responses),
                "teacher's layers": teacher.body_flops(tokens) / len(samples),
                "teacher's output projection": teacher.head_flops(responses),
            }
        self.ways["cached"] = self.ways["ours"] | {"teacher's layers": 0.0}
        self.ways["sft"] = self.ways["cached"] | {"teacher's output projection": 0.0}
        self.flops = {way: sum(parts.values()) for way, parts in self.ways.items()}


GPT2, XL = {"model_type": "gpt2"}, {"model_type": "gpt2"} | SCALES["paper"].teacher
QWEN_VOCAB = {"vocab_size": 151936}
LARGE = {"n_embd": 1280, "n_layer": 36, "n_head": 20}
LLAMA = {"model_type": "llama", "vocab_size": 32000, "num_attention_heads": 32}
LLAMA_3B = LLAMA | {"hidden_size": 3200, "intermediate_size": 8640, "num_hidden_layers": 26}
LLAMA_7B = LLAMA | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
RECIPES = ("GPT-2 XL to GPT-2", "OpenLLaMA 7B to 3B, LoRA")  # predicted for many GPUs


def make_pairs() -> dict[str, Pair]:
    return {
        RECIPES[0]: Pair(GPT2, XL),
        "its vocabulary as large as Qwen's": Pair(GPT2 | QWEN_VOCAB, XL | QWEN_VOCAB),
        "samples twice as long": Pair(GPT2, XL, times=2),
        "GPT-2 XL to GPT-2 medium": Pair(GPT2 | SCALES["small"].teacher, XL),
        "GPT-2 XL to GPT-2 large": Pair(GPT2 | LARGE, XL),
        RECIPES[1]: Pair(LLAMA_3B, LLAMA_7B, adapter_rank=16, batch_size=16, max_tokens=4096),
    }


def make_samples(lengths: np.ndarray, prompts: np.ndarray) -> list[dict]:
    pairs = zip(lengths.tolist(), prompts.tolist(), strict=True)
    return [{"input_ids": range(length), "spans": [prompt, length]} for length, prompt in pairs]


class Traffic(TorchDispatchMode):
    """Counts the bytes that eager operators read and write."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.bytes += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors)  # one repeated is read once
        return out


def published_traffic(tokens: int, vocab: int) -> int:
    """Bytes from a padded sample's logits, in bfloat16, to the gradient of its loss, on tensors without memory."""
    with torch.device("meta"):
        student = torch.empty(1, tokens, vocab, dtype=torch.bfloat16, requires_grad=True)
        teacher, labels = torch.empty_like(student, requires_grad=False), torch.empty(1, tokens, dtype=torch.int64)
    with Traffic() as traffic:
        (0.0 * cross_entropy(student, labels) + alpha_beta(student, teacher, labels)).backward()
    return traffic.bytes


def operations(pair: Pair, report: Report) -> None:
    """A table of operations by part. Each column adds one idea."""
    ways = {way: parts | {"all": pair.flops[way]} for way, parts in pair.ways.items()}
    rows = [{"name": name} | {way: parts[name] / 1e9 for way, parts in ways.items()} for name in ways["ours"]]
    columns = {"published": "padded, all logits|.1f", "unpadded": "no padding|.1f", "ours": "logits of responses|.1f"}
    columns |= {"cached": "teacher's states cached|.1f", "sft": "no teacher (SFT)|.1f"}
    title = f"GFLOP a sample of {pair.tokens:.0f} tokens, {pair.response_tokens:.0f} of the response"
    report.table("operations", title, rows, columns)


def scaling(pairs: dict[str, Pair], report: Report) -> None:
    rows = []
    for name, pair in pairs.items():
        flops, (student, teacher) = pair.flops, pair.models
        row = {"name": name, "student": student.parameters / 1e6, "teacher": teacher.parameters / 1e6}
        row |= {way: value / 1e9 for way, value in flops.items()}
        row |= {"saved": flops["published"] / flops["cached"], "over_sft": flops["cached"] / flops["sft"]}
        rows.append(row | {"cache": pair.response_tokens * teacher.width * 2 / 1e3})
    columns = {"student": "student, millions|.0f", "teacher": "teacher|.0f", "published": "published way|.0f"}
    columns |= {"ours": "ours|.0f", "cached": "cached|.0f", "sft": "SFT|.0f", "saved": "published / cached|.1f"}
    columns |= {"over_sft": "cached / SFT|.2f", "cache": "KB of cache|.0f"}
    report.table("scaling", "GFLOP a sample, and its states in the cache, in bfloat16", rows, columns)


def prediction(pair: Pair, options: argparse.Namespace, report: Report) -> dict[str, float]:
    """A table of a sample's time, the only result that is returned: seconds of each way."""
    peak, bandwidth = PEAK_FLOPS[options.gpu], BANDWIDTH[options.gpu] * 1e12 * options.bandwidth
    student, flops, rows = pair.models[0], pair.flops, []
    ours = LOGITS_PASSES * 4 * student.vocab * pair.response_tokens
    logits = {"published": published_traffic(LENGTH, student.vocab), "ours": ours, "cached": ours, "sft": ours * 5 / 7}
    titles = {"published": "published way", "ours": "ABKD", "cached": "ABKD, states cached", "sft": "SFT"}
    for way, size in logits.items():
        row = {"products": flops[way] / (peak * options.mfu), "logits": size / bandwidth}
        row["optimizer"] = OPTIMIZER_BYTES * student.parameters / options.batch_size / bandwidth
        row["seconds"] = seconds = sum(row.values())
        row |= {f"{key}_ms": 1e3 * value for key, value in row.items()}
        row |= {"name": titles[way], "gigabytes": size / 1e9, "rate": 1 / seconds, "mfu": flops[way] / seconds / peak}
        rows.append(row)
        row["fewer"] = rows[0]["seconds"] / seconds
    columns = {"products_ms": "products|.3f", "gigabytes": "GB of logits|.2f", "logits_ms": "their time|.3f"}
    columns |= {"optimizer_ms": "AdamW|.3f", "seconds_ms": "all|.3f", "rate": "samples a second|.0f"}
    columns |= {"mfu": "of the peak|.0%", "fewer": "times fewer|.1f"}
    title = f"milliseconds/sample that one {options.gpu} would take: products at {options.mfu:.0%} of"
    title += f" {peak / 1e12:.0f} TFLOP/s, the rest at {options.bandwidth:.0%} of {BANDWIDTH[options.gpu]:g} TB/s, "
    report.table("prediction", f"{title}{options.batch_size} samples a step", rows, columns)
    return {way: row["seconds"] for way, row in zip(logits, rows, strict=True)}


def without_kernels(pair: Pair, seconds: float, options: argparse.Namespace, report: Report) -> None:
    """A table of the losses in float64 and plain PyTorch, which a GPU computes if the package has no CUDA kernels.

    seconds: of a sample with cached states.
    """
    rows, (student, teacher) = [], torch.randn(2, 2, pair.models[0].vocab)
    logits = pair.response_tokens * pair.models[0].vocab
    for kind in (kind() for kind in BY_NAME.values()):
        with Traffic() as traffic:
            reference.row_losses(Rows(student, teacher, None, LossSpec(kind)), torch.empty_like(student))
        row = {"name": str(kind), "bytes": traffic.bytes / student.numel()}
        more = (row["bytes"] - KERNEL_BYTES) * logits / (BANDWIDTH[options.gpu] * 1e12 * options.bandwidth)
        rows.append(row | {"ratio": row["bytes"] / KERNEL_BYTES, "step": 1 + more / seconds})
    columns = {"bytes": "bytes a logit|.0f", "ratio": f"times the kernel's {KERNEL_BYTES}|.0f"}
    title = f"losses without CUDA kernels, on one {options.gpu}"
    report.table("reference", title, rows, columns | {"step": "time of a step with cached states, times|.1f"})


def step(pair: Pair, cached: bool, ranks: int, batch_size: int, machine: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step, and what a rank sends: `batch_size` samples and as many blocks of plain text, shared out.

    A backward pass hides traffic, but not that of the last bucket, or the first layer.
    """
    (student, teacher), trained = pair.models, pair.adapter or pair.models[0].parameters
    cost = StepCost(student, pair.adapter, teacher, cached)
    prompts, responses = draw_samples(1, batch_size, np.random.default_rng(0))
    samples = make_samples(np.minimum(prompts + responses, LENGTH), prompts)
    places = balance_by_tokens([len(sample["input_ids"]) for sample in samples], ranks)
    shares = [[samples[place] for place in each] for each in places]
    tokens = [sum(len(sample["input_ids"]) for sample in each) for each in shares]
    text = make_samples(*np.array([[LENGTH, 1]] * -(-batch_size // ranks)).T)
    flops = max(map(cost.flops, shares)) + cost.flops(text, taught=False)
    of_samples = -(-max(tokens) // pair.max_tokens)
    micro_batches = of_samples + -(-len(text) * LENGTH // pair.max_tokens)
    ring, read = (ranks - 1) / ranks, 0 if cached else of_samples  # micro-batches that the teacher reads
    gathers = 2 * (2 * student.parameters * micro_batches + teacher.parameters * read)  # bfloat16, twice
    # A sum in float32 goes round twice.
    ddp, fsdp = ring * 2 * 4 * trained, ring * (gathers + 4 * trained * micro_batches)
    compute = flops / (PEAK_FLOPS[machine.gpu] * machine.mfu)
    bandwidth = 1e9 * (machine.inside if ranks <= machine.node else machine.between)
    latency = 1e-6 * machine.latency * np.log2(ranks)
    sums = ddp / bandwidth + latency * max(1, ddp / 2 / BUCKET_BYTES)
    hidden, traffic = BACKWARD_SHARE * compute / micro_batches, fsdp / bandwidth  # only the last one's gradients travel
    row = {"samples": batch_size, "ranks": ranks, "imbalance": max(tokens) * ranks / sum(tokens) - 1}
    row["ddp"] = compute + max(sums - hidden, min(sums, BUCKET_BYTES / bandwidth + latency))
    row["fsdp"] = max(compute, traffic) + (1 - 0.9) * traffic / micro_batches + latency
    return row | {"ddp_gb": ddp / 1e9, "fsdp_gb": fsdp / 1e9}


def many_gpus(name: str, pair: Pair, machine: argparse.Namespace, report: Report) -> None:
    """Tables of a recipe's step on many GPUs, and of the weights, gradients and optimizer states that a rank holds."""
    rows = []
    for cached, fixed, ranks in itertools.product((True, False), (True, False), (8, 64, 512)):
        batch_size = pair.batch_size if fixed else pair.batch_size * ranks
        if batch_size < ranks:
            continue  # refused: a rank without a sample
        row, alone = (step(pair, cached, count, batch_size, machine) for count in (ranks, 1))
        row |= {mode: alone["ddp"] / row[mode] for mode in ("ddp", "fsdp")}
        rows.append(row | {"name": "cached" if cached else "in every step"})
    columns = {"name": "teacher", "samples": "samples a step|,", "ranks": "GPUs|d", "imbalance": "imbalance|.1%"}
    columns |= {"ddp_gb": "GB sent, ddp|.3g", "fsdp_gb": "fsdp|.3g"}
    columns |= {"ddp": "times one GPU, ddp|.1f", "fsdp": "fsdp|.1f"}
    report.table("gpus", name, rows, columns)
    student, teacher = (model.parameters for model in pair.models)
    trained = 2 * student + 16 * pair.adapter if pair.adapter else 16 * student
    size = (2 * teacher + trained) / 1e9  # with the teacher's body: no cache
    columns = {"ddp": "GB a rank (weights, gradients, optimizer, teacher's body): ddp|.2f"}
    columns |= {"fsdp_8": "fsdp, 8 GPUs|.2f", "fsdp_64": "fsdp, 64 GPUs|.2f"}
    report.table("memory", name, [{"ddp": size, "fsdp_8": size / 8, "fsdp_64": size / 64}], columns)


def main(arguments: list[str] | None = None) -> None:
    parser, add = harness.parser(__doc__, "predict", repeats=0)
    add("--gpu", choices=BANDWIDTH, default="H100", help="default: %(default)s")
    numbers = {
        "--mfu": (0.4, "share of its peak that products reach"),
        "--bandwidth": (0.8, "share of its memory's bandwidth that the rest reaches"),
        "--batch-size": (32, "samples of one GPU's step"),
        "--node": (8, "GPUs of a machine"),
        "--inside": (360.0, "GB/s that a GPU sends within a machine"),
        "--between": (40.0, "GB/s that it sends between machines"),
        "--latency": (20.0, "microseconds of a collective, for every doubling of the GPUs"),
    }
    for name, (default, text) in numbers.items():
        add(name, type=type(default), metavar="N", default=default, help=f"{text} (default: %(default)s)")
    add("--recipes", action="store_true", help="only the packaged recipes for today's models")
    options = parser.parse_args(arguments)
    report = Report(torch.device("cpu"), vars(options), judge=False)
    if options.recipes:
        with report.kept("recipes"):
            predict_recipes(options, report)
        return
    pairs = make_pairs()
    with report.kept("predict"):
        operations(pairs[RECIPES[0]], report)
        scaling(pairs, report)
        seconds = prediction(pairs[RECIPES[0]], options, report)
        without_kernels(pairs[RECIPES[0]], seconds["cached"], options, report)
        predict_heads(report)
        for name in RECIPES:
            many_gpus(name, pairs[name], options, report)


if __name__ == "__main__":
    main()
