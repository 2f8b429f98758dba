"""Seconds a sample of every method, against the published way and against fine-tuning: `python benchmarks/timing.py`.

Our steps are the trainer's own, without and with the teacher's cache; the published way is published.py. Both have the
same models (of random weights), and the same batches, as long as Dolly's samples are. All take turns, so that a drift
of the machine touches them alike. A step is timed from its samples in memory to the changed weights. Before that, every
pair has to agree on loss and gradient norm, dropout off; a method whose sides don't is marked as failed, gets no
ratios, and makes the exit status 1. Tables go to the terminal, and as JSON and Markdown to --out.

--overhead measures, in the trainer's whole loop, what is neither model nor loss.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import dataclasses
import inspect
import json
import pathlib
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import published
import torch
from harness import Report, at_least, at_most, measure, peak_memory, spread
from published import PublishedTrainer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from abkd_fast import logs, methods
from abkd_fast.config import CacheConfig, Config, DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from abkd_fast.data import pack, read_rows, tokenise
from abkd_fast.models import PackedCausalLM, read_tokenizer
from abkd_fast.teacher import CachedTeacher, Teacher, TeacherCache
from abkd_fast.trainer import Trainer, Window

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

    name: str  # of the trainer's method
    loss: str | None = None  # as spelled in a configuration; None without a teacher
    published: published.Loss | None = None
    has_entropy: bool = False  # the teacher's is part of the published value
    paper: float | None = None  # seconds/sample


METHODS = {
    "SFT": Method("sft"),
    "KD": Method("kd", "fkl", published.forward_kl, has_entropy=True),
    "AlphaNet": Method("kd", "alphanet:0.2,0.8", published.alphanet),
    "ABKD": Method("ab", "ab:0.2,0.7", published.alpha_beta),
}
WAYS = {"published": "published way", "ours": "ours", "cached": "ours, teacher's states cached"}


@dataclasses.dataclass(frozen=True)
class Scale:
    """Model shapes (what they leave out is GPT-2's of 124M) and samples of a step."""

    title: str
    student: dict
    teacher: dict
    batch_size: int


TINY = {"vocab_size": 1009, "n_layer": 2, "n_head": 2, "initializer_range": 0.2}
SCALES = {
    "paper": Scale("GPT-2 XL to GPT-2", {}, {"n_embd": 1600, "n_layer": 48, "n_head": 25}, 8),
    "small": Scale("GPT-2 medium to GPT-2", {}, {"n_embd": 1024, "n_layer": 24, "n_head": 16}, 4),
    "tiny": Scale("tiny models", {**TINY, "n_embd": 32}, {**TINY, "n_embd": 64}, 4),
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


def draw_lengths(quantiles: tuple[int, ...], count: int, generator: np.random.Generator) -> list[int]:
    """As many lengths, one from each of `count` equal parts of the distribution: every batch is like the whole."""
    at = (generator.permutation(count) + generator.random(count)) / count
    return np.interp(at, np.linspace(0, 1, len(quantiles)), quantiles).round().astype(int).tolist()


def write_rows(path: pathlib.Path, batches: int, batch_size: int, vocab: int) -> None:
    """Rows of random tokens, batch after batch, for a tokenizer whose words are the numbers of its tokens.

    Prompt and response lengths are independent: in Dolly their correlation is -0.06.
    """
    generator = np.random.default_rng(0)

    def text(tokens: int) -> str:
        return "".join(f" {token}" for token in generator.integers(vocab - 1, size=tokens))

    with path.open("w") as file:
        for _ in range(batches):
            lengths = (draw_lengths(quantiles, batch_size, generator) for quantiles in (PROMPTS, RESPONSES))
            for prompt, response in zip(*lengths, strict=True):
                file.write(json.dumps({"prompt": text(prompt), "output": text(response - 1)}) + "\n")


def write_tokenizer(folder: pathlib.Path, vocab: int) -> None:
    words = Tokenizer(WordLevel({str(token): token for token in range(vocab)}))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=str(vocab - 1)).save_pretrained(folder)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s"


class Benchmark:
    def __init__(self, options: argparse.Namespace, folder: pathlib.Path) -> None:
        """`folder`: for what a run needs on disk."""
        self.options, self.folder, self.scale = options, folder, SCALES[options.scale]
        self.batch_size = options.batch_size or self.scale.batch_size
        self.methods = {name: METHODS[name] for name in METHODS if name in ("SFT", *options.methods)}
        self.models = [{"model_type": "gpt2", **shape} for shape in (self.scale.student, self.scale.teacher)]
        vocab = ModelConfig(config=self.models[0]).config.get("vocab_size", 50257)
        write_tokenizer(folder / "tokenizer", vocab)
        write_rows(folder / "rows.jsonl", options.repeats + 1, self.batch_size, vocab)
        self.report = Report(torch.device(options.device), vars(options), judge=options.scale == "paper")

    def config(self, method: Method, cache: str = "off") -> Config:
        student, teacher = (ModelConfig(config=config) for config in self.models)
        return Config(
            method=method.name,
            loss=method.loss or Config.loss,
            tokenizer=str(self.folder / "tokenizer"),
            run=RunConfig(name=f"{method.name}-{method.loss}", dir=str(self.folder / "runs")),
            student=student,
            teacher=teacher if method.loss else None,
            data=DataConfig(train=str(self.folder / "rows.jsonl"), max_length=LENGTH, max_prompt_length=None),
            cache=CacheConfig(mode=cache, dir=str(self.folder / "cache")),
            # Steps that change no weight, so that all methods and ways have the same ones all the time.
            optim=OptimConfig(lr=1e-30, min_lr=0, schedule="constant"),
            # One micro-batch, as in the published way.
            train=TrainConfig(
                steps=OVERHEAD_STEPS,
                batch_size=self.batch_size,
                max_tokens=self.batch_size * LENGTH,
                device=self.options.device,
            ),
        )

    # Seconds a sample.

    def load(self) -> None:
        """One trainer and one published trainer with the same weights; a method is but a loss and a teacher to them."""
        method = next((method for method in self.methods.values() if method.loss), METHODS["ABKD"])
        config = self.config(method)
        self.trainer = trainer = Trainer(config)
        trainer._load()
        cache = dataclasses.replace(config, cache=self.config(method, "auto").cache)
        states = TeacherCache(
            cache, trainer.teacher_config, trainer.train_set, 2 * len(trainer.train_set), trainer.device, trainer.dtype
        )
        live = trainer.teacher
        cached = states.open(lambda: live.model, trainer._precision, reserved=0)
        self.teachers = {"ours": live, "cached": cached}
        self.build_seconds = cached.pass_seconds / len(trainer.train_set)
        self.published = PublishedTrainer(trainer.student.model, live.model.model, config.optim)
        # Moments exist from here on: the memory of a first step is that of any other.
        for optimizer in (trainer.optimizer, self.published.optimizer):
            for parameter in trainer.student.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
        samples = [sample | {"index": index} for index, sample in enumerate(trainer.train_set)]
        batches = [samples[start : start + self.batch_size] for start in range(0, len(samples), self.batch_size)]
        self.batches = [(batch, published.pad(batch, LENGTH, trainer.device)) for batch in batches]
        tokens = sum(len(sample["input_ids"]) for sample in samples) / len(samples)
        prompts = sum(sample["prompt_length"] for sample in samples) / len(samples)
        self.report.note(
            f"{self.scale.title}, {self.batch_size} samples a step, {trainer.dtype}; a sample has {prompts:.1f} tokens "
            f"of prompt and {tokens - prompts:.1f} of response (Dolly: 71.3 and 74.3)"
        )

    def steps(self) -> dict[tuple[str, str], Callable[[tuple], tuple[Tensor, Tensor]]]:
        """Of each method and way: takes a batch, packed and padded, returns loss and gradient norm."""

        def theirs(method: Method) -> Callable:
            def step(batch: tuple) -> tuple[Tensor, Tensor]:
                with self.trainer._precision():
                    return self.published.step(batch[1], method.published)

            return step

        def ours(method: Method, teacher: Teacher | CachedTeacher | None) -> Callable:
            loss = methods.find(method.name)(self.config(method))

            def step(batch: tuple) -> tuple[Tensor, Tensor]:
                self.trainer.method, self.trainer.teacher = loss, teacher
                return self.trainer._step(batch[0])

            return step

        steps = {}
        for name, method in self.methods.items():
            steps[name, "published"] = theirs(method)
            for way, teacher in self.teachers.items() if method.loss else [("ours", None)]:
                steps[name, way] = ours(method, teacher)
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
        """One step each, dropout off: notes peaks of memory and what the sides' losses differ by; returns its seconds.

        The first batch's, which is not timed: it is the warm-up, too.
        """
        modules = self.trainer.student, self.published.student
        for module in modules:
            module.eval()
        self.numbers, self.bytes, seconds = {}, {}, 0.0
        for (name, way), step in steps.items():
            started = time.perf_counter()

            def run(key: tuple[str, str] = (name, way), step: Callable = step) -> None:
                self.numbers[key] = step(self.batches[0])

            held = self.held(self.methods[name], way)
            self.bytes[name, way] = held + peak_memory(run, self.trainer.device)
            loss, norm = (value.item() for value in self.numbers[name, way])
            if way == "published" and self.methods[name].has_entropy:
                loss -= self.published.teacher_entropy(self.batches[0][1]).item()
            self.numbers[name, way] = loss, norm
            seconds += time.perf_counter() - started
            print(f"{name}, {WAYS[way]}: loss {loss:.6f}, gradient norm {norm:.6f}", flush=True)
        for module in modules:
            module.train()
        return seconds

    def difference(self, name: str) -> float:
        """The largest of loss and gradient norm between a method's ways, relative."""
        expected = self.numbers[name, "published"]
        ways = [numbers for (other, _), numbers in self.numbers.items() if other == name]
        return max(abs(x / y - 1) for numbers in ways for x, y in zip(numbers, expected, strict=True))

    def time(self) -> bool:
        """Times all rounds and writes the tables; whether all methods' sides agree."""
        self.load()
        steps, seconds = self.steps(), []
        left = self.options.repeats * self.check(steps)
        for number, batch in enumerate(self.batches[1:], 1):
            print(f"round {number} of {self.options.repeats}, at most {duration(left)} left", flush=True)
            started = time.perf_counter()
            candidates = {key: lambda step=step, batch=batch: step(batch) for key, step in steps.items()}
            seconds.append(measure(candidates, 1, warm=True))
            left = (time.perf_counter() - started) * (self.options.repeats - number)
        times = {key: [each[key][0] / self.batch_size for each in seconds] for key in steps}  # ms a sample
        return self.tables(times)

    def tables(self, times: dict[tuple[str, str], list[float]]) -> bool:
        tolerance = 1e-4 if self.trainer.dtype == torch.float32 else 2e-2
        rows = []
        for name, method in self.methods.items():
            row = {"name": name, "paper": method.paper, "difference": self.difference(name)}
            row |= {way: statistics.median(times[name, way]) / 1e3 for way in WAYS if (name, way) in times}
            row["same"] = row["difference"] <= tolerance
            row["check"] = f"{row['difference']:.0e}" if row["same"] else f"FAILED {row['difference']:.0e}"
            if row["same"]:
                for over, under in (("published", "ours"), ("published", "cached")):
                    row[f"{over}_over_{under}"] = self.ratio(times, (name, over), (name, under))
                for way in ("ours", "cached"):
                    row[f"{way}_over_sft"] = self.ratio(times, (name, way), ("SFT", "ours"))
            rows.append(row)
        columns = {"name": ("", ""), "paper": ("the\npaper", ".3g")}
        columns |= {"published": ("published\nway", ".3g"), "ours": ("ours", ".3g"), "cached": ("ours,\ncached", ".3g")}
        columns |= {
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

    # The trainer's own share.

    def overhead(self) -> None:
        """Where the time of the trainer's loop goes, by cProfile, which charges the trainer's Python a little extra."""
        for name, method in self.methods.items():
            trainer, profile = Trainer(self.config(method, "auto")), cProfile.Profile()
            with contextlib.redirect_stdout(None):
                profile.runcall(trainer.train)
            rows = list(overhead_rows(profile))
            title = f"{name}, teacher's states cached" if method.loss else name
            self.report.table(
                "overhead",
                f"{title}: the loop of {OVERHEAD_STEPS} steps of {self.batch_size} samples",
                rows,
                {"name": ("", ""), "ms": ("ms a step", ".2f"), "percent": ("%", ".2f")},
            )


def overhead_rows(profile: cProfile.Profile) -> Iterator[dict]:
    stats = pstats.Stats(profile).stats

    def seconds(functions: Iterable[Callable], own: bool = False) -> float:
        """Spent in calls of these and what they call; `own`: in themselves alone."""
        codes = (inspect.unwrap(function).__code__ for function in functions)
        keys = [(code.co_filename, code.co_firstlineno, code.co_name) for code in codes]
        return sum(stats[key][2 if own else 3] for key in keys if key in stats)

    work = {
        "student and loss, forward": [PackedCausalLM.forward],
        "backward": [torch.Tensor.backward],
        "teacher's states": [Teacher.states, CachedTeacher.states],
        "clipping and AdamW": [torch.nn.utils.clip_grad_norm_, torch.optim.AdamW.step],
    }
    chores = {
        "reading samples": [Trainer._batches],
        "packing": [pack],
        "sums, log, progress": [Window.add, logs.RunLog.advance, Trainer._log_window],
        "evaluation, checkpoints": [Trainer._after_step],
    }
    named = {**work, **chores}
    in_step = seconds([Trainer._step])
    whole = in_step + seconds([Trainer.train], own=True)
    whole += sum(seconds(functions) for key, functions in chores.items() if key != "packing")
    spent = {name: seconds(functions) for name, functions in named.items()}
    spent["the rest"] = whole - sum(spent.values())
    spent["the trainer itself"] = whole - sum(spent[name] for name in work)
    for name, value in spent.items():
        yield {"name": name, "ms": 1e3 * value / OVERHEAD_STEPS, "percent": 100 * value / whole}


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
