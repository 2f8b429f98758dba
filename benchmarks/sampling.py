"""Generation, against transformers' `generate` as the papers run it: `python benchmarks/sampling.py`.

Random weights of GPT-2's shape, prompts as long as Dolly's, temperature 1. The papers generate in batches of 8, left
padded to 256 tokens; padded to the longest of each batch is measured, too. Two distributions of response lengths: all
get every new token ("full"), and geometric with the mean of Dolly's responses ("ending"), where end tokens are as many
as make one that likely. Tables go to the terminal, JSON to --out.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import random

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from abkd_fast.generation.sampling import SamplingParams, sample
from harness import Report, at_least, measure, spread

OURS = "sample"
# Of Dolly's training set in GPT-2's tokens: 21 quantiles of the prompts' lengths, and the responses' mean.
PROMPT_LENGTHS = (31, 36, 37, 38, 38, 39, 40, 41, 41, 42, 44, 45, 47, 50, 57, 68, 94, 139, 178, 212, 256)
RESPONSE_LENGTH = 74
PAPERS_BATCH, PAPERS_PROMPT = 8, 256
QUICK = {"prompts": 6, "new_tokens": 8, "batch_size": 4, "width": 32, "layers": 2, "vocab": 1009}


def prompt_lengths(count: int, generator: random.Random) -> list[int]:
    """In tokens, as Dolly's are distributed: between two quantiles each."""
    places = [generator.uniform(0, len(PROMPT_LENGTHS) - 1) for _ in range(count)]
    pairs = [*itertools.pairwise((*PROMPT_LENGTHS, PROMPT_LENGTHS[-1]))]
    return [round(low + (high - low) * (place % 1)) for place in places for low, high in [pairs[int(place)]]]


class Benchmark:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.report = Report(self.device, vars(options), judge=not options.quick)
        config = GPT2Config(
            n_embd=options.width,
            n_layer=options.layers,
            n_head=max(1, options.width // 64),
            vocab_size=options.vocab,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.model = AutoModelForCausalLM.from_config(config).to(self.device).eval()
        generator = random.Random(0)
        lengths = prompt_lengths(options.prompts, generator)
        self.prompts = [[generator.randrange(options.vocab) for _ in range(length)] for length in lengths]

    def ours(self, eos: tuple[int, ...]) -> list[int]:
        settings = SamplingParams(max_new_tokens=self.options.new_tokens, eos_token_ids=eos)
        seeds = list(range(len(self.prompts)))
        responses = sample(self.model, self.prompts, settings, seeds, self.options.batch_size)
        return [len(response) for response in responses]

    def published(self, padded: int | None, eos: tuple[int, ...]) -> list[int]:
        lengths = []
        for start in range(0, len(self.prompts), PAPERS_BATCH):
            batch = self.prompts[start : start + PAPERS_BATCH]
            width = max(padded or 0, *(len(prompt) for prompt in batch))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in batch], device=self.device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=self.device)
            kwargs = {"eos_token_id": list(eos)} if eos else {}
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=self.options.new_tokens,
                pad_token_id=self.options.vocab - 1,
                **kwargs,
            )[:, width:].tolist()
            ends = [[i for i, token in enumerate(row, 1) if token in eos] for row in out]
            lengths += [end[0] if end else len(row) for end, row in zip(ends, out, strict=True)]
        return lengths

    def compare(self, section: str, eos: tuple[int, ...]) -> None:
        runs = {
            OURS: lambda: self.ours(eos),
            f"generate, batch {PAPERS_BATCH}, padded to {PAPERS_PROMPT}": lambda: self.published(PAPERS_PROMPT, eos),
            f"generate, batch {PAPERS_BATCH}, padded to the longest": lambda: self.published(None, eos),
        }
        made = {name: [] for name in runs}
        candidates = {name: lambda name=name, run=run: made[name].append(sum(run())) for name, run in runs.items()}
        times = measure(candidates, self.options.repeats, warm=True)
        rows = []
        for name, values in times.items():
            tokens = sum(made[name]) / len(made[name])
            row = spread(name, values, tokens=tokens)
            row |= {"seconds": row["ms"] / 1e3, "ms_a_token": row["ms"] / tokens, "rate": 1e3 * tokens / row["ms"]}
            row["ratio"] = row["ms_a_token"] / rows[0]["ms_a_token"] if rows else 1.0
            if rows:
                row["target"] = at_least(3)
            rows.append(row)
        columns = {
            "name": ("", ""),
            "seconds": ("s", ".2f"),
            "tokens": ("new tokens", ".0f"),
            "rate": ("tokens/s", ".0f"),
            "ratio": ("time a token, x ours", ".2f"),
        }
        title = f"{section}: {len(self.prompts)} prompts, at most {self.options.new_tokens} new tokens"
        self.report.table(section, title, rows, columns)

    def run(self) -> None:
        sample(self.model, self.prompts[:2], SamplingParams(max_new_tokens=2), [0, 0])  # warm
        if "full" in self.options.only:
            self.compare("full", ())
        if "ending" in self.options.only:
            self.compare("ending", tuple(range(0, self.options.vocab - 1, RESPONSE_LENGTH)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = pathlib.Path(__file__).parent / "results" / "sampling"
    sections = ("full", "ending")
    parser.add_argument("--only", choices=sections, nargs="+", default=sections, help="default: both")
    parser.add_argument("--prompts", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=64, help="of ours (default: %(default)s)")
    parser.add_argument("--width", type=int, default=768, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--vocab", type=int, default=50257, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=1, help="timed rounds (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=pathlib.Path, default=results, help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    benchmark = Benchmark(options)
    try:
        benchmark.run()
    finally:  # what was measured before a failure is kept
        benchmark.report.save(options.out / "sampling.json")


if __name__ == "__main__":
    main()
