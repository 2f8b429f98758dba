"""Seconds a sample of every method, against the published way and against fine-tuning: `python benchmarks/timing.py`.

Our steps are the trainer's own, without and with the teacher's cache; the published way is published.py. Both have the
same models (of random weights) and the same batches, as long as Dolly's samples are. All take turns, so that a drift of
the machine touches them alike. A step is timed from its batch, packed or padded, to the changed weights. A method that
generates has several kinds of steps: each is timed, and they are added up in the shares that the method has of them.

Before that, both sides have to agree on loss and gradient norm, dropout off, on the data and on given responses: a
method whose sides don't is marked as failed, gets no ratios, and makes the exit status 1. Tables go to the terminal,
and with a chart, as JSON and Markdown, to --out.

--profile says by kind of work where our steps' time goes, and --overhead what the trainer's whole loop takes besides.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch

from abkd_fast.config.recipe import load
from abkd_fast.config.schema import Config
from abkd_fast.data.batches import make_step_batch
from abkd_fast.teacher.cache import TeacherCache
from abkd_fast.training.costs import peak_flops
from abkd_fast.training.trainer import Trainer
from breakdown import breakdown, profile
from harness import Report, at_least, at_most, measure, peak_memory, spread
from overhead import overhead
from published import CHUNK
from steps import METHODS, PARTS, WAYS, Ours, Published, Turn
from workload import LENGTH, NEW_TOKENS, SCALES, length_quantiles, write_rows, write_text, write_tokenizer

Key = tuple[str, str, str]  # method, way, part
TARGETS = {  # of ABKD at the paper's scale: a ratio of the table, and its bound
    "published / ours": ("published_over_ours", at_least(4)),
    "published / cached": ("published_over_cached", at_least(12)),
    "cached / SFT": ("cached_over_sft", at_most(1.25)),
}
EPOCHS = (10, 20)  # of the papers: what building the cache is shared between
OVERHEAD_STEPS = 10
CPU_BATCH = 4  # samples of a step at most: the published way's logits of more don't fit next to GPT-2 XL in 24 GB


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s"


class Benchmark:
    def __init__(self, options: argparse.Namespace, folder: pathlib.Path) -> None:
        """`folder`: for what a run needs on disk."""
        self.options, self.folder, self.scale = options, folder, SCALES[options.scale]
        most = self.scale.batch_size if options.device == "cuda" else min(self.scale.batch_size, CPU_BATCH)
        self.batch_size = options.batch_size or most
        self.methods = {name: METHODS[name] for name in METHODS if name in ("SFT", *options.methods)}
        # Prompts that MiniLLM answers, of the 256 of a round; a GPU is hardly slower for more.
        self.rollouts = max(self.batch_size, 64 if options.device == "cuda" else CHUNK)
        batches = options.repeats + 1
        write_tokenizer(folder / "tokenizer", self.scale.vocab)
        write_rows(folder / "rows.jsonl", batches, self.batch_size, self.scale.vocab)
        write_text(folder / "text.jsonl", batches * self.batch_size, self.scale.vocab)
        judge = options.scale == "paper" or (options.overhead and options.scale == "small")
        self.report = Report(torch.device(options.device), vars(options), judge)

    def config(self, name: str, cache: str = "off") -> Config:
        method, rows = METHODS[name], str(self.folder / "rows.jsonl")
        values = {
            "method": method.method,
            "loss": method.loss or Config.loss,
            "tokenizer": str(self.folder / "tokenizer"),
            "run": {"name": name, "dir": str(self.folder / "runs")},
            "student": self.scale.model(self.scale.student),
            "teacher": self.scale.model(self.scale.teacher) if method.loss else None,
            "data": {"train": rows, "max_length": LENGTH, "max_prompt_length": None},
            "sampling": {"max_new_tokens": NEW_TOKENS},
            "minillm": {"rollouts": self.rollouts},
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
            **method.settings,
        }
        if self.options.pretrain:
            values["data"]["pretrain"] = {"path": str(self.folder / "text.jsonl")}
        if name == "DISTILLM":
            values["data"]["dev"] = rows  # whose loss it would follow
        path = self.folder / "config.json"
        path.write_text(json.dumps(values))
        return load(str(path))[0]

    def build(self) -> None:
        """Both sides, on the same weights: all that a method is to them is a loss, a teacher and sequences."""
        self.trainer = trainer = Trainer(self.config("ABKD"))
        trainer.build()
        live, samples = trainer.teacher, 2 * len(trainer.data.train_set)  # seen twice: so worth a cache
        cache = self.config("ABKD", "auto"), trainer.teacher_meta.config, trainer.data.train_set, samples
        cached = TeacherCache(*cache, trainer.device, trainer.dtype).open(lambda: live.model, trainer.precision, 0)
        self.build_seconds = cached.pass_seconds / len(trainer.data.train_set)
        self.ours = Ours(trainer, live, cached, self.config)
        self.published = Published(trainer, live, LENGTH)
        # Moments exist from here on: a first step takes the memory of any other.
        for optimizer in (trainer.optimizer, self.published.trainer.optimizer):
            for parameter in trainer.student.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
        self.turns = [self.turn(number) for number in range(self.options.repeats + 1)]
        self.describe()

    @property
    def tolerance(self) -> float:
        """Of both sides' numbers, relative."""
        return 1e-4 if self.trainer.dtype == torch.float32 else 2e-2

    def turn(self, number: int) -> Turn:
        """The batch of that number, packed for the trainer and padded for the published way."""
        trainer, size = self.trainer, self.batch_size
        samples = [sample | {"index": index} for index, sample in enumerate(trainer.data.train_set)]
        later = itertools.islice(itertools.cycle(samples), number * size, number * size + self.rollouts)
        prompts, text, padded_text = list(later), [], None
        if trainer.data.pretrain_set is not None:
            text = [trainer.data.pretrain_set[row] for row in range(number * size, (number + 1) * size)]
            padded_text = self.published.pad(text)
        samples = prompts[:size]
        batch = make_step_batch(samples, text, trainer.config.train.max_tokens)
        return Turn(batch, self.published.pad(samples), prompts, padded_text)

    def describe(self) -> None:
        models = self.trainer.student, self.ours.teachers["ours"].model
        student, teacher = (sum(p.numel() for p in model.parameters()) / 1e6 for model in models)
        samples = list(self.trainer.data.train_set)
        prompt = sum(sample["prompt_length"] for sample in samples) / len(samples)
        response = sum(len(sample["input_ids"]) for sample in samples) / len(samples) - prompt
        text = f"; every step has plain text, too, {LENGTH} tokens a sample" if self.options.pretrain else ""
        self.report.note(
            f"{self.scale.title} ({teacher:.1f}M to {student:.1f}M weights), {self.batch_size} samples a step, "
            f"{self.trainer.dtype}; a sample has {prompt:.1f} tokens of prompt and {response:.1f} of response (Dolly: "
            f"71.3 and 74.3){text}"
        )

    def describe_work(self) -> None:
        """What the timed steps leave out, or have less of than the published ones."""
        if self.batch_size < self.scale.batch_size:
            self.report.note(f"A step has {self.batch_size} samples, not {self.scale.batch_size}: --batch-size")
        if any(method.is_on_policy for method in self.methods.values()):
            self.report.note(
                f"Generated responses end where those of the data do, or after {NEW_TOKENS} tokens. The published way "
                "pads them as it pads the data: training on them takes it as long, and is not timed again."
            )
        if "MiniLLM" in self.methods:
            theirs = self.turns[0].published_rollouts
            self.report.note(f"A round of MiniLLM answers {theirs} prompts, of ours {self.rollouts}; by default 256.")
        for name, method in self.methods.items():
            if method.note:
                self.report.note(f"{name}: {method.note}.")

    def steps(self) -> dict[Key, Callable[[Turn], object]]:
        """Of each method, way and part: takes a batch; those that train return loss and gradient norm.

        What writes comes before what trains on that.
        """
        steps = {}
        for name, method in self.methods.items():
            if "data" in method.parts:
                steps[name, "published", "data"] = self.published.data(name)
                for way in ("ours", "cached") if method.loss else ("ours",):
                    steps[name, way, "data"] = self.ours.data(name, way)
            if method.is_on_policy:
                for way, side in (("published", self.published), ("ours", self.ours)):
                    steps[name, way, "rollout"], steps[name, way, "new"] = side.rollout(name), side.text(name)
                if "again" in method.parts:
                    steps[name, "ours", "again"] = steps[name, "ours", "new"]
        return steps

    def held(self, key: Key) -> int:
        """Bytes that stay in memory between steps: weights, moments, and what there is of the teacher."""
        name, way, _ = key
        method, trainer, teachers = self.methods[name], self.trainer, self.ours.teachers
        tensors = list(trainer.student.parameters())
        tensors += [moment for state in trainer.optimizer.state.values() for moment in state.values()]
        if method.loss and way == "cached":
            tensors += [teachers["cached"].rows, teachers["cached"].weight]
        if method.loss and (way != "cached" or method.is_on_policy):
            tensors += teachers["ours"].model.parameters()
        return sum(tensor.nbytes for tensor in tensors)

    def check(self, steps: dict[Key, Callable]) -> float:
        """One step each, dropout off: notes loss, gradient norm and peak of memory; returns the seconds it took.

        The first batch's, which is not timed: it is the warm-up, too. Both sides get the responses that ours wrote.
        """
        modules = self.trainer.student, self.published.trainer.student
        for module in modules:
            module.eval()
        turn, self.numbers, self.bytes, started = self.turns[0], {}, {}, time.perf_counter()
        for name in (name for name, method in self.methods.items() if method.is_on_policy):
            steps[name, "ours", "rollout"](turn)
            self.published.take(name, self.ours.written[name])
        for key, step in steps.items():
            name, way, part = key
            if part == "rollout":
                continue
            values = []
            peak = peak_memory(lambda step=step, out=values: out.extend(step(turn)), self.trainer.device)
            self.bytes[key] = self.held(key) + peak
            loss, norm = (value.item() for value in values)
            if way == "published":
                loss -= self.published.entropy(name, part, turn)
            self.numbers[key] = loss, norm
            print(f"{self.label(key)}: loss {loss:.6f}, gradient norm {norm:.6f}", flush=True)
        for module in modules:
            module.train()
        return time.perf_counter() - started

    def label(self, key: Key) -> str:
        name, way, part = key
        return f"{name}, {WAYS[way]}" + (f", {PARTS[part]}" if self.methods[name].is_on_policy else "")

    def difference(self, name: str) -> float:
        """The largest of loss and gradient norm between a method's sides, relative."""
        differences = []
        for key, numbers in self.numbers.items():
            if key[0] == name and key[1] != "published":
                theirs = self.numbers[name, "published", "new" if key[2] == "again" else key[2]]
                differences += [abs(ours / of_them - 1) for ours, of_them in zip(numbers, theirs, strict=True)]
        return float(np.max(differences))  # not max: what is not a number has to show

    def time(self) -> bool:
        """Times all rounds and writes the tables; whether all methods' sides agree."""
        repeats, minutes, begun = self.options.repeats, self.options.minutes, time.perf_counter()
        self.build()
        self.describe_work()
        steps, rounds = self.steps(), []
        a_round = self.check(steps)  # seconds
        timed = [key for key in steps if self.same_cost(key) == key]
        for number, turn in enumerate(self.turns[1:], 1):
            started = time.perf_counter()
            if rounds and started + a_round > begun + 60 * minutes:
                self.report.note(
                    f"{len(rounds)} of {repeats} rounds: the next would not end within {minutes:g} minutes"
                )
                break
            print(f"round {number} of {repeats}, about {duration(a_round * (repeats - number + 1))} left", flush=True)
            candidates = {key: functools.partial(steps[key], turn) for key in timed}
            # A GPU's kernels may be chosen, or compiled, for each new shape: there every step runs twice.
            rounds.append(measure(candidates, 1, warm=self.trainer.device.type == "cpu"))
            a_round = time.perf_counter() - started
        return self.tables({key: [each[key][0] / self.samples_of(key) for each in rounds] for key in timed})

    def samples_of(self, key: Key) -> int:
        """How many samples a step trains on, or prompts it answers."""
        name, way, part = key
        if part != "rollout" or name != "MiniLLM":
            return self.batch_size
        return self.turns[0].published_rollouts if way == "published" else self.rollouts

    def same_cost(self, key: Key) -> Key:
        """The step that is timed for this one."""
        name, way, part = key
        if way == "published" and part in ("new", "again"):  # padded to the same length, and nothing is kept
            return name, way, "data" if "data" in self.methods[name].parts else "new"
        return (name, "ours", part) if way == "cached" and part != "data" else key

    def totals(self, parts: dict[Key, list[float]]) -> dict[tuple[str, str], list[float]]:
        """Milliseconds/sample of each method and way, in every round: the sum of its parts, in their shares."""
        totals = {}
        for name, method in self.methods.items():
            for way in WAYS:
                keys = {part: self.same_cost((name, way, part)) for part in method.parts}
                if any((name, way) == key[:2] for key in keys.values()) and all(key in parts for key in keys.values()):
                    weighted = [np.multiply(share, parts[keys[part]]) for part, share in method.parts.items()]
                    totals[name, way] = sum(weighted).tolist()
        return totals

    def tables(self, parts: dict[Key, list[float]]) -> bool:
        """`parts`: milliseconds/sample of each step in every round."""
        times, rows = self.totals(parts), []
        for name, method in self.methods.items():
            difference = self.difference(name)
            same = difference <= self.tolerance
            row = {"name": name, "difference": difference, "same": same}
            row["check"] = f"{'' if same else 'FAILED '}{difference:.0e}"
            row |= {way: statistics.median(times[name, way]) / 1e3 for way in WAYS if (name, way) in times}
            if same:
                row["published_over_ours"] = self.ratio(times, (name, "published"), (name, "ours"))
                row["published_over_cached"] = self.ratio(times, (name, "published"), (name, "cached"))
                row["ours_over_sft"] = self.ratio(times, (name, "ours"), ("SFT", "ours"))
                row["cached_over_sft"] = self.ratio(times, (name, "cached"), ("SFT", "ours"))
            if not method.is_on_policy:
                row |= {f"{way}_mfu": self.mfu(times, name, way) for way in ("ours", "cached")}
            rows.append(row)
        columns = {
            "name": ("", ""),
            "published": ("published\nway", ".3g"),
            "ours": ("ours", ".3g"),
            "cached": ("ours,\ncached", ".3g"),
            "published_over_ours": ("published\n/ ours", ".2f"),
            "published_over_cached": ("published\n/ cached", ".2f"),
            "ours_over_sft": ("ours\n/ SFT", ".2f"),
            "cached_over_sft": ("cached\n/ SFT", ".2f"),
            "check": ("same loss\nand norm to", ""),
        }
        if peak_flops(self.trainer.device):
            columns |= {"ours_mfu": ("MFU,\nours", ".1%"), "cached_mfu": ("MFU,\ncached", ".1%")}
        rounds = len(next(iter(parts.values())))
        self.report.table("methods", f"seconds/sample, medians of {rounds}", rows, columns)
        self.spreads(parts)
        self.amortized(rows)
        self.targets(rows)
        if importlib.util.find_spec("matplotlib") is None:
            self.report.note("chart: skipped, matplotlib is not installed (pip install '.[bench]')")
        else:
            from chart import draw

            draw(rows, f"{self.scale.title}, {self.report.content['machine']['device']}", self.options.out)
            self.report.note(f"chart: {self.options.out / 'timing.png'} and .svg")
            self.report.markdown.append("![seconds/sample](timing.png)")
        return all(row["same"] for row in rows)

    @staticmethod
    def ratio(times: dict, over: tuple[str, str], under: tuple[str, str]) -> float | None:
        """The median over rounds, each of one batch for all; None where one of the two does not exist."""
        if over not in times or under not in times:
            return None
        return statistics.median(x / y for x, y in zip(times[over], times[under], strict=True))

    def mfu(self, times: dict, name: str, way: str) -> float | None:
        """What a step's floating-point operations are of all that the GPU could do in its time, in the median."""
        peak = peak_flops(self.trainer.device)
        if peak is None or (name, way) not in times:
            return None
        self.trainer.method = self.ours.method(name)
        cost, shares = self.trainer.step_cost(way == "cached"), []
        for turn, milliseconds in zip(self.turns[1:], times[name, way], strict=False):  # perhaps of fewer rounds
            flops = cost.flops(turn.samples) + cost.flops(turn.batch.pretrain_blocks, taught=False)
            shares.append(flops / (1e-3 * milliseconds * self.batch_size * peak))
        return statistics.median(shares)

    def spreads(self, parts: dict[Key, list[float]]) -> None:
        rows = []
        for key, values in parts.items():
            row = spread(self.label(key), values, all_ms=values, share=self.share(key))
            if key in self.bytes:
                row |= {"bytes": self.bytes[key], "gib": self.bytes[key] / 2**30}
            rows.append(row)
        columns = {
            "name": ("", ""),
            "ms": ("ms", ".2f"),
            "range": ("min..max", ""),
            "share": ("how many\na sample", ".2f"),
            "gib": ("GiB at most", ".2f"),
        }
        title = "milliseconds a sample, or a response, and tensors held at once: weights to gradients"
        self.report.table("ways", title, rows, columns)

    def share(self, key: Key) -> float:
        """How much of this step comes to a sample that its method trains on."""
        name, way, _ = key
        return sum(s for part, s in self.methods[name].parts.items() if self.same_cost((name, way, part)) == key)

    def amortized(self, rows: list[dict]) -> None:
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
        for name, method in self.methods.items():
            if not method.is_on_policy:
                title = f"{name}, teacher's states cached" if method.loss else name
                overhead(self.config(name, "auto"), title, self.report)

    def profile(self) -> None:
        """What our steps spend their time on, in the mean over the rounds; the first batch is the warm-up."""
        self.build()
        steps = {key: step for key, step in self.steps().items() if key[1] != "published"}
        traces = {key: [] for key in steps}
        for number, turn in enumerate(self.turns):
            print(f"round {number} of {self.options.repeats}", flush=True)
            for key, step in steps.items():
                run = functools.partial(step, turn)
                if number == 0:
                    run()
                else:
                    traces[key].append(profile(run, self.trainer.device))
        for key in steps:
            breakdown(traces[key], self.label(key), self.report)


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
    parser.add_argument(
        "--minutes", type=float, default=60, help="no second round that would end later (default: %(default)s)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--out", type=pathlib.Path, default=results, help="folder (default: %(default)s)")
    parser.add_argument(
        "--pretrain", action="store_true", help="adds the papers' plain text to every step, on both sides"
    )
    parser.add_argument(
        "--profile", action="store_true", help="where the time of our steps goes, by kind of work; nothing is compared"
    )
    text = "what the trainer's own share of its loop is, where nothing is generated; CPU only"
    parser.add_argument("--overhead", action="store_true", help=text)
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
    what = "overhead" if options.overhead else "profile" if options.profile else "timing"
    with tempfile.TemporaryDirectory() as folder:
        benchmark, agrees = Benchmark(options, pathlib.Path(folder)), True
        try:
            if options.overhead:
                benchmark.overhead()
            elif options.profile:
                benchmark.profile()
            else:
                agrees = benchmark.time()
        finally:  # what was measured before a failure is kept
            benchmark.report.save(options.out / f"{what}.json")
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
