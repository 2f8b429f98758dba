"""Evaluation, against the papers' loop over transformers' `generate`: `python benchmarks/evaluation.py`.

Both take a model's folder and a file of rows to one score, with one seed: prompts cut to 256 tokens, temperature 1, no
6-gram twice, 256 new tokens, ROUGE-L with the stemmer. Ours is `abkd_fast.evaluate`. The papers answer batches of 16
prompts, left padded to 256 tokens, and then score one pair after the other with `rouge_score`.

--model and --data name a real model and its test set. Without them the model has random weights and GPT-2's shape, and
the rows are words that are tokens, with prompts as long as Dolly's; an end token is as likely as gives responses of
Dolly's mean length. Tables go to the terminal, JSON to --out.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import random
import statistics
import tempfile
import time

import torch
from rouge_score import rouge_scorer
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PreTrainedTokenizerFast

from abkd_fast.errors import ConfigError
from abkd_fast.evaluation import rouge
from abkd_fast.evaluation.evaluator import Evaluation
from abkd_fast.evaluation.test_sets import Protocol
from abkd_fast.generation.sampling import SamplingParams
from harness import Report, at_least, at_most, measure, spread
from sampling import RESPONSE_LENGTH, prompt_lengths

SEED = 10
PAPERS_BATCH, PAPERS_PROMPT, NGRAM = 16, 256, 6
PAIRS = 10_000  # what scoring is stated for
OURS, PUBLISHED = "abkd_fast.evaluate", f"generate, batch {PAPERS_BATCH}, padded to {PAPERS_PROMPT}, and rouge_score"
QUICK = {"rows": 20, "new_tokens": 8, "batch_size": 8, "width": 32, "layers": 2, "vocab": 1009}


def stand_in(folder: pathlib.Path, options: argparse.Namespace) -> tuple[str, str]:
    """Writes a model of random weights and rows for it; returns the paths of both."""
    config = GPT2Config(
        n_embd=options.width,
        n_layer=options.layers,
        n_head=max(1, options.width // 64),
        vocab_size=options.vocab,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        # One coordinate of the final states is a constant, and the end token's logit is that coordinate.
        norm, embedding = model.transformer.ln_f, model.transformer.wte.weight
        norm.weight[0], norm.bias[0] = 0, math.log(options.vocab / RESPONSE_LENGTH)
        embedding[0] = 0
        embedding[0, 0] = 1
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(options.vocab)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", unk_token="w0").save_pretrained(folder)
    generator = random.Random(0)

    def text(length: int) -> str:
        return " ".join(f"w{generator.randrange(1, options.vocab)}" for _ in range(length))

    rows = [
        {"prompt": text(length), "output": text(RESPONSE_LENGTH)} for length in prompt_lengths(options.rows, generator)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder), str(data)


class Benchmark:
    def __init__(self, options: argparse.Namespace, folder: pathlib.Path) -> None:
        """`folder`: a temporary one."""
        self.options, self.folder, self.device = options, folder, torch.device(options.device)
        self.report = Report(self.device, vars(options), judge=not options.quick)
        self.model, self.data = (options.model, options.data) if options.model else stand_in(folder, options)
        self.answers: dict[str, list[tuple[str, float]]] = {}  # text and ROUGE-L of each row's, by whose they are
        self.test = self.evaluation("unused").sets[0]

    def evaluation(self, name: str) -> Evaluation:
        """Into a folder of that name."""
        return Evaluation(
            self.model,
            {"rows": self.data},
            self.folder / name,
            [SEED],
            Protocol(
                sampling=SamplingParams(max_new_tokens=self.options.new_tokens, no_repeat_ngram_size=NGRAM),
                max_prompt_length=PAPERS_PROMPT,
            ),
            rows=self.options.rows,
            batch_size=self.options.batch_size,
            device=self.options.device,
        )

    def ours(self) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder) as out:
            evaluation = self.evaluation(out)
            evaluation.run()
            lines = pathlib.Path(out, f"{self.test.name}.seed{SEED}.jsonl").read_text().splitlines()
        answers = map(json.loads, lines)
        self.answers[OURS] = [(answer["response"], answer["rouge_l"]) for answer in answers]

    def published(self) -> None:
        torch.manual_seed(SEED)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype).to(self.device).eval()
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        texts = []
        for start in range(0, len(self.test.prompts), PAPERS_BATCH):
            batch = self.test.prompts[start : start + PAPERS_BATCH]
            ids = torch.tensor([[0] * (PAPERS_PROMPT - len(p)) + p for p in batch], device=self.device)
            mask = torch.tensor([[0] * (PAPERS_PROMPT - len(p)) + [1] * len(p) for p in batch], device=self.device)
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                no_repeat_ngram_size=NGRAM,
                max_new_tokens=self.options.new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )
            texts += tokenizer.batch_decode(out[:, PAPERS_PROMPT:], skip_special_tokens=True)
        responses = [text.strip() for text in texts]
        self.answers[PUBLISHED] = [*zip(responses, self.published_scores(responses), strict=True)]

    def published_scores(self, responses: list[str]) -> list[float]:
        scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
        return [
            100 * max(scorer.score(reference, response)["rougeL"].fmeasure for reference in references)
            for response, references in zip(responses, self.test.references, strict=True)
        ]

    def compare_time(self) -> None:
        candidates = {OURS: self.ours, PUBLISHED: self.published}
        rows = []
        for name, values in measure(candidates, self.options.repeats, warm=True).items():
            words = statistics.fmean(len(text.split()) for text, _ in self.answers[name])
            row = spread(name, values, seconds=statistics.median(values) / 1e3, words=words)
            row["ratio"] = row["ms"] / rows[0]["ms"] if rows else 1.0
            if rows:
                row["target"] = at_least(3)
            rows.append(row)
        columns = {
            "name": ("", ""),
            "seconds": ("s", ".2f"),
            "words": ("words a response", ".1f"),
            "ratio": ("time, x ours", ".2f"),
        }
        title = f"{len(self.test.prompts)} prompts, at most {self.options.new_tokens} new tokens, one seed"
        self.report.table("time", title, rows, columns)

    def compare_scores(self) -> None:
        """Both sides sample, so that they agree where their means differ by no more than chance would have it."""
        ours, theirs = ([score for _, score in self.answers[name]] for name in (OURS, PUBLISHED))
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        rows = []
        for name, scores in ((OURS, ours), (PUBLISHED, theirs), ("difference, prompt by prompt", differences)):
            error = statistics.stdev(scores) / math.sqrt(len(scores))
            rows.append({"name": name, "rouge_l": statistics.fmean(scores), "error": error})
        last = rows[-1]
        last["ratio"] = abs(last["rouge_l"]) / last["error"] if last["rouge_l"] else 0.0
        last["target"] = at_most(3)
        columns = {
            "name": ("", ""),
            "rouge_l": ("ROUGE-L", ".2f"),
            "error": ("standard error", ".2f"),
            "ratio": ("difference in standard errors", ".2f"),
        }
        self.report.table("scores", "whether the scores agree within sampling noise", rows, columns)

    def compare_scoring(self) -> None:
        """Of the same texts."""
        texts, scores = zip(*self.answers[PUBLISHED], strict=True)
        started = time.perf_counter()
        same = [rouge.rouge_l(text, outputs) for text, outputs in zip(texts, self.test.references, strict=True)]
        between = time.perf_counter()
        self.published_scores(texts)
        seconds = {"abkd_fast.evaluation.rouge": between - started, "rouge_score": time.perf_counter() - between}
        assert same == [*scores], "scores of the same texts differ"
        rows = [
            {
                "name": name,
                "seconds": value * PAIRS / len(texts),
                "ratio": value / seconds["abkd_fast.evaluation.rouge"],
            }
            for name, value in seconds.items()
        ]
        columns = {"name": ("", ""), "seconds": (f"s for {PAIRS} pairs", ".2f"), "ratio": ("time, x ours", ".2f")}
        self.report.table("scoring", f"scoring alone, from {len(texts)} pairs", rows, columns)

    def run(self) -> None:
        self.compare_time()
        self.compare_scores()
        self.compare_scoring()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = pathlib.Path(__file__).parent / "results" / "evaluation"
    parser.add_argument("--model", metavar="DIR", help="a real model, with its tokenizer (default: random weights)")
    parser.add_argument("--data", metavar="FILE", help="its test set, as for abkd_fast.evaluate")
    parser.add_argument("--rows", type=int, default=500, help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=64, help="of ours (default: %(default)s)")
    parser.add_argument("--width", type=int, default=768, help="of random weights (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="likewise (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=50257, help="likewise (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="timed rounds (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=pathlib.Path, default=results, help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    options = parser.parse_args()
    if bool(options.model) != bool(options.data):
        parser.error("--model and --data belong together")
    if options.rows < 2:
        parser.error("--rows: a standard error needs at least two")
    if options.quick:
        vars(options).update(QUICK)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        try:
            benchmark = Benchmark(options, pathlib.Path(folder))
            try:
                benchmark.run()
            finally:  # what was measured before a failure is kept
                benchmark.report.save(options.out / "evaluation.json")
        except ConfigError as error:
            raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
