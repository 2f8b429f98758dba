"""Finished runs, read from their folders."""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterable

from ..config.methods import WITHOUT_TEACHER
from ..errors import ConfigError
from .evaluator import SCORES, read_scores

# As the papers call the losses; a recipe's spelling up to the colon.
LOSSES = {
    "ab": "ABKD",
    "fkl": "FKLD",
    "rkl": "RKLD",
    "wsd": "WSD",
    "bdkd": "BDKD",
    "jsd": "JSD",
    "akl": "AKL",
    "tvd": "TVD",
    "sfkl": "SFKL",
    "srkl": "SRKL",
    "alphanet": "AlphaNet",
    "hellinger": "Hellinger",
    "alpha": "Alpha",
}


TEACHER = "Teacher"


WORD_LEVEL = ("ab", "kd")  # methods that differ by their loss alone


METHODS = {
    "sft": "SFT",
    "seqkd": "SeqKD",
    "imitkd": "ImitKD",
    "gkd": "GKD",
    "distillm": "DistiLLM",
    "minillm": "MiniLLM",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run, from its folder."""

    folder: pathlib.Path
    config: dict
    summary: dict
    points: list[dict]  # of metrics.jsonl
    sets: dict[str, dict]  # of eval/scores.json, by name; empty where it was not evaluated
    settings: dict  # likewise, of the answers
    label: str = ""  # "Teacher", or a method or loss

    @property
    def is_teacher(self) -> bool:
        return self.label.startswith(TEACHER)

    def begins_with(self, other: Run) -> bool:
        return _is_result(self.config["student"], other)

    def learns_from(self, other: Run) -> bool:
        """A teacher that the method does not need may be in the configuration, and does not count."""
        return self.config["method"] not in WITHOUT_TEACHER and _is_result(self.config["teacher"], other)

    def curve(self, kind: str, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of the points that have one."""
        pairs = [(p["step"], p[key]) for p in self.points if p["kind"] == kind and p.get(key) is not None]
        return [step for step, _ in pairs], [value for _, value in pairs]


def _is_result(model: dict | None, run: Run) -> bool:
    """Whether a model is the run's result (an adapter, where it has one), wherever the folder of all runs is now."""
    path = model and (model["adapter"] or model["path"])
    return path is not None and pathlib.Path(path).parts[-3:] == (run.folder.absolute() / "final").parts[-3:]


def read_runs(folders: Iterable[pathlib.Path]) -> list[Run]:
    """The runs of folders, each a run's or one of a recipe's stages; the teacher first.

    Raises ConfigError where there is none, or what it left can't be read.
    """
    found = []
    for folder in folders:
        runs = [folder] if _is_run(folder) else sorted(filter(_is_run, folder.glob("*")))
        if not runs:
            raise ConfigError(f"{folder}: no finished run there (config.json, summary.json), and none in its folders")
        found += [_read(run) for run in runs if run.resolve() not in [other.folder.resolve() for other in found]]
    found = sorted(found, key=lambda run: not any(other.learns_from(run) for other in found))
    return [dataclasses.replace(run, label=label) for run, label in zip(found, _labels(found), strict=True)]


def _is_run(folder: pathlib.Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "summary.json", "metrics.jsonl"))


def _read(folder: pathlib.Path) -> Run:
    from .tables import _report

    try:
        config, summary = (json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("config", "summary"))
        points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        path = folder / "eval" / SCORES
        scores = read_scores(path) if path.exists() else {"sets": {}, "settings": {}}
        run = Run(folder, config, summary, points, scores["sets"], scores["settings"])
        _label(run, []), _report(run), run.curve("train", "loss")  # where something is missing, it is missed here
        return run
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{folder}: the run can't be read ({reason})") from None


def _labels(runs: list[Run]) -> list[str]:
    """The papers' names; where several runs have one, with what tells them apart: the loss's numbers, then folders."""
    names = [_label(run, runs) for run in runs]
    numbers = [run.config["loss"].partition(":")[2] for run in runs]
    for details in (numbers, [run.folder.name for run in runs]):
        pairs = set(zip(names, details, strict=True))
        shared = collections.Counter(name for name, _ in pairs)
        names = [
            f"{name} ({detail})" if shared[name] > 1 and detail else name
            for name, detail in zip(names, details, strict=True)
        ]
    return names


def _label(run: Run, runs: list[Run]) -> str:
    if any(other.learns_from(run) for other in runs):
        return TEACHER
    if any(other.begins_with(run) for other in runs):
        return "Initial student"
    method, loss = run.config["method"], run.config["loss"].partition(":")[0]
    return LOSSES.get(loss, loss) if method in WORD_LEVEL else METHODS.get(method, method)
