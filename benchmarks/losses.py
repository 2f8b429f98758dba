"""Every loss of the papers' Table 2 under one budget: `python benchmarks/losses.py --config RECIPE --stage STAGE`.

STAGE is the recipe's stage that distills; the stages it refers to (teacher, initial student) are trained first, once.
Then every loss gets the same initial student, rows, steps and settings, no plain-text term, and the learning rate of
--rates that was best on the development rows, in runs with --search-seeds. Each is trained with every one of --seeds,
and each result answers the test sets of the recipe's eval.sets with eval.seeds. A cell is the mean over training seeds,
and in brackets their standard deviation; of teacher and initial student, one model each, the deviation is over the
answers' seeds. What is finished already is used again.
"""

from __future__ import annotations

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

from abkd_fast import pipeline
from abkd_fast.config.recipe import load
from abkd_fast.config.schema import Config
from abkd_fast.errors import ConfigError, Interrupted
from abkd_fast.evaluation.evaluator import Evaluation
from abkd_fast.evaluation.figures import rouge_curves
from abkd_fast.evaluation.runs import read_runs
from abkd_fast.losses.divergences import BY_NAME
from harness import Report

SFT = "sft"
TABLE_2 = (SFT, "fkl", "rkl", "wsd:0.5", "bdkd", "jsd:0.1", "akl:0.5", "alphanet:0.2,0.9", "ab:0.2,0.7")


def train(config: Config) -> dict[str, Any]:
    """The summary of a run, which is trained if it isn't yet."""
    with _quiet(config.run.root):
        (summary,) = pipeline.run([config], resume=True)
    return summary


def try_rate(config: Config) -> dict[str, Any] | None:
    """The summary of a run, None where its loss did not stay finite."""
    try:
        return train(config)
    except FloatingPointError:
        return None


def evaluate(model: str, out: pathlib.Path, template: Config, rows: int | None) -> dict[str, dict]:
    """The scores of a model on the template's test sets, by their names."""
    settings = template.eval
    places = {"device": template.train.device, "dtype": template.train.dtype, "tokenizer": template.tokenizer}
    with _quiet(out):
        arguments = model, settings.sets, out, settings.seeds, pipeline.protocol(template)
        return Evaluation(*arguments, rows=rows, **places).run()["sets"]


def train_and_evaluate(config: Config, template: Config, rows: int | None) -> tuple[dict[str, Any], dict[str, dict]]:
    summary = train(config)
    return summary, evaluate(str(config.run.folder / "final"), config.run.folder / "eval", template, rows)


@contextlib.contextmanager
def _quiet(folder: pathlib.Path) -> Iterator[None]:
    """What a run prints goes to a file: several run at a time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        yield


def label(loss: str) -> str:
    name, _, numbers = loss.partition(":")
    if loss == SFT:
        return "SFT"
    return f"{BY_NAME[name].title} ({numbers})" if numbers else BY_NAME[name].title


class Study:
    def __init__(self, options: argparse.Namespace) -> None:
        """Raises ConfigError for what can't be compared."""
        self.options, self.out = options, options.out
        configs = {
            config.run.stage: config for config in load(options.config, [f"run.dir={options.out}", *options.overrides])
        }
        if options.stage not in configs:
            raise ConfigError(f"stage: {options.config} has no {options.stage}, only {', '.join(map(str, configs))}")
        self.earlier = [
            dataclasses.replace(config, eval=dataclasses.replace(config.eval, sets=None))
            for config in _needed(configs[options.stage], configs)
        ]
        template = pipeline.resolve(configs[options.stage])
        self.template = dataclasses.replace(template, data=dataclasses.replace(template.data, pretrain=None))
        self.models = {"Teacher": self.template.teacher, "Initial student": self.template.student}
        self.rates = options.rates or [factor * self.template.optim.lr for factor in (0.5, 1.0, 2.0)]
        self._check()
        self.report = Report(torch.device("cuda" if torch.cuda.is_available() else "cpu"), vars(options))

    def _check(self) -> None:
        settings = self.template.eval
        if not settings.sets:
            raise ConfigError('eval.sets: missing; name the test sets: --set eval.sets=\'{"dolly": "FILE"}\'')
        if self.options.select == "rouge_l" and len(self.rates) > 1 and settings.rouge_rows is None:
            raise ConfigError("eval.rouge_rows: missing, and rates are chosen by it; give it, or --select dev_loss")
        if shared := {*self.options.seeds} & {*self.options.search_seeds}:
            raise ConfigError(f"seeds: {min(shared)} is one of the search, too: its luck would be counted twice")
        for name, spec in self.models.items():
            if spec is None or spec.path is None or spec.has_adapter:
                raise ConfigError(f"{name.lower()}: expected the path of a whole model, which can be evaluated")

    def config(self, kind: str, loss: str, rate: float, seed: int, steps: int | None, name: str) -> Config:
        """Of one run: the template's, but for these."""
        template = self.template
        answers = {"rouge_rows": None} if kind == "search" and self.options.select == "dev_loss" else {}
        method = {"method": SFT} if loss == SFT else {"method": "ab", "loss": loss}
        return dataclasses.replace(
            template,
            **method,
            run=dataclasses.replace(
                template.run, dir=str(self.out / kind), name=f"{loss.replace(':', '-')}-{name}", stage=None, seed=seed
            ),
            optim=dataclasses.replace(template.optim, lr=rate, min_lr=min(rate, template.optim.min_lr)),
            train=dataclasses.replace(template.train, steps=steps or template.train.steps),
            eval=dataclasses.replace(template.eval, sets=None, **answers),
        )

    def run(self) -> None:
        if self.earlier:
            pipeline.run(self.earlier, resume=True)
        # Read where a worker loads its libraries; this process has loaded them.
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.options.jobs))
        context = multiprocessing.get_context("spawn")
        self.pool = concurrent.futures.ProcessPoolExecutor(self.options.jobs, mp_context=context)
        try:
            rates = self.search()
            bounds = self.bounds()
            results = self.final(rates)
        finally:
            self.pool.shutdown()
        self.tabulate(rates, bounds, results)
        self.draw(rates)

    def _map(self, work: Callable, jobs: dict[Any, tuple], say: Callable[[Any, Any], str]) -> dict[Any, Any]:
        """The results of `work` on each job's arguments; says a line when one is there."""
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
        if len(self.rates) == 1:
            return dict.fromkeys(self.options.losses, self.rates[0])
        key = "dev_rouge_l" if self.options.select == "rouge_l" else "dev_loss"
        sign = 1 if key == "dev_rouge_l" else -1
        jobs = {
            (loss, rate, seed): (
                self.config("search", loss, rate, seed, self.options.search_steps, f"{rate:g}-seed{seed}"),
            )
            for loss in self.options.losses
            for rate in self.rates
            for seed in self.options.search_seeds
        }

        def value(summary: dict | None) -> float:
            return -sign * math.inf if summary is None else summary[key]

        found = self._map(
            try_rate, jobs, lambda job, summary: f"{job[0]} at {job[1]:g}, seed {job[2]}: {key} {value(summary):.3f}"
        )
        rows, chosen = [], {}
        for loss in self.options.losses:
            values = {
                rate: statistics.fmean(value(found[loss, rate, seed]) for seed in self.options.search_seeds)
                for rate in self.rates
            }
            chosen[loss] = max(values, key=lambda rate: sign * values[rate])
            rows.append({"name": label(loss), **{str(rate): value for rate, value in values.items()}})
        form = ".2f" if key == "dev_rouge_l" else ".4f"
        columns = {"name": ("loss", "")} | {str(rate): (f"{rate:g}", form) for rate in self.rates}
        what = "ROUGE-L" if key == "dev_rouge_l" else "cross-entropy"
        seeds = f"mean of {len(self.options.search_seeds)} seeds"
        self.report.table(
            "search", f"learning rates: {what} on development rows at the end of a run, {seeds}", rows, columns
        )
        return chosen

    def bounds(self) -> dict[str, dict[str, dict]]:
        """The scores of teacher and initial student."""
        jobs = {
            name: (spec.path, self.out / "eval" / name, self.template, self.options.rows)
            for name, spec in self.models.items()
        }
        return self._map(evaluate, jobs, lambda name, sets: f"{name}: {_scores(sets)}")

    def final(self, rates: dict[str, float]) -> dict[tuple[str, int], tuple[dict, dict]]:
        """Summary and scores of every loss and training seed."""
        jobs = {
            (loss, seed): (self._final(loss, rates[loss], seed), self.template, self.options.rows)
            for seed in self.options.seeds
            for loss in self.options.losses
        }
        return self._map(train_and_evaluate, jobs, lambda job, found: f"{job[0]}, seed {job[1]}: {_scores(found[1])}")

    def _final(self, loss: str, rate: float, seed: int) -> Config:
        return self.config("runs", loss, rate, seed, None, f"{rate:g}-seed{seed}")

    def tabulate(self, rates: dict[str, float], bounds: dict[str, dict], results: dict[tuple, tuple]) -> None:
        names = list(next(iter(bounds.values())))
        averaged = [*names, "Average"] if len(names) > 1 else names
        rows = []
        for name, sets in bounds.items():
            cells = {column: list(values) for column, values in _by_seed(sets, names, averaged).items()}
            rows.append({"name": name, **{column: _cell(values) for column, values in cells.items()}})
        means = {}
        for loss in self.options.losses:
            runs = [results[loss, seed] for seed in self.options.seeds]
            cells = [_by_seed(sets, names, averaged) for _, sets in runs]
            cells = {column: [statistics.fmean(cell[column]) for cell in cells] for column in averaged}
            means[loss] = cells[averaged[-1]]
            row = {"name": label(loss), "rate": rates[loss]} | {
                column: _cell(values) for column, values in cells.items()
            }
            for key in ("dev_loss", "dev_rouge_l"):
                if runs[0][0][key] is not None:
                    row[key] = statistics.fmean(summary[key] for summary, _ in runs)
            rows.append(row | {"runs": means[loss]})
        columns = {"name": ("loss", ""), "rate": ("rate", "g"), "dev_loss": ("dev loss", ".3f")}
        columns |= {"dev_rouge_l": ("dev\nROUGE-L", ".1f")} | {name: (name, "") for name in averaged}
        seeds = f"{len(self.options.seeds)} training seeds x {len(self.template.eval.seeds)} seeds of the answers"
        self.report.table("losses", f"ROUGE-L on test sets: {seeds}", rows, columns)
        self._compare(means, averaged[-1])
        size = self.template.train.batch_size
        seconds = sum(summary["seconds_per_sample"] * summary["steps"] * size for summary, _ in results.values())
        self.report.note(f"these {len(results)} runs trained for {seconds:.0f} s in all, {self.options.jobs} at a time")

    def _compare(self, means: dict[str, list[float]], column: str) -> None:
        """Who leads, and how far the others are behind: in standard errors of a difference, from the spread over
        training seeds of all losses together."""
        first, *others = sorted(means, key=lambda loss: -statistics.fmean(means[loss]))
        count = len(means[first])
        spread = math.sqrt(statistics.fmean(map(statistics.variance, means.values()))) if count > 1 else 0.0
        error = spread * math.sqrt(2 / count)
        behind = []
        for loss in others:
            gap = statistics.fmean(means[first]) - statistics.fmean(means[loss])
            behind.append(f"{label(loss)} {gap:.2f}" + (f" ({gap / error:.1f})" if error else ""))
        freedom = len(means) * (count - 1)
        measure = (
            f" (in standard errors of a difference, {error:.2f} from {freedom} degrees of freedom)" if error else ""
        )
        self.report.note(f"{column}: {label(first)} leads; behind it{measure}: {', '.join(behind) or 'nobody'}")

    def draw(self, rates: dict[str, float]) -> None:
        """Figure 1, of the first training seed."""
        seed = self.options.seeds[0]
        runs = read_runs(self._final(loss, rates[loss], seed).run.folder for loss in self.options.losses)
        rouge_curves(runs, self.out / "rouge_l")


def _needed(config: Config, configs: dict[str, Config]) -> list[Config]:
    """The stages whose results this one begins with, in order."""
    specs = [spec for spec in (config.student, config.teacher) if spec is not None]
    names = {name for spec in specs for name in spec.stages.values()} | {config.data.stage} - {None}
    needed = names.union(*({other.run.stage for other in _needed(configs[name], configs)} for name in names))
    return [other for name, other in configs.items() if name in needed]


def _scores(sets: dict[str, dict]) -> str:
    return ", ".join(f"{name} {scores['rouge_l']['mean']:.2f}" for name, scores in sets.items())


def _by_seed(sets: dict[str, dict], names: list[str], columns: list[str]) -> dict[str, list[float]]:
    """ROUGE-L of each column, the sets and their average, for each of the answers' seeds."""
    values = {name: list(sets[name]["rouge_l"]["seeds"].values()) for name in names}
    averages = [statistics.fmean(scores) for scores in zip(*values.values(), strict=True)]
    return values | ({"Average": averages} if "Average" in columns else {})


def _cell(values: list[float]) -> str:
    deviation = f" ({statistics.stdev(values):.2f})" if values[1:] else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def _end(number: int, frame: types.FrameType | None) -> None:
    """A signal to this process alone ends the runs at work, too, once they are saved."""
    for worker in multiprocessing.active_children():
        worker.terminate()
    raise SystemExit(128 + number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = pathlib.Path(__file__).parent / "results" / "losses"
    parser.add_argument("--config", default="quickstart", metavar="RECIPE", help="default: %(default)s")
    parser.add_argument("--stage", default="student-ab", help="the one that distills (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="as in train")
    parser.add_argument("--losses", nargs="+", default=TABLE_2, metavar="LOSS", help="default: Table 2's")
    parser.add_argument("--rates", nargs="+", type=float, help="of the search (default: 1/2, 1, 2 times the recipe's)")
    parser.add_argument(
        "--select", choices=("rouge_l", "dev_loss"), default="rouge_l", help="which rate is best (default: %(default)s)"
    )
    parser.add_argument("--search-seeds", nargs="+", type=int, default=[10], help="of the search (default: 10)")
    parser.add_argument("--search-steps", type=int, help="of the search's runs (default: the recipe's)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of training (default: 1 2 3)")
    parser.add_argument("--rows", type=int, help="only the first ones of each test set")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--out", type=pathlib.Path, default=results, help="folder (default: %(default)s)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, _end)
    try:
        study = Study(options)
        try:
            study.run()
        finally:  # what was found before a failure is kept
            study.report.save(options.out / "losses.json")
    except (ConfigError, Interrupted) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
