"""What a sample costs, from shapes alone, and what that predicts for a GPU: `python benchmarks/predict.py`.

Operations are those of abkd_fast/costs.py, for samples as long as Dolly's (workload.py). The published way pads them to
512 tokens and makes logits at all of these. Nothing is measured here; timing.py measures. The model of a GPU is simple:
operations at a stated share of its peak, then, at a stated share of its bandwidth, what isn't a product: the logits'
way through memory, and AdamW. Tables go to the terminal, and as JSON and Markdown to --out.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from abkd_fast.training.costs import PEAK_FLOPS, ModelCost
from harness import Report
from published import alpha_beta, cross_entropy
from workload import LENGTH, PROMPTS, RESPONSES, SCALES, draw_lengths

XL = SCALES["paper"].teacher
LLAMA_3B = {"hidden_size": 3200, "intermediate_size": 8640, "num_hidden_layers": 26, "num_attention_heads": 32}
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
GPT2, LLAMA = {"model_type": "gpt2"}, {"model_type": "llama", "vocab_size": 32000}
PAIRS = {  # student, teacher, and how many times as long samples are
    "GPT-2 XL to GPT-2": (GPT2, GPT2 | XL, 1),
    "its vocabulary as large as Qwen's": (GPT2 | {"vocab_size": 151936}, GPT2 | XL | {"vocab_size": 151936}, 1),
    "samples twice as long": (GPT2, GPT2 | XL, 2),
    "GPT-2 XL to GPT-2 medium": (GPT2 | SCALES["small"].teacher, GPT2 | XL, 1),
    "GPT-2 XL to GPT-2 large": (GPT2 | {"n_embd": 1280, "n_layer": 36, "n_head": 20}, GPT2 | XL, 1),
    "OpenLLaMA 7B to 3B, LoRA": (LLAMA | LLAMA_3B, LLAMA | LLAMA_7B, 1),
}
BANDWIDTH = {"B200": 8.0, "H200": 4.8, "H100": 3.35, "A100": 2.04}  # terabytes a second, as the maker states them
LOGITS_PASSES = 7  # ours: the student's written, read, overwritten, read twice; the teacher's written, read
OPTIMIZER_BYTES = 40  # a weight: clipping reads twice and writes the gradient; AdamW reads 4 numbers and writes 3


class Samples:
    """The mean of many, as long as Dolly's or so many times as long; padded or not."""

    def __init__(self, times: int) -> None:
        generator = np.random.default_rng(0)
        prompts, responses = (draw_lengths(of, 64, 16, generator).ravel() * times for of in (PROMPTS, RESPONSES))
        self.padded_length = LENGTH * times
        lengths = np.minimum(prompts + responses, self.padded_length)
        self.padded = self._of(np.full_like(lengths, self.padded_length), np.zeros_like(prompts))
        self.all_logits = self._of(lengths, np.zeros_like(prompts))
        self.real = self._of(lengths, prompts)
        self.tokens, self.responses = lengths.mean(), (lengths - prompts).mean()

    @staticmethod
    def _of(lengths: np.ndarray, prompts: np.ndarray) -> list[dict]:
        pairs = zip(lengths.tolist(), prompts.tolist(), strict=True)
        return [{"input_ids": range(length), "prompt_length": prompt} for length, prompt in pairs]


class Pair:
    """A student and its teacher, and what a sample costs with them."""

    def __init__(self, student: dict, teacher: dict, times: int) -> None:
        self.student, self.teacher = (ModelCost(AutoConfig.for_model(**shape)) for shape in (student, teacher))
        self.passes = 2 if student["model_type"] == "llama" else 3  # an adapter's frozen weights have no gradient
        self.samples = samples = Samples(times)
        self.ways = {
            "published": self.parts(samples.padded),
            "unpadded": self.parts(samples.all_logits),
            "ours": self.parts(samples.real),
            "cached": self.parts(samples.real, cached=True),
            "sft": self.parts(samples.real, taught=False),
        }
        self.flops = {way: sum(parts.values()) for way, parts in self.ways.items()}

    def parts(self, samples: list[dict], taught: bool = True, cached: bool = False) -> dict[str, float]:
        """Operations of a sample."""
        lengths = np.array([len(sample["input_ids"]) for sample in samples])
        tokens, squares = lengths.sum(), (lengths**2).sum()
        responses = tokens - sum(sample["prompt_length"] for sample in samples)
        parts = {
            "student's layers": self.passes * self.student.body_flops(tokens, squares),
            "student's output projection": self.passes * self.student.head_flops(responses),
            "teacher's layers": self.teacher.body_flops(tokens, squares) * (taught and not cached),
            "teacher's output projection": self.teacher.head_flops(responses) * taught,
        }
        return {name: flops / len(samples) for name, flops in parts.items()}


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
    """By part, one idea after the other."""
    columns = {
        "published": "padded,\nall logits",
        "unpadded": "no\npadding",
        "ours": "logits of\nresponses",
        "cached": "teacher's\nstates cached",
        "sft": "no teacher\n(SFT)",
    }
    names = pair.ways["ours"]
    rows = [{"name": name} | {way: parts[name] / 1e9 for way, parts in pair.ways.items()} for name in names]
    rows.append({"name": "all"} | {way: flops / 1e9 for way, flops in pair.flops.items()})
    title = f"GFLOP a sample of {pair.samples.tokens:.0f} tokens, {pair.samples.responses:.0f} of the response"
    headings = {way: (heading, ".1f") for way, heading in columns.items()}
    report.table("operations", title, rows, {"name": ("", ""), **headings})


def scaling(report: Report) -> None:
    rows = []
    for name, shapes in PAIRS.items():
        pair = Pair(*shapes)
        flops = pair.flops
        row = {"name": name} | {way: value / 1e9 for way, value in flops.items()}
        row |= {"student": pair.student.parameters / 1e6, "teacher": pair.teacher.parameters / 1e6}
        row |= {"saved": flops["published"] / flops["cached"], "over_sft": flops["cached"] / flops["sft"]}
        rows.append(row | {"cache": pair.samples.responses * pair.teacher.width * 2 / 1e3})
    columns = {
        "name": ("", ""),
        "student": ("student,\nmillions", ".0f"),
        "teacher": ("teacher", ".0f"),
        "published": ("published\nway", ".0f"),
        "ours": ("ours", ".0f"),
        "cached": ("cached", ".0f"),
        "sft": ("SFT", ".0f"),
        "saved": ("published\n/ cached", ".1f"),
        "over_sft": ("cached\n/ SFT", ".2f"),
        "cache": ("KB of\ncache", ".0f"),
    }
    report.table("scaling", "GFLOP a sample, and its states in the cache, in bfloat16", rows, columns)


def prediction(pair: Pair, options: argparse.Namespace, report: Report) -> None:
    peak, bandwidth = PEAK_FLOPS[options.gpu], BANDWIDTH[options.gpu] * 1e12 * options.bandwidth
    weights, vocab, samples = pair.student.parameters, pair.student.vocab, pair.samples
    ours = LOGITS_PASSES * 4 * vocab * samples.responses
    logits = {"published": published_traffic(LENGTH, vocab), "ours": ours, "cached": ours, "sft": ours * 5 / 7}
    titles = {"published": "published way", "ours": "ABKD", "cached": "ABKD, states cached", "sft": "SFT"}
    rows = []
    for way, title in titles.items():
        flops, optimizer = pair.flops[way], OPTIMIZER_BYTES * weights / options.batch_size
        row = {"name": title, "gigabytes": logits[way] / 1e9, "products": flops / (peak * options.mfu)}
        row |= {"logits": logits[way] / bandwidth, "optimizer": optimizer / bandwidth}
        seconds = row["products"] + row["logits"] + row["optimizer"]
        rows.append(row | {"seconds": seconds, "rate": 1 / seconds, "mfu": flops / seconds / peak})
    for row in rows:
        row["fewer"] = rows[0]["seconds"] / row["seconds"]
        row |= {f"{key}_ms": 1e3 * row[key] for key in ("products", "logits", "optimizer", "seconds")}
    columns = {
        "name": ("", ""),
        "products_ms": ("products", ".3f"),
        "gigabytes": ("GB of\nlogits", ".2f"),
        "logits_ms": ("their\ntime", ".3f"),
        "optimizer_ms": ("AdamW", ".3f"),
        "seconds_ms": ("all", ".3f"),
        "rate": ("samples\na second", ".0f"),
        "mfu": ("of the\npeak", ".0%"),
        "fewer": ("times\nfewer", ".1f"),
    }
    title = (
        f"milliseconds/sample that one {options.gpu} would take: products at {options.mfu:.0%} of "
        f"{peak / 1e12:.0f} TFLOP/s, the rest at {options.bandwidth:.0%} of {BANDWIDTH[options.gpu]:g} TB/s, "
        f"{options.batch_size} samples a step"
    )
    report.table("prediction", title, rows, columns)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = pathlib.Path(__file__).parent / "results" / "predict"
    parser.add_argument("--gpu", choices=BANDWIDTH, default="H100", help="default: %(default)s")
    parser.add_argument("--mfu", type=float, default=0.4, help="of the peak, in products (default: %(default)s)")
    parser.add_argument("--bandwidth", type=float, default=0.8, help="of the memory's (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="samples of a step (default: %(default)s)")
    parser.add_argument("--out", type=pathlib.Path, default=results, help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(torch.device("cpu"), vars(options), judge=False)
    pair = Pair(*PAIRS["GPT-2 XL to GPT-2"])
    operations(pair, report)
    scaling(report)
    prediction(pair, options, report)
    report.save(options.out / "predict.json")


if __name__ == "__main__":
    main()
