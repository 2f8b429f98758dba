"""Generation and evaluation, against the papers' use of transformers' `generate`: `python benchmarks/generation.py`.

full    `sample`, every response as long as allowed. The papers generate in batches of 8, padded to 256 tokens
ending  the same with responses of geometric length and Dolly's mean: as many end tokens as make one that likely
scores  `abkd_fast.evaluate` with one seed. The papers answer batches of 16, then score each pair with `rouge_score`

The model is GPT-2 with random weights, unless --model and --data name a real one and its test set, for scores alone.
"""

import argparse
import functools
import json
import math
import pathlib
import statistics
import tempfile
from collections.abc import Callable

import numpy as np
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, AutoTokenizer

import harness
from abkd_fast.device import choose_dtype
from abkd_fast.errors import ConfigError
from abkd_fast.evaluation import rouge
from abkd_fast.evaluation.evaluator import Evaluation
from abkd_fast.evaluation.test_sets import Protocol
from abkd_fast.generation.sampling import SamplingParams, sample
from baseline import PROMPT_LENGTH, generate
from harness import Report, compare
from workload import MEAN_RESPONSE, PROMPTS, draw_lengths, random_gpt2, random_text, write_rows, write_tokenizer

SECTIONS = ("full", "ending", "scores")
SEED, NGRAM = 10, 6
PAIRS = 10_000  # scoring is stated for so many
OURS, PUBLISHED = "abkd_fast.evaluate", f"generate, batch 16, padded to {PROMPT_LENGTH}, and rouge_score"
SIZES = ("prompts", "rows", "sampled_tokens", "evaluated_tokens", "batch_size", "width", "layers", "vocab")
FULL, QUICK = (64, 500, 128, 256, 64, 768, 12, 50257), (6, 20, 8, 8, 4, 32, 2, 1009)


def compare_sampling(options: argparse.Namespace, sections: dict[str, tuple[int, ...]], report: Report) -> None:
    """`sample` against `generate`, by one model; a section has its end tokens."""
    device = torch.device(options.device)
    model = random_gpt2(options, end=None).to(device, choose_dtype("auto", device)).eval()
    generator, new_tokens = np.random.default_rng(0), options.sampled_tokens
    lengths = draw_lengths(PROMPTS, 1, options.prompts, generator)[0]
    prompts = [generator.integers(options.vocab, size=length).tolist() for length in lengths]

    def ours(ends: tuple[int, ...]) -> int:
        """Samples all responses; returns their tokens in all."""
        settings = SamplingParams(max_new_tokens=new_tokens, eos_token_ids=ends)
        return sum(map(len, sample(model, prompts, settings, list(range(len(prompts))), options.batch_size)))

    def published(ends: tuple[int, ...], length: int | None) -> int:
        tokens, rules = 0, {"pad_token_id": options.vocab - 1} | ({"eos_token_id": list(ends)} if ends else {})
        for start in range(0, len(prompts), 8):
            for row in generate(model, prompts[start : start + 8], length, new_tokens, **rules).tolist():
                tokens += next((place for place, token in enumerate(row, 1) if token in ends), len(row))
        return tokens

    sample(model, prompts[:2], SamplingParams(max_new_tokens=2), [0, 0])  # warms up
    for section, ends in sections.items():
        runs = {
            "sample": functools.partial(ours, ends),
            f"generate, batch 8, padded to {PROMPT_LENGTH}": functools.partial(published, ends, PROMPT_LENGTH),
            "generate, batch 8, padded to the longest": functools.partial(published, ends, None),
        }
        rows, made = compare_results(runs, options.repeats)
        for row in rows:
            row["tokens"] = statistics.fmean(made[row["name"]])
            row |= {"ms_a_token": row["ms"] / row["tokens"], "rate": 1e3 * row["tokens"] / row["ms"]}
            row["ratio"] = row["ms_a_token"] / rows[0]["ms_a_token"]
        title = f"{section}: {len(prompts)} prompts, at most {new_tokens} new tokens"
        columns = {"seconds": "s|.2f", "tokens": "new tokens|.0f", "rate": "tokens/s|.0f"}
        report.table(section, title, rows, columns | {"ratio": "time a token, x ours|.2f"})


def compare_results(runs: dict[str, Callable], repeats: int) -> tuple[list[dict], dict[str, list]]:
    """Rows with seconds, and what each run returned."""
    results = {name: [] for name in runs}
    rows = compare({name: lambda name=name: results[name].append(runs[name]()) for name in runs}, repeats, warm=True)
    for row in rows:
        row["seconds"] = row["ms"] / 1e3
    return rows, results


def write_stand_in(folder: pathlib.Path, options: argparse.Namespace) -> tuple[str, str]:
    """Writes a model of random weights and rows for it; returns the paths of both.

    The end token is as likely as gives responses of Dolly's mean length.
    """
    model = random_gpt2(options, end=0)
    with torch.no_grad():
        # One coordinate of the final states is a constant, and the end token's logit is that coordinate.
        norm, embedding = model.transformer.ln_f, model.transformer.wte.weight
        norm.weight[0], norm.bias[0] = 0, math.log(options.vocab / round(MEAN_RESPONSE))
        embedding[0] = 0
        embedding[0, 0] = 1
    model.save_pretrained(folder)
    write_tokenizer(folder, options.vocab, before="w", end="w0")
    generator, data = np.random.default_rng(0), folder / "rows.jsonl"
    text = functools.partial(random_text, generator, options.vocab, before=" w")
    lengths = draw_lengths(PROMPTS, 1, options.rows, generator)[0]
    write_rows(data, [{"prompt": text(length), "output": text(round(MEAN_RESPONSE))} for length in lengths])
    return str(folder), str(data)


class Scores:
    """`abkd_fast.evaluate` against the papers' loop, from a model's folder to a score."""

    def __init__(self, options: argparse.Namespace, report: Report, folder: pathlib.Path) -> None:
        self.options, self.report, self.folder, self.new_tokens = options, report, folder, options.evaluated_tokens
        self.model, self.data = (options.model, options.data) if options.model else write_stand_in(folder, options)
        self.test = self.evaluation("unused").sets[0]

    def evaluation(self, out: str) -> Evaluation:
        sampling = SamplingParams(max_new_tokens=self.new_tokens, no_repeat_ngram_size=NGRAM)
        protocol = Protocol(sampling=sampling, max_prompt_length=PROMPT_LENGTH)
        limits = {"rows": self.options.rows, "batch_size": self.options.batch_size, "device": self.options.device}
        return Evaluation(self.model, {"rows": self.data}, self.folder / out, [SEED], protocol, **limits)

    def ours(self) -> list[tuple[str, float]]:
        """Text and ROUGE-L of every response."""
        with tempfile.TemporaryDirectory(dir=self.folder) as out:
            self.evaluation(out).run()
            lines = pathlib.Path(out, f"{self.test.name}.seed{SEED}.jsonl").read_text().splitlines()
        return [(answer["response"], answer["rouge_l"]) for answer in map(json.loads, lines)]

    def published(self) -> list[tuple[str, float]]:
        torch.manual_seed(SEED)
        dtype = choose_dtype("auto", torch.device(self.options.device))
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype).to(self.options.device).eval()
        tokenizer, texts = AutoTokenizer.from_pretrained(self.model), []
        end = tokenizer.eos_token_id
        rules = {"no_repeat_ngram_size": NGRAM, "eos_token_id": end, "pad_token_id": end}
        for start in range(0, len(self.test.prompts), 16):
            batch = self.test.prompts[start : start + 16]
            tokens = generate(model, batch, PROMPT_LENGTH, self.new_tokens, **rules)
            texts += [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        return [*zip(texts, self.published_scores(texts), strict=True)]

    def published_scores(self, responses: list[str]) -> list[float]:
        scorer, pairs = RougeScorer(["rougeL"], use_stemmer=True), zip(responses, self.test.references, strict=True)
        best = [max(scorer.score(output, text)["rougeL"].fmeasure for output in outputs) for text, outputs in pairs]
        return [100 * score for score in best]

    def run(self) -> None:
        rows, results = compare_results({OURS: self.ours, PUBLISHED: self.published}, self.options.repeats)
        answers = {name: values[-1] for name, values in results.items()}
        for row in rows:
            row["words"] = statistics.fmean(len(text.split()) for text, _ in answers[row["name"]])
        title = f"{len(self.test.prompts)} prompts, at most {self.new_tokens} new tokens, one seed"
        columns = {"seconds": "s|.2f", "words": "words a response|.1f", "ratio": "time, x ours|.2f"}
        self.report.table("time", title, rows, columns)
        (_, ours), (texts, theirs) = (zip(*answers[name], strict=True) for name in (OURS, PUBLISHED))
        self.compare_scores(ours, theirs)
        self.compare_scoring(texts, theirs)

    def compare_scores(self, ours: tuple[float, ...], theirs: tuple[float, ...]) -> None:
        """Both sides sample. They agree if their means differ by no more than chance explains."""
        rows, differences = [], [a - b for a, b in zip(ours, theirs, strict=True)]
        for name, values in ((OURS, ours), (PUBLISHED, theirs), ("difference, prompt by prompt", differences)):
            mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
            rows.append({"name": name, "rouge_l": mean, "error": error})
        rows[-1] |= {"ratio": abs(mean) / error if mean else 0.0, "target": {"at_most": 3}}
        columns = {"rouge_l": "ROUGE-L|.2f", "error": "standard error|.2f"}
        columns["ratio"] = "difference in standard errors|.2f"
        self.report.table("scores", "whether the scores agree within sampling noise", rows, columns)

    def compare_scoring(self, texts: tuple[str, ...], scores: tuple[float, ...]) -> None:
        """Scores the same texts both ways."""
        ours, theirs = "abkd_fast.evaluation.rouge", "rouge_score"
        score = functools.partial(map, rouge.rouge_l, texts, self.test.references)
        runs = {ours: lambda: [*score()], theirs: lambda: self.published_scores(texts)}
        rows, results = compare_results(runs, 1)
        assert results[ours] == results[theirs] == [[*scores]], "scores of the same texts differ"
        for row in rows:
            row["seconds"] *= PAIRS / len(texts)
        columns = {"seconds": f"s for {PAIRS} pairs|.2f", "ratio": "time, x ours|.2f"}
        self.report.table("scoring", f"scoring alone, from {len(texts)} pairs", rows, columns)


def main() -> None:
    parser, add = harness.parser(__doc__, "generation", repeats=1, quick=True)
    add("--only", choices=SECTIONS, nargs="+", default=SECTIONS, help="default: all")
    add("--model", metavar="DIR", help="a real model, with its tokenizer (default: random weights)")
    add("--data", metavar="FILE", help="its test set, as for abkd_fast.evaluate")
    options = parser.parse_args()
    if bool(options.model) != bool(options.data):
        parser.error("--model and --data belong together")
    vars(options).update(zip(SIZES, QUICK if options.quick else FULL, strict=True))
    sections = ["scores"] if options.model else options.only
    torch.manual_seed(0)
    report = Report(torch.device(options.device), vars(options), judge=not options.quick)
    try:
        with report.kept("generation"), tempfile.TemporaryDirectory() as folder:
            ends = {"full": (), "ending": tuple(range(0, options.vocab - 1, round(MEAN_RESPONSE)))}
            if sampled := {section: ends[section] for section in ends if section in sections}:
                compare_sampling(options, sampled, report)
            if "scores" in sections:
                Scores(options, report, pathlib.Path(folder)).run()
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
