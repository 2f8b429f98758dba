"""Seconds a sample of every method, against the published way and against fine-tuning: `python benchmarks/timing.py`.

Our steps are ours.py, the published way is baseline.py. Both have the same random weights and batches. A step is timed
from its batch to the changed weights. A method that generates has several kinds of steps, weighed by their shares. A
method whose sides don't agree on loss and gradient norm gets no ratios and makes the exit status 1. The paper's own
seconds stand beside, with the pairs of methods that it has in another order; that is reported, not judged.
"""

import argparse
import functools
import itertools
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch

import paper
import profiling
from abkd_fast.config.recipe import load
from abkd_fast.config.schema import Config
from abkd_fast.data.batches import count_labels, make_step_batch, prompt_of
from abkd_fast.teacher.cache import Assignment, TeacherCache
from abkd_fast.training.costs import peak_flops
from abkd_fast.training.trainer import Trainer
from baseline import CHUNK, METHODS, NOTES, PARTS, WAYS, Baseline, Key, Turn, pad_samples
from chart import draw_bars
from harness import TIME, Report, measure, peak_memory, spread
from ours import Ours
from workload import LENGTH, MEAN_PROMPT, MEAN_RESPONSE, NEW_TOKENS, SCALES, scaled_parser, write_recipe

RATIOS = {  # of two ways' times, the second SFT's where it is named; heading
    "published_over_sft": ("published", "SFT", "published", "published / its SFT|.2f"),
    "ours_over_sft": ("ours", "SFT", "ours", "ours / SFT|.2f"),
    "cached_over_sft": ("cached", "SFT", "ours", "cached / SFT|.2f"),
    "published_over_ours": ("published", None, "ours", "published / ours|.2f"),
    "published_over_cached": ("published", None, "cached", "published / cached|.2f"),
}
EPOCHS = (10, 20)  # the papers' numbers of epochs, which share the cost of building the cache
STEPS = 10  # of --overhead's runs
PADS_RESPONSES = "The published way pads them as the data: training on them takes as long, and is not timed again."
CPU_BATCH = 4  # most samples of a step: the published way's logits of more don't fit next to GPT-2 XL in 24 GB


class Benchmark:
    def __init__(self, options: argparse.Namespace, folder: pathlib.Path) -> None:
        options.scale = options.scale or ("paper" if options.device == "cuda" else "small")
        self.options, self.folder, self.scale = options, folder, SCALES[options.scale]
        most = self.scale.batch_size if options.device == "cuda" else min(self.scale.batch_size, CPU_BATCH)
        self.batch_size = options.batch_size or most
        self.methods = {name: METHODS[name] for name in METHODS if name in ("SFT", *options.methods)}
        # Prompts that MiniLLM answers, of the 256 of a round; a GPU is hardly slower for more.
        self.rollouts = max(self.batch_size, 64 if options.device == "cuda" else CHUNK)
        self.report = Report(torch.device(options.device), vars(options), judge=options.scale != "tiny")

    def config(self, name: str, cache: str = "off") -> Config:
        method, folder, data = METHODS[name], self.folder, {}
        if self.options.pretrain:
            data["pretrain"] = {"path": str(folder / "text.jsonl")}
        if name == "DISTILLM":
            data["dev"] = str(folder / "rows.jsonl")  # it would follow this loss
        teacher = self.scale.model(self.scale.teacher) if method.loss else None
        sections = {"method": method.method, "loss": method.loss or Config.loss, "teacher": teacher, "data": data}
        sections |= {"run": {"name": name, "dir": str(folder / "runs")}, "minillm": {"rollouts": self.rollouts}}
        sections |= {"cache": {"mode": cache, "dir": str(folder / "cache")}, "on_policy": method.on_policy}
        sections["sampling"] = {"max_new_tokens": NEW_TOKENS}
        # Steps change no weight, so all methods and ways have the same ones all the time.
        sections["optim"] = {"lr": 1e-30, "min_lr": 0, "schedule": "constant"}
        train = {"steps": STEPS, "batch_size": self.batch_size, "device": self.options.device}
        return load(str(write_recipe(folder, self.scale, self.options.repeats + 1, train, sections)))[0]

    def build(self) -> None:
        """Both sides, on the same weights. A method is to them only a loss, a teacher and samples."""
        self.trainer = trainer = Trainer(self.config("ABKD"))
        trainer.build()
        live, samples = trainer.teachers["teacher"], list(trainer.data.train_set)
        count = 2 * len(samples)  # so often its states are read that building it pays
        models = self.config("ABKD", "auto"), trainer.teachers.metas["teacher"], trainer.teachers.vocabulary
        data = trainer.data.train_set, None, trainer.data.place, count
        given = Assignment("teacher", *models, *data, trainer.device, trainer.dtype)
        cached = TeacherCache(given).open(lambda: live.model, trainer.precision, 0)
        self.build_seconds = cached.pass_seconds / len(samples)
        self.ours, self.baseline = Ours(trainer, live, cached, self.config), Baseline(trainer, live)
        # Moments exist from here on, so that a first step takes the memory of any other.
        for optimizer in (trainer.optimizer, self.baseline.optimizer):
            for parameter in trainer.student.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
        self.tolerance = 1e-4 if trainer.dtype == torch.float32 else 2e-2  # relative, of loss and gradient norm
        self.turns = [self.turn(number) for number in range(self.options.repeats + 1)]
        prompt = statistics.fmean(len(prompt_of(sample)) for sample in samples)
        response = statistics.fmean(map(count_labels, samples))
        student, teacher = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (trainer.student, live.model))
        dolly = f"Dolly: {MEAN_PROMPT} and {MEAN_RESPONSE}"
        text = f"; every step has plain text, too, {LENGTH} tokens a sample" if self.options.pretrain else ""
        work = f"({teacher:.1f}M to {student:.1f}M weights), {self.batch_size} samples a step, {trainer.dtype}"
        tokens = f"{prompt:.1f} tokens of prompt and {response:.1f} of response"
        self.report.note(f"{self.scale.title} {work}; a sample has {tokens} ({dolly}){text}")

    def turn(self, number: int) -> Turn:
        """The batch of that number, packed for the trainer and padded for the published way."""
        trainer, size = self.trainer, self.batch_size
        samples = [sample | {"index": index} for index, sample in enumerate(trainer.data.train_set)]
        prompts = [*itertools.islice(itertools.cycle(samples), number * size, number * size + self.rollouts)]
        samples, blocks = prompts[:size], trainer.data.pretrain_set
        text = [blocks[row] for row in range(number * size, (number + 1) * size)] if blocks is not None else []
        batch = make_step_batch(samples, text, trainer.config.train.max_tokens)
        padded = pad_samples(samples, LENGTH, trainer.device)
        padded_text = pad_samples(text, LENGTH, trainer.device) if text else None
        return Turn(batch, samples, text, padded, padded_text, prompts, prompts[: max(CHUNK, size)])

    def describe_work(self) -> None:
        """Notes what the timed steps leave out, or have less of than the published ones."""
        note, names = self.report.note, [name for name, method in self.methods.items() if method.is_on_policy]
        if self.batch_size < self.scale.batch_size:
            note(f"A step has {self.batch_size} samples, not {self.scale.batch_size}: --batch-size")
        if names:
            note(f"Generated responses end where those of the data do, or after {NEW_TOKENS} tokens. {PADS_RESPONSES}")
        if "MiniLLM" in names:
            theirs = len(self.turns[0].baseline_prompts)
            note(f"A round of MiniLLM answers {theirs} prompts, of ours {self.rollouts}; by default 256.")
        for name in names:
            note(f"{name}: {NOTES[name]}.")

    def steps(self) -> dict[Key, Callable[[Turn], object]]:
        """The step of each method, way and part, on a batch. One that writes comes before those on its responses."""
        keys = []
        for name, method in self.methods.items():
            if "data" in method.parts:
                keys += [(name, way, "data") for way in WAYS if way != "cached" or method.loss]
            if method.is_on_policy:
                keys += [(name, way, part) for way in ("published", "ours") for part in ("rollout", "new")]
                keys += [(name, "ours", "again")] if "again" in method.parts else []
        sides = {"published": self.baseline, "ours": self.ours, "cached": self.ours}
        return {key: functools.partial(sides[key[1]].run, key) for key in keys}

    def held(self, key: Key) -> int:
        """Bytes that stay in memory between steps: weights, moments, and the teacher's part."""
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
        """Notes each step's loss, gradient norm and memory on the first batch, dropout off; returns seconds."""
        modules = self.trainer.student, self.baseline.student
        for module in modules:
            module.eval()
        turn, self.numbers, self.bytes, started = self.turns[0], {}, {}, time.perf_counter()
        for name in (name for name, method in self.methods.items() if method.is_on_policy):
            steps[name, "ours", "rollout"](turn)
            self.baseline.take(name, self.ours.written[name])  # both sides train on the same responses
        for key in (key for key in steps if key[2] != "rollout"):
            values = []
            peak = peak_memory(lambda key=key, out=values: out.extend(steps[key](turn)), self.trainer.device)
            self.bytes[key] = self.held(key) + peak
            loss, norm = (value.item() for value in values)
            if key[1] == "published":
                loss -= self.baseline.entropy(key, turn)
            self.numbers[key] = loss, norm
            print(f"{self.label(key)}: loss {loss:.6f}, gradient norm {norm:.6f}", flush=True)
        for module in modules:
            module.train()
        return time.perf_counter() - started

    def label(self, key: Key) -> str:
        name, way, part = key
        return f"{name}, {WAYS[way]}" + (f", {PARTS[part]}" if self.methods[name].is_on_policy else "")

    def difference(self, name: str) -> float:
        """The largest relative difference of loss or gradient norm between a method's sides."""
        differences = []
        for (method, way, part), numbers in self.numbers.items():
            if method == name and way != "published":
                theirs = self.numbers[name, "published", "new" if part == "again" else part]
                differences += [abs(own / other - 1) for own, other in zip(numbers, theirs, strict=True)]
        return float(np.max(differences))  # unlike max, it returns a NaN wherever it stands

    def timing(self) -> bool:
        """Times all rounds and writes the tables; returns whether all methods' sides agree."""
        repeats, minutes, begun = self.options.repeats, self.options.minutes, time.perf_counter()
        self.build()
        self.describe_work()
        steps, rounds = self.steps(), []
        seconds = self.check(steps)  # of a round
        timed = {key: step for key, step in steps.items() if self.same_cost(key) == key}
        for number, turn in enumerate(self.turns[1:], 1):
            started = time.perf_counter()
            if rounds and started + seconds > begun + 60 * minutes:
                late = f"the next would not end within {minutes:g} minutes"
                self.report.note(f"{len(rounds)} of {repeats} rounds: {late}")
                break
            print(f"round {number} of {repeats}, {seconds / 60:.1f} minutes each", flush=True)
            rounds.append(self.round(timed, turn))
            seconds = time.perf_counter() - started
        return self.tables({key: [each[key] / self.samples_of(key) for each in rounds] for key in timed})

    def round(self, steps: dict, turn: Turn) -> dict:
        """Milliseconds of each step on one batch. On a GPU each runs twice: a new shape chooses or compiles kernels."""
        times, warm = {}, self.trainer.device.type == "cpu"
        for key, step in steps.items():
            (times[key],) = measure({key: functools.partial(step, turn)}, 1, warm)[key]
            print(f"{self.label(key)}: {times[key]:.2f} ms", flush=True)  # a run that is cut short has told something
        return times

    def samples_of(self, key: Key) -> int:
        """How many samples a step trains on, or prompts it answers."""
        name, way, part = key
        if part != "rollout" or name != "MiniLLM":
            return self.batch_size
        return len(self.turns[0].baseline_prompts) if way == "published" else self.rollouts

    def same_cost(self, key: Key) -> Key:
        """The step that is timed in place of this one."""
        name, way, part = key
        if way == "published" and part in ("new", "again"):  # padded to the same length, and nothing is kept
            return name, way, "data" if "data" in self.methods[name].parts else "new"
        return (name, "ours", part) if way == "cached" and part != "data" else key

    def share(self, key: Key, way: str | None = None) -> float:
        """How much of this step a sample takes that its method trains on, in the step's own way or in another."""
        name, own, _ = key
        parts = self.methods[name].parts.items()
        return sum(share for part, share in parts if self.same_cost((name, way or own, part)) == key)

    def totals(self, parts: dict[Key, list[float]]) -> dict[tuple[str, str], list[float]]:
        """Milliseconds/sample of each method and way in every round: the sum of its parts, weighed by their shares."""
        totals = {}
        for name, way in itertools.product(self.methods, WAYS):
            keys = {self.same_cost((name, way, part)): None for part in self.methods[name].parts}
            if any((name, way) == key[:2] for key in keys) and all(key in parts for key in keys):
                totals[name, way] = sum(np.multiply(self.share(key, way), parts[key]) for key in keys).tolist()
        return totals

    def tables(self, parts: dict[Key, list[float]]) -> bool:
        """`parts`: milliseconds/sample of each step in every round."""
        times = self.totals(parts)
        rows = [self.row(name, times) for name in self.methods]
        columns = {"published": "published way|.3g", "ours": "ours|.3g", "cached": "ours, cached|.3g"}
        columns |= {"paper": "paper, on its GPUs|.3g", "paper_over_sft": "paper / its SFT|.2f"}
        columns |= {key: heading for key, (*_, heading) in RATIOS.items()} | {"check": "same loss and norm to"}
        if peak_flops(self.trainer.device):
            columns |= {"ours_mfu": "MFU, ours|.1%", "cached_mfu": "MFU, cached|.1%"}
        title = f"seconds/sample, medians of {len(next(iter(parts.values())))}"
        orders = paper.order_notes(WAYS, times, [row["name"] for row in rows if row["same"]])
        self.report.table("methods", title, rows, columns, orders)
        spreads = []
        for key, values in parts.items():
            size = self.bytes.get(key)
            memory = {} if size is None else {"bytes": size, "gib": size / 2**30}
            spreads.append(spread(self.label(key), values, all_ms=values, share=self.share(key), **memory))
        title = "milliseconds a sample, or a response, and tensors held at once: weights to gradients"
        columns = TIME | {"share": "how many a sample|.2f", "gib": "GiB at most|.2f"}
        self.report.table("ways", title, spreads, columns)
        self.amortized([row for row in rows if "cached" in row])
        title = f"{self.scale.title}, {self.report.content['machine']['device']}"
        draw_bars(rows, WAYS | {"paper": "paper, on its GPUs"}, title, self.report)
        return all(row["same"] for row in rows)

    def row(self, name: str, times: dict[tuple[str, str], list[float]]) -> dict:
        """A method's seconds/sample, and their ratios; those of this run only where its sides agree."""
        difference = self.difference(name)
        same = difference <= self.tolerance
        row = {"name": name, "difference": difference, "same": same}
        row["check"] = f"{'' if same else 'FAILED '}{difference:.0e}"
        row |= {way: statistics.median(times[name, way]) / 1e3 for way in WAYS if (name, way) in times}
        row |= {"paper": paper.SECONDS[name], "paper_over_sft": paper.ratio(name)}
        for key, (over, method, under, _) in RATIOS.items():
            pair = (name, over), (method or name, under)
            if same and all(place in times for place in pair):
                each = zip(*(times[place] for place in pair), strict=True)
                row[key] = statistics.median(x / y for x, y in each)  # of rounds with one batch for all
        if not self.methods[name].is_on_policy:
            row |= {f"{way}_mfu": self.mfu(times, name, way) for way in ("ours", "cached")}
        return row

    def mfu(self, times: dict, name: str, way: str) -> float | None:
        """A step's floating-point operations over what the GPU could do in its time; the median over rounds."""
        peak = peak_flops(self.trainer.device)
        if peak is None or (name, way) not in times:
            return None
        taught, shares = self.methods[name].loss is not None, []
        cost = self.trainer.step_cost(way == "cached", "teacher")
        for turn, milliseconds in zip(self.turns[1:], times[name, way], strict=False):  # there may be fewer rounds
            flops = cost.flops(turn.samples, taught) + cost.flops(turn.text, taught=False)
            shares.append(flops / (1e-3 * milliseconds * self.batch_size * peak))
        return statistics.median(shares)

    def amortized(self, rows: list[dict]) -> None:
        """A table of the cache's cost, spread over the epochs that share it."""
        costs = [{"name": row["name"], "build": self.build_seconds} for row in rows]
        columns = {"build": "building the cache, once|.3g"}
        for epochs in EPOCHS:
            after, ratio = f"after_{epochs}", f"ratio_{epochs}"
            columns |= {after: f"step and build over {epochs} epochs|.3g", ratio: "published / this|.2f"}
            for row, cost in zip(rows, costs, strict=True):
                cost[after] = row["cached"] + self.build_seconds / epochs
                cost[ratio] = row["published"] / cost[after] if row["same"] else None
        if costs:
            self.report.table("cache", "seconds/sample, the teacher's cache included", costs, columns)

    def overhead(self) -> None:
        for name in (name for name, method in self.methods.items() if not method.is_on_policy):
            title = f"{name}, teacher's states cached" if METHODS[name].loss else name
            profiling.overhead(self.config(name, "auto"), title, self.report)

    def profile(self) -> None:
        """Tables of our steps' time, the mean over the rounds; the first batch is the warm-up."""
        self.build()
        steps = {key: step for key, step in self.steps().items() if key[1] != "published"}
        for step in steps.values():
            step(self.turns[0])
        traces, repeats = {key: [] for key in steps}, self.options.repeats
        for number, turn in enumerate(self.turns[1:], 1):
            print(f"round {number} of {repeats}", flush=True)
            for key, step in steps.items():
                traces[key].append(profiling.profile(functools.partial(step, turn), self.trainer.device))
        for key in steps:
            profiling.breakdown(traces[key], self.label(key), self.report)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser, add = scaled_parser(__doc__, "timing")
    add("--methods", choices=METHODS, nargs="+", default=list(METHODS), help="default: all; SFT, the yardstick, always")
    add("--minutes", type=float, default=60, help="no second round that would end later (default: %(default)s)")
    add("--pretrain", action="store_true", help="adds the papers' plain text to every step, on both sides")
    add("--profile", action="store_true", help="where the time of our steps goes, by kind of work; compares nothing")
    add("--overhead", action="store_true", help="the trainer's own share of its loop without generation; CPU only")
    options = parser.parse_args(arguments)
    if options.overhead and options.device != "cpu":
        parser.error("--overhead measures Python's clock, which a GPU's work doesn't show on: add --device cpu")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    what = "overhead" if options.overhead else "profile" if options.profile else "timing"
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(options, pathlib.Path(folder))
        with benchmark.report.kept(what):
            return int(getattr(benchmark, what)() is False)


if __name__ == "__main__":
    sys.exit(main())
