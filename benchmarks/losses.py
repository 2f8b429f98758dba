"""Every loss of the papers' Table 2 under one budget: `python benchmarks/losses.py --config RECIPE --stage STAGE`.

STAGE distills; the stages that it refers to are trained first, once. docs/results.md describes the study.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import itertools
import math
import multiprocessing
import os
import pathlib
import signal
import statistics
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

import harness
from abkd_fast import pipeline, stages
from abkd_fast.config.methods import WITHOUT_TEACHER, OnPolicyConfig
from abkd_fast.config.recipe import load
from abkd_fast.config.schema import Config
from abkd_fast.errors import ConfigError, Interrupted
from abkd_fast.evaluation.evaluator import Evaluation
from abkd_fast.evaluation.figures import rouge_curves
from abkd_fast.evaluation.runs import METHODS, read_runs
from abkd_fast.losses.divergences import BY_NAME, parse
from harness import Report
from ranking import ahead_of, paper_means, rank_correlation

SFT = "sft"
TABLE_2 = (SFT, "fkl", "rkl", "wsd:0.5", "bdkd", "jsd:0.1", "akl:0.5", "alphanet:0.2,0.9,batch", "ab:0.2,0.7")


@contextlib.contextmanager
def _log(folder: pathlib.Path) -> Iterator[None]:
    """Sends what a run prints to a file, since several run at a time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        yield


def train(config: Config) -> dict[str, Any]:
    """The summary of a run, which is trained if it isn't yet."""
    with _log(config.run.root):
        return pipeline.run([config], resume=True)[0]


def search_value(config: Config, key: str, worst: float) -> float:
    """A value of a run's summary; the worst there is if its loss did not stay finite."""
    with contextlib.suppress(FloatingPointError):
        return train(config)[key]
    return worst


def evaluate(model: str, out: pathlib.Path, template: Config, rows: int | None) -> dict[str, dict]:
    """The scores of a model on the template's test sets, by their names."""
    places = {"device": template.train.device, "dtype": template.train.dtype, "tokenizer": template.tokenizer}
    with _log(out):
        arguments = model, template.eval.sets, out, template.eval.seeds, stages.protocol(template)
        return Evaluation(*arguments, rows=rows, **places).run()["sets"]


def train_and_evaluate(config: Config, template: Config, rows: int | None) -> tuple[dict[str, Any], dict[str, dict]]:
    summary = train(config)
    return summary, evaluate(str(config.run.folder / "final"), config.run.folder / "eval", template, rows)


def split(loss: str) -> tuple[str, str | None]:
    """Method and loss of an entry of --losses: "sft", "LOSS" (method ab) or "METHOD/LOSS"."""
    method, slash, name = loss.rpartition("/")
    return (SFT, None) if loss == SFT else (method if slash else "ab", name)


def title(loss: str) -> str:
    method, name = split(loss)
    return METHODS[method] if method in METHODS else BY_NAME[name.partition(":")[0]].title


def label(loss: str) -> str:
    numbers = split(loss)[1] if "/" in loss else loss.partition(":")[2]
    return f"{title(loss)} ({numbers})" if numbers else title(loss)


def replace(config: Config, **sections: dict) -> Config:
    """The configuration with other values in some of its sections."""
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **changed)


class Study:
    def __init__(self, options: argparse.Namespace) -> None:
        """Raises ConfigError for what can't be compared."""
        self.options, self.out = options, options.out
        loaded = load(options.config, [f"run.dir={options.out}", *options.overrides])
        configs = {config.run.stage: config for config in loaded}
        if options.stage not in configs:
            raise ConfigError(f"stage: {options.config} has no {options.stage}, only {', '.join(map(str, configs))}")
        self.earlier = [replace(config, eval={"sets": None}) for config in _needed(configs[options.stage], configs)]
        self.template = template = replace(stages.resolve(configs[options.stage]), data={"pretrain": None})
        self.models = {"Teacher": template.teacher, "Initial student": template.student}
        self.rates = options.rates or [factor * template.optim.lr for factor in (0.5, 1.0, 2.0)]
        if not template.eval.sets:
            raise ConfigError('eval.sets: missing; name the test sets: --set eval.sets=\'{"dolly": "FILE"}\'')
        if options.select == "rouge_l" and len(self.rates) > 1 and template.eval.rouge_rows is None:
            raise ConfigError("eval.rouge_rows: missing, and rates are chosen by it; give it, or --select dev_loss")
        if len(self.rates) > 1 and (both := {*options.search_seeds} & {*options.seeds}):
            problem = f"{min(both)} is one of the search, too: its luck would be counted twice"
            raise ConfigError(f"seeds: {problem}; give others, or other --search-seeds")
        for name, spec in self.models.items():
            if spec is None or spec.path is None:
                raise ConfigError(f"{name.lower()}: expected the path of a model, which can be evaluated")
        self._check_entries()
        self.report = Report(torch.device("cuda" if torch.cuda.is_available() else "cpu"), vars(options))

    def _check_entries(self) -> None:
        """Raises ConfigError for an unknown loss or method, and for what is given twice and would count twice."""
        seeds, search_seeds = self.options.seeds, self.options.search_seeds
        losses = []
        for loss in self.options.losses:
            config = self.config("runs", loss, self.rates[0], seeds[0])
            if config.method in WITHOUT_TEACHER and loss != SFT:
                raise ConfigError(f"losses: {loss}: {config.method} learns from no teacher, so it has no loss")
            losses.append((config.method, str(parse(config.loss))))
        given = {"losses": losses, "rates": self.rates, "seeds": seeds, "search-seeds": search_seeds}
        if twice := next((key for key, values in given.items() if len({*values}) < len(values)), None):
            raise ConfigError(f"{twice}: one is given twice, and would count twice; give each once")

    def config(self, kind: str, loss: str, rate: float, seed: int) -> Config:
        """The configuration of one run. `kind`: "search" or "runs"."""
        optim, answers, steps = self.template.optim, {"sets": None}, self.template.train.steps
        if kind == "search":
            steps = self.options.search_steps or steps
            answers |= {"rouge_rows": None} if self.options.select == "dev_loss" else {}
        folder = f"{loss.replace(':', '-').replace('/', '-')}-{rate:g}-seed{seed}"
        run = {"dir": str(self.out / kind), "stage": None, "seed": seed, "name": folder}
        rates = {"lr": rate, "min_lr": min(rate, optim.min_lr)}
        config = replace(self.template, run=run, optim=rates, train={"steps": steps}, eval=answers)
        method, name = split(loss)
        on_policy = config.on_policy if method == config.method else OnPolicyConfig()
        return dataclasses.replace(config, method=method, loss=name or config.loss, on_policy=on_policy)

    def run(self) -> None:
        if self.earlier:
            pipeline.run(self.earlier, resume=True)
        # A worker reads this when it loads its libraries; this process has loaded them.
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.options.jobs))
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(self.options.jobs, mp_context=context) as self.pool:
            rates, rest = self.search(), (self.template, self.options.rows)
            models = {name: spec.adapter or spec.path for name, spec in self.models.items()}
            jobs = {name: (model, self.out / "eval" / name, *rest) for name, model in models.items()}
            bounds = self._map(evaluate, jobs, lambda name, sets: f"{name}: {_scores(sets)}")
            jobs = {}
            for seed, loss in itertools.product(self.options.seeds, self.options.losses):
                jobs[loss, seed] = self.config("runs", loss, rates[loss], seed), *rest
            text = "{}, seed {}: {}"
            results = self._map(train_and_evaluate, jobs, lambda run, got: text.format(*run, _scores(got[1])))
        self.tabulate(rates, bounds, results)
        places = itertools.product(self.options.losses, self.options.seeds)
        runs = read_runs(self.config("runs", loss, rates[loss], seed).run.folder for loss, seed in places)
        rouge_curves(runs, self.out / "rouge_l")  # Figure 1

    def _map(self, work: Callable, jobs: dict[Any, tuple], say: Callable[[Any, Any], str]) -> dict[Any, Any]:
        """The results of `work` on each job's arguments; prints a line for each."""
        started = time.perf_counter()
        waiting, running, results = iter(jobs.items()), {}, {}
        while len(results) < len(jobs):
            # No more than there are workers: what waits in the pool's own queue would be run even after a signal.
            for key, arguments in itertools.islice(waiting, self.options.jobs - len(running)):
                running[self.pool.submit(work, *arguments)] = key
            finished, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in finished:
                key = running.pop(future)
                results[key] = future.result()
                text = f"{len(results)} of {len(jobs)}: {say(key, results[key])}"
                print(f"{time.perf_counter() - started:6.0f} s  {text}", flush=True)
        return {key: results[key] for key in jobs}

    def search(self) -> dict[str, float]:
        """The learning rate of each loss."""
        losses, by_rouge = self.options.losses, self.options.select == "rouge_l"
        if len(self.rates) == 1:
            return dict.fromkeys(losses, self.rates[0])
        key, best, worst = ("dev_rouge_l", max, -math.inf) if by_rouge else ("dev_loss", min, math.inf)
        seeds = self.options.search_seeds
        places = itertools.product(losses, self.rates, seeds)
        jobs = {place: (self.config("search", *place), key, worst) for place in places}
        text = "{} at {:g}, seed {}: {} {:.3f}"
        found = self._map(search_value, jobs, lambda job, value: text.format(*job, key, value))
        rows, chosen = [], {}
        for loss in losses:
            means = {rate: statistics.fmean(found[loss, rate, seed] for seed in seeds) for rate in self.rates}
            chosen[loss] = best(means, key=means.get)
            rows.append({"name": label(loss)} | {str(rate): mean for rate, mean in means.items()})
        what, form = ("ROUGE-L", ".2f") if by_rouge else ("cross-entropy", ".4f")
        heading = f"learning rates: {what} on development rows at the end of a run, seeds {' '.join(map(str, seeds))}"
        columns = {"name": "loss"} | {str(rate): f"{rate:g}|{form}" for rate in self.rates}
        self.report.table("search", heading, rows, columns)
        return chosen

    def tabulate(self, rates: dict[str, float], bounds: dict[str, dict], results: dict[tuple, tuple]) -> None:
        """`bounds` are the scores of teacher and initial student, `results` summary and scores by loss and seed."""
        rows, means = [], {}
        for name, sets in bounds.items():
            rows.append({"name": name} | {column: _cell(values) for column, values in _by_seed(sets).items()})
        for loss in self.options.losses:
            summaries, sets = zip(*(results[loss, seed] for seed in self.options.seeds), strict=True)
            cells = [{column: statistics.fmean(values) for column, values in _by_seed(one).items()} for one in sets]
            means[loss] = {column: [cell[column] for cell in cells] for column in cells[0]}
            row = {"name": label(loss), "rate": rates[loss]}
            row |= {column: _cell(values) for column, values in means[loss].items()}
            for key in ("dev_loss", "dev_rouge_l"):
                if summaries[0][key] is not None:
                    row[key] = statistics.fmean(summary[key] for summary in summaries)
            rows.append(row | {"runs": means[loss]})
        columns = {"name": "loss", "rate": "rate|g", "dev_loss": "dev loss|.3f", "dev_rouge_l": "dev ROUGE-L|.1f"}
        seeds = f"{len(self.options.seeds)} training seeds x {len(self.template.eval.seeds)} seeds of the answers"
        columns |= {name: name for name in cells[0]}
        self.report.table("losses", f"ROUGE-L on test sets: {seeds}", rows, columns)
        self.beside_paper(means)
        self.is_first(means)
        size = self.template.train.batch_size
        seconds = sum(summary["seconds_per_sample"] * summary["steps"] * size for summary, _ in results.values())
        self.report.note(f"these {len(results)} runs trained for {seconds:.0f} s in all, {self.options.jobs} at a time")

    def beside_paper(self, means: dict[str, dict[str, list[float]]]) -> None:
        """The paper's means and ours, on the sets in common, or on all if none is; and how far the orders agree.

        `means` are ours by loss and column, for each training seed.
        """
        paper = paper_means(self.options.paper, {loss: title(loss) for loss in means})
        if len(paper) < 3:
            return
        if self.template.eval.rouge_tokens != "words":
            self.report.note("not set beside the paper, whose ROUGE-L is of words: eval.rouge_tokens")
            return
        ours = {loss: {name: statistics.fmean(values) for name, values in means[loss].items()} for loss in paper}
        *_, last = columns = [*next(iter(ours.values()))]
        theirs = [*next(iter(paper.values()))]
        shared = [name for name in theirs if name in columns]
        for row in paper.values():
            row[last] = statistics.fmean(row[name] for name in shared or theirs)
        rows = [{"name": label(loss), "ours": ours[loss][last], "paper": paper[loss][last]} for loss in paper]
        for key in ("ours", "paper"):
            for rank, row in enumerate(sorted(rows, key=lambda row: -row[key]), 1):
                row[f"{key}_rank"] = rank
        columns = {"name": "loss", "ours": "ours|.2f", "ours_rank": "rank", "paper": "paper|.2f", "paper_rank": "rank"}
        heading = f"{last}, and the paper's average on {', '.join(shared or theirs)} ({self.options.paper})"
        self.report.table("paper", heading, rows, columns)
        for name in dict.fromkeys([*shared, last]):
            pair = ([row[name] for row in side.values()] for side in (ours, paper))
            self.report.note(f"{name}: {rank_correlation(*pair)}")

    def is_first(self, means: dict[str, dict[str, list[float]]]) -> None:
        """Whether ABKD is ahead of every other loss, by a paired test over the training seeds.

        The p value of "ahead of all" is the largest of those of the single losses (an intersection-union test).
        """
        first = next((loss for loss in means if title(loss) == "ABKD"), None)
        if first is None or all(title(loss) == "ABKD" for loss in means):
            return
        *_, last = means[first]
        others = [loss for loss in means if title(loss) != "ABKD"]
        rows = [{"name": label(loss)} | ahead_of(means[first][last], means[loss][last]) for loss in others]
        count = len(means[first][last])
        columns = {"name": "loss", "gap": f"{label(first)} is ahead by|+.2f", "wins": f"seeds of {count}", "p": "p|.2g"}
        self.report.table("first", f"{last}: {label(first)} against each other loss, seed by seed", rows, columns)
        if count > 1:
            worst = max(rows, key=lambda row: row["p"])
            self.report.note(f'"{label(first)} is first": p = {worst["p"]:.2g}, that against {worst["name"]}')


def _needed(config: Config, configs: dict[str, Config]) -> list[Config]:
    """The stages whose results this one begins with, in order."""
    specs = [spec for spec in (config.student, config.teacher) if spec is not None]
    names = {name for spec in specs for name in spec.stages.values()} | {config.data.stage} - {None}
    needed = names.union(*({other.run.stage for other in _needed(configs[name], configs)} for name in names))
    return [other for name, other in configs.items() if name in needed]


def _scores(sets: dict[str, dict]) -> str:
    return ", ".join(f"{name} {scores['rouge_l']['mean']:.2f}" for name, scores in sets.items())


def _by_seed(sets: dict[str, dict]) -> dict[str, list[float]]:
    """ROUGE-L of the sets, and last of their average if there are several, for each of the answers' seeds."""
    values = {name: list(scores["rouge_l"]["seeds"].values()) for name, scores in sets.items()}
    averages = [statistics.fmean(scores) for scores in zip(*values.values(), strict=True)]
    return values | ({"Average": averages} if len(values) > 1 else {})


def _cell(values: list[float]) -> str:
    return f"{statistics.fmean(values):.2f}" + (f" ({statistics.stdev(values):.2f})" if values[1:] else "")


def _end(number: int, frame: types.FrameType | None) -> None:
    """A signal to this process alone ends the runs at work, too, once they are saved."""
    for worker in multiprocessing.active_children():
        worker.terminate()
    raise SystemExit(128 + number)


def main() -> None:
    parser, add = harness.parser(__doc__, "losses", repeats=0)
    add("--config", default="quickstart", metavar="RECIPE", help="default: %(default)s")
    add("--stage", default="student-ab", help="the one that distills (default: %(default)s)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="as in train")
    add("--losses", nargs="+", default=TABLE_2, metavar="LOSS", help="LOSS or METHOD/LOSS, default: Table 2's")
    add("--rates", nargs="+", type=float, help="learning rates to search (default: 1/2, 1, 2 times the recipe's)")
    add("--select", choices=("rouge_l", "dev_loss"), default="rouge_l", help="decides which rate is best")
    add("--search-steps", type=int, help="steps of the search's runs (default: the recipe's)")
    add("--search-seeds", nargs="+", type=int, default=[10, 11, 12], help="its seeds (default: 10 11 12)")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], help="seeds of training (default: 1 2 3)")
    add("--paper", choices=("table2", "table3"), default="table2", help="whose order ours is compared with")
    add("--rows", type=int, help="answers only the first rows of each test set")
    add("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)
    try:
        study = Study(options)
        with study.report.kept("losses"):
            study.run()
    except (ConfigError, FloatingPointError, Interrupted) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
