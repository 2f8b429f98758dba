"""Seconds a sample of every method, against the published way and against fine-tuning: `python benchmarks/timing.py`.

Our steps are the trainer's own, without and with the teacher's cache; the published way is published.py. Both have the
same models (of random weights) and the same batches, as long as Dolly's samples are. All take turns, so that a drift of
the machine touches them alike. A step is timed from its batch, packed or padded, to the changed weights. Before that,
both sides have to agree on loss and gradient norm, dropout off: a method whose sides don't is marked as failed, gets no
ratios, and makes the exit status 1. Tables go to the terminal, and as JSON and Markdown to --out.

--overhead measures, in the trainer's whole loop, what is neither model nor loss.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import dataclasses
import functools
import inspect
import json
import pathlib
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
from harness import Report, at_least, at_most, measure, peak_memory, spread
from published import Loss, PublishedTrainer, alpha_beta, alphanet, forward_kl, pad
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from abkd_fast import methods
from abkd_fast.config import Config
from abkd_fast.data import pack, read_rows, tokenise
from abkd_fast.logs import RunLog
from abkd_fast.models import PackedCausalLM, read_tokenizer
from abkd_fast.progress import Window
from abkd_fast.recipe import load
from abkd_fast.teacher import CachedTeacher, Teacher, TeacherCache
from abkd_fast.trainer import Trainer

LENGTH = 512  # tokens that a sample has at most, and that the published way pads it to
# Tokens of prompt and response of Dolly's training rows: the quantiles 0, 1/32, … 1, as --measure-lengths prints them.
PROMPTS = (
    *(31, 35, 36, 36, 37, 38, 38, 39, 39, 39, 40, 40, 41, 41, 42, 43, 44),
    *(44, 45, 46, 48, 51, 55, 61, 68, 81, 105, 134, 160, 182, 203, 226, 256),
)
RESPONSES = (
    *(2, 4, 6, 9, 11, 13, 15, 17, 19, 22, 25, 27, 30, 33, 37, 41, 45),
    *(49, 54, 59, 65, 71, 78, 86, 95, 104, 116, 132, 151, 179, 224, 331, 512),
)


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table."""

    method: str  # as in a configuration; so is the loss
    loss: str | None = None  # None without a teacher
    published: Loss | None = None
    has_entropy: bool = False  # the published value has the teacher's besides the divergence
    paper: float | None = None  # seconds/sample


METHODS = {
    "SFT": Method("sft"),
    "KD": Method("kd", "fkl", forward_kl, has_entropy=True),
    "AlphaNet": Method("kd", "alphanet:0.2,0.8", alphanet),
    "ABKD": Method("ab", "ab:0.2,0.7", alpha_beta),
}
WAYS = {"published": "published way", "ours": "ours", "cached": "ours, teacher's states cached"}


@dataclasses.dataclass(frozen=True)
class Scale:
    """Models (what their shapes leave out is that of GPT-2, 124M) and samples of a step."""

    title: str
    student: dict
    teacher: dict
    batch_size: int
    vocab: int = 50257


TINY = {"n_layer": 2, "n_head": 2, "initializer_range": 0.2}
SCALES = {
    "paper": Scale("GPT-2 XL to GPT-2", {}, {"n_embd": 1600, "n_layer": 48, "n_head": 25}, 8),
    "small": Scale("GPT-2 medium to GPT-2", {}, {"n_embd": 1024, "n_layer": 24, "n_head": 16}, 4),
    "tiny": Scale("tiny models", {**TINY, "n_embd": 32}, {**TINY, "n_embd": 64}, 4, vocab=1009),
}
TARGETS = {  # of ABKD at the paper's scale: a ratio of the table, and its bound
    "published / ours": ("published_over_ours", at_least(4)),
    "published / cached": ("published_over_cached", at_least(12)),
    "cached / SFT": ("cached_over_sft", at_most(1.25)),
}
EPOCHS = (10, 20)  # of the papers: what building the cache is shared between
OVERHEAD_STEPS = 10


def length_quantiles(data: str, tokenizer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """PROMPTS and RESPONSES of a data set; they are cut at LENGTH."""
    rows = tokenise(read_rows(data), read_tokenizer(tokenizer, "tokenizer"), max_length=1 << 20)
    prompts = np.array(rows["prompt_length"])
    responses = np.array([len(ids) for ids in rows["input_ids"]]) - prompts
    at = np.linspace(0, 1, len(PROMPTS))
    of_each = (np.quantile(lengths.clip(max=LENGTH), at).round().astype(int) for lengths in (prompts, responses))
    return tuple(tuple(lengths.tolist()) for lengths in of_each)


def draw_lengths(
    quantiles: tuple[int, ...], batches: int, batch_size: int, generator: np.random.Generator
) -> np.ndarray:
    """Lengths [batches, batch_size], one from each of so many equal parts of the distribution.

    All together are like the whole, and so is every batch, as far as its few samples can be.
    """
    count = batches * batch_size
    at = ((np.arange(count) + generator.random(count)) / count).reshape(batch_size, batches)
    at = generator.permuted(generator.permuted(at, axis=1), axis=0)
    return np.interp(at, np.linspace(0, 1, len(quantiles)), quantiles).round().astype(int).T


def write_rows(path: pathlib.Path, batches: int, batch_size: int, vocab: int) -> None:
    """Rows of random tokens, batch after batch, for the tokenizer below.

    Prompt and response lengths are independent: in Dolly their correlation is -0.06.
    """
    generator = np.random.default_rng(0)

    def text(tokens: int) -> str:
        return "".join(f" {token}" for token in generator.integers(1, vocab, size=tokens))

    prompts, responses = (draw_lengths(lengths, batches, batch_size, generator) for lengths in (PROMPTS, RESPONSES))
    with path.open("w") as file:
        for prompt, response in zip(prompts.flat, responses.flat, strict=True):
            file.write(json.dumps({"prompt": text(prompt), "output": text(response - 1)}) + "\n")


def write_tokenizer(folder: pathlib.Path, vocab: int) -> None:
    """Its words are the numbers of its tokens, but for the end token, 0."""
    words = Tokenizer(WordLevel({"<end>": 0} | {str(token): token for token in range(1, vocab)}))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s"


class Benchmark:
    def __init__(self, options: argparse.Namespace, folder: pathlib.Path) -> None:
        """`folder`: for what a run needs on disk."""
        self.options, self.folder, self.scale = options, folder, SCALES[options.scale]
        self.batch_size = options.batch_size or self.scale.batch_size
        self.methods = {name: METHODS[name] for name in METHODS if name in ("SFT", *options.methods)}
        write_tokenizer(folder / "tokenizer", self.scale.vocab)
        write_rows(folder / "rows.jsonl", options.repeats + 1, self.batch_size, self.scale.vocab)
        judge = options.scale == "paper" or (options.overhead and options.scale == "small")
        self.report = Report(torch.device(options.device), vars(options), judge)

    def config(self, name: str, cache: str = "off") -> Config:
        method, vocab = METHODS[name], self.scale.vocab
        models = [
            {"config": {"model_type": "gpt2", "vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 0, **shape}}
            for shape in (self.scale.student, self.scale.teacher)
        ]
        values = {
            "method": method.method,
            "loss": method.loss or Config.loss,
            "tokenizer": str(self.folder / "tokenizer"),
            "run": {"name": name, "dir": str(self.folder / "runs")},
            "student": models[0],
            "teacher": models[1] if method.loss else None,
            "data": {"train": str(self.folder / "rows.jsonl"), "max_length": LENGTH, "max_prompt_length": None},
            "cache": {"mode": cache, "dir": str(self.folder / "cache")},
            # Steps that change no weight: all methods and ways have the same ones all the time.
            "optim": {"lr": 1e-30, "min_lr": 0, "schedule": "constant"},
            "train": {
                "steps": OVERHEAD_STEPS,
                "batch_size": self.batch_size,
                "max_tokens": self.batch_size * LENGTH,  # one micro-batch, as in the published way
                "device": self.options.device,
            },
            "checkpoint": {"every_steps": OVERHEAD_STEPS},  # that is, none
        }
        path = self.folder / "config.json"
        path.write_text(json.dumps(values))
        return load(str(path))[0]

    def build(self) -> None:
        """A trainer and a published one, on the same weights: all that a method is to them is a loss and a teacher."""
        name = next((name for name, method in self.methods.items() if method.loss), "ABKD")
        self.trainer = trainer = Trainer(self.config(name))
        trainer._load()
        live, samples = trainer.teacher, 2 * len(trainer.train_set)  # seen twice: so worth a cache
        cache = self.config(name, "auto"), trainer.teacher_config, trainer.train_set, samples
        cached = TeacherCache(*cache, trainer.device, trainer.dtype).open(lambda: live.model, trainer._precision, 0)
        self.teachers = {"ours": live, "cached": cached}
        self.build_seconds = cached.pass_seconds / len(trainer.train_set)
        self.published = PublishedTrainer(trainer.student.model, live.model.model, trainer.config.optim)
        # Moments exist from here on: a first step takes the memory of any other.
        for optimizer in (trainer.optimizer, self.published.optimizer):
            for parameter in trainer.student.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
        self.make_batches()

    def make_batches(self) -> None:
        """Makes the batches, packed for the trainer and padded for the published one."""
        trainer, size = self.trainer, self.batch_size
        samples = [sample | {"index": index} for index, sample in enumerate(trainer.train_set)]
        batches = [samples[start : start + size] for start in range(0, len(samples), size)]
        budget = trainer.config.train.max_tokens
        self.batches = [(pack(batch, budget), pad(batch, LENGTH, trainer.device)) for batch in batches]
        models = trainer.student, self.teachers["ours"].model
        student, teacher = (sum(p.numel() for p in model.parameters()) / 1e6 for model in models)
        prompt = sum(sample["prompt_length"] for sample in samples) / len(samples)
        response = sum(len(sample["input_ids"]) for sample in samples) / len(samples) - prompt
        self.report.note(
            f"{self.scale.title} ({teacher:.1f}M to {student:.1f}M weights), {size} samples a step, {trainer.dtype}; a "
            f"sample has {prompt:.1f} tokens of prompt and {response:.1f} of response (Dolly: 71.3 and 74.3)"
        )

    def steps(self) -> dict[tuple[str, str], Callable[[tuple], tuple[Tensor, Tensor]]]:
        """Of each method and way: takes a batch, packed and padded, returns loss and gradient norm."""

        def theirs(method: Method) -> Callable:
            def step(batch: tuple) -> tuple[Tensor, Tensor]:
                with self.trainer._precision():
                    return self.published.step(batch[1], method.published)

            return step

        def ours(name: str, teacher: Teacher | CachedTeacher | None) -> Callable:
            method = methods.find(METHODS[name].method)(self.config(name))

            def step(batch: tuple) -> tuple[Tensor, Tensor]:
                self.trainer.method, self.trainer.teacher = method, teacher
                return self.trainer._step(batch[0])[:2]

            return step

        steps = {}
        for name, method in self.methods.items():
            steps[name, "published"] = theirs(method)
            for way, teacher in self.teachers.items() if method.loss else [("ours", None)]:
                steps[name, way] = ours(name, teacher)
        return steps

    def held(self, method: Method, way: str) -> int:
        """Bytes that stay in memory between steps: weights, moments, and what there is of the teacher."""
        trainer, teacher = self.trainer, self.teachers["cached"]
        tensors = list(trainer.student.parameters())
        tensors += [moment for state in trainer.optimizer.state.values() for moment in state.values()]
        if method.loss and way == "cached":
            tensors += [teacher.rows, teacher.weight]
        elif method.loss:
            tensors += self.teachers["ours"].model.parameters()
        return sum(tensor.nbytes for tensor in tensors)

    def check(self, steps: dict[tuple[str, str], Callable]) -> float:
        """One step each, dropout off: notes loss, gradient norm and peak of memory; returns the seconds it took.

        The first batch's, which is not timed: it is the warm-up, too.
        """
        modules = self.trainer.student, self.published.student
        for module in modules:
            module.eval()
        self.numbers, self.bytes, started = {}, {}, time.perf_counter()
        for (name, way), step in steps.items():
            method, values = self.methods[name], []
            peak = peak_memory(lambda step=step, out=values: out.extend(step(self.batches[0])), self.trainer.device)
            self.bytes[name, way] = self.held(method, way) + peak
            loss, norm = (value.item() for value in values)
            if way == "published" and method.has_entropy:
                loss -= self.published.teacher_entropy(self.batches[0][1]).item()
            self.numbers[name, way] = loss, norm
            print(f"{name}, {WAYS[way]}: loss {loss:.6f}, gradient norm {norm:.6f}", flush=True)
        for module in modules:
            module.train()
        return time.perf_counter() - started

    def difference(self, name: str) -> float:
        """The largest of loss and gradient norm between a method's ways, relative."""
        numbers = np.array([values for (other, _), values in self.numbers.items() if other == name])  # [ways, 2]
        return float(np.abs(numbers / numbers[0] - 1).max())

    def time(self) -> bool:
        """Times all rounds and writes the tables; whether all methods' sides agree."""
        self.build()
        steps, rounds = self.steps(), []
        left = self.options.repeats * self.check(steps)
        for number, batch in enumerate(self.batches[1:], 1):
            print(f"round {number} of {self.options.repeats}, about {duration(left)} left", flush=True)
            started = time.perf_counter()
            candidates = {key: functools.partial(step, batch) for key, step in steps.items()}
            # A GPU's kernels may be chosen, or compiled, for each new shape: there every step runs twice.
            rounds.append(measure(candidates, 1, warm=self.trainer.device.type == "cpu"))
            left = (time.perf_counter() - started) * (self.options.repeats - number)
        times = {key: [each[key][0] / self.batch_size for each in rounds] for key in steps}  # ms a sample
        return self.tables(times)

    def tables(self, times: dict[tuple[str, str], list[float]]) -> bool:
        tolerance = 1e-4 if self.trainer.dtype == torch.float32 else 2e-2
        rows = []
        for name, method in self.methods.items():
            difference = self.difference(name)
            same = difference <= tolerance
            row = {"name": name, "paper": method.paper, "difference": difference, "same": same}
            row["check"] = f"{'' if same else 'FAILED '}{difference:.0e}"
            row |= {way: statistics.median(times[name, way]) / 1e3 for way in WAYS if (name, way) in times}
            if same:
                row["published_over_ours"] = self.ratio(times, (name, "published"), (name, "ours"))
                row["published_over_cached"] = self.ratio(times, (name, "published"), (name, "cached"))
                row["ours_over_sft"] = self.ratio(times, (name, "ours"), ("SFT", "ours"))
                row["cached_over_sft"] = self.ratio(times, (name, "cached"), ("SFT", "ours"))
            rows.append(row)
        columns = {
            "name": ("", ""),
            "paper": ("the\npaper", ".3g"),
            "published": ("published\nway", ".3g"),
            "ours": ("ours", ".3g"),
            "cached": ("ours,\ncached", ".3g"),
            "published_over_ours": ("published\n/ ours", ".2f"),
            "published_over_cached": ("published\n/ cached", ".2f"),
            "ours_over_sft": ("ours\n/ SFT", ".2f"),
            "cached_over_sft": ("cached\n/ SFT", ".2f"),
            "check": ("same loss\nand norm to", ""),
        }
        self.report.table("methods", f"seconds/sample, medians of {self.options.repeats}", rows, columns)
        self.spreads(times)
        self.amortised(rows)
        self.targets(rows)
        return all(row["same"] for row in rows)

    @staticmethod
    def ratio(times: dict, over: tuple[str, str], under: tuple[str, str]) -> float | None:
        """The median over rounds, each of one batch for all; None where one of the two does not exist."""
        if over not in times or under not in times:
            return None
        return statistics.median(x / y for x, y in zip(times[over], times[under], strict=True))

    def spreads(self, times: dict[tuple[str, str], list[float]]) -> None:
        rows = []
        for (name, way), values in times.items():
            of_bytes = {"bytes": self.bytes[name, way], "gib": self.bytes[name, way] / 2**30}
            rows.append(spread(f"{name}, {WAYS[way]}", values, **of_bytes, all_ms=values))
        columns = {"name": ("", ""), "ms": ("ms", ".2f"), "range": ("min..max", ""), "gib": ("GiB at most", ".2f")}
        self.report.table("ways", "milliseconds/sample, and tensors held at once: weights to gradients", rows, columns)

    def amortised(self, rows: list[dict]) -> None:
        """What the cache costs, spread over the epochs that share it."""
        costs = []
        for row in rows:
            if "cached" in row:
                seconds = {epochs: row["cached"] + self.build_seconds / epochs for epochs in EPOCHS}
                costs.append({"name": row["name"], "build": self.build_seconds})
                for epochs in EPOCHS:
                    costs[-1][f"after_{epochs}"] = seconds[epochs]
                    costs[-1][f"ratio_{epochs}"] = row["published"] / seconds[epochs] if row["same"] else None
        if costs:
            columns = {"name": ("", ""), "build": ("building\nthe cache, once", ".3g")}
            for epochs in EPOCHS:
                columns[f"after_{epochs}"] = (f"step and build\nover {epochs} epochs", ".3g")
                columns[f"ratio_{epochs}"] = ("published\n/ this", ".2f")
            self.report.table("cache", "seconds/sample, the teacher's cache included", costs, columns)

    def targets(self, rows: list[dict]) -> None:
        row = next((row for row in rows if row["name"] == "ABKD" and row["same"]), None)
        if row is not None and self.report.judge:
            bounds = [{"name": name, "ratio": row[key], "target": bound} for name, (key, bound) in TARGETS.items()]
            self.report.table("targets", "ABKD", bounds, {"name": ("", ""), "ratio": ("", ".2f")})

    def overhead(self) -> None:
        """Where the time of the trainer's loop goes, by cProfile, which charges Python a little more than it takes."""
        for name, method in self.methods.items():
            trainer, profile = Trainer(self.config(name, "auto")), cProfile.Profile()
            trainer._load()
            trainer.config.run.folder.mkdir(parents=True)
            with contextlib.redirect_stdout(None):
                profile.runcall(trainer._run)
            way = ", teacher's states cached" if method.loss else ""
            title = f"{name}{way}: {OVERHEAD_STEPS} steps of {self.batch_size} samples"
            columns = {"name": ("", ""), "ms": ("ms a step", ".2f"), "ratio": ("%", ".2f")}
            self.report.table("overhead", title, overhead_rows(profile), columns)


LOOP = (Trainer._batches, Trainer._step, Window.add, RunLog.advance, Trainer._log_window, Trainer._after_step)
WORK = {
    "student and loss, forward": (PackedCausalLM.forward,),
    "backward": (torch.Tensor.backward,),
    "teacher's states": (Teacher.states, CachedTeacher.states),
    "clipping and AdamW": (torch.nn.utils.clip_grad_norm_, torch.optim.AdamW.step),
}
CHORES = {
    "reading and packing": (Trainer._batches,),
    "sums, log, progress": (Window.add, RunLog.advance, Trainer._log_window),
    "evaluation, checkpoints": (Trainer._after_step,),
}


def overhead_rows(profile: cProfile.Profile) -> list[dict]:
    """Milliseconds a step and percent of the loop: WORK, CHORES, what is in neither, and all that is not WORK."""
    stats = pstats.Stats(profile).stats

    def seconds(functions: Iterable[Callable], own: bool = False) -> float:
        """Spent in these functions and in what they call; `own`: in themselves alone."""
        codes = (inspect.unwrap(function).__code__ for function in functions)
        keys = ((code.co_filename, code.co_firstlineno, code.co_name) for code in codes)
        return sum(stats[key][2 if own else 3] for key in keys if key in stats)

    whole = seconds(LOOP) + seconds([Trainer._run], own=True)
    spent = {name: seconds(functions) for name, functions in (WORK | CHORES).items()}
    spent["the rest"] = whole - sum(spent.values())
    spent["the trainer itself"] = whole - sum(spent[name] for name in WORK)
    rows = [
        {"name": name, "ms": 1e3 * value / OVERHEAD_STEPS, "ratio": 100 * value / whole}
        for name, value in spent.items()
    ]
    rows[-1]["target"] = at_most(3)
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    results = pathlib.Path(__file__).parent / "results" / "timing"
    parser.add_argument("--scale", choices=SCALES, help="default: paper on a GPU, small on the CPU")
    parser.add_argument(
        "--methods", choices=METHODS, nargs="+", default=list(METHODS), help="default: all; SFT, the yardstick, always"
    )
    parser.add_argument("--batch-size", type=int, help="samples of a step (default: the scale's)")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--out", type=pathlib.Path, default=results, help="folder (default: %(default)s)")
    parser.add_argument("--overhead", action="store_true", help="what the trainer's own share of its loop is; CPU only")
    parser.add_argument("--measure-lengths", nargs=2, metavar=("ROWS", "TOKENIZER"), help="print PROMPTS and RESPONSES")
    options = parser.parse_args(arguments)
    options.scale = options.scale or ("paper" if options.device == "cuda" else "small")
    if options.overhead and options.device != "cpu":
        parser.error("--overhead measures Python's clock, which a GPU's work doesn't show on: add --device cpu")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.measure_lengths:
        print(*length_quantiles(*options.measure_lengths), sep="\n")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(options, pathlib.Path(folder))
        agrees = True
        try:
            if options.overhead:
                benchmark.overhead()
            else:
                agrees = benchmark.time()
        finally:  # what was measured before a failure is kept
            benchmark.report.save(options.out / ("overhead.json" if options.overhead else "timing.json"))
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
