"""Finished runs, read from their folders."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterable

from ..config.methods import WITHOUT_TEACHER
from ..console import console
from ..errors import ConfigError
from ..files import check_path_length, entries, read_json
from ..losses.divergences import BY_NAME
from . import points, rouge
from .evaluator import SCORES, read_scores

TEACHER = "Teacher"
WORD_LEVEL = ("ab", "kd")  # methods that differ by their loss alone
METHODS = {  # the papers' names of the others
    "sft": "SFT",
    "seqkd": "SeqKD",
    "imitkd": "ImitKD",
    "gkd": "GKD",
    "distillm": "DistiLLM",
    "minillm": "MiniLLM",
}
MODEL = {"path": (str, None), "adapter": (str, None), "lora": (dict, None), "config?": ({"in_memory?": str}, None)}
SHAPES = {  # of a run's files, by their names: what a report reads
    "config": {
        "method": str,
        "loss": str,
        "train": {"batch_size": int},
        "student": MODEL,
        "teacher": (MODEL, None),
        "teachers?": ({"*": MODEL}, None),
        "run?": {"dir?": str, "name?": str, "seed?": int, "stage?": (str, None)},
        "eval?": {"rouge_tokens?": str},
    },
    "summary": {
        **dict.fromkeys(("steps", "selected_step", "seconds_per_sample", "peak_memory_bytes"), float),
        **dict.fromkeys(("dev_loss_before", "dev_loss", "dev_rouge_l_before", "dev_rouge_l"), (float, None)),
    },
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run, as its folder has it."""

    folder: pathlib.Path
    config: dict
    summary: dict
    points: list[dict]  # the lines of metrics.jsonl
    sets: dict[str, dict]  # of eval/scores.json, by name; empty without an evaluation
    settings: dict  # how the sets were answered; from eval/scores.json, too
    title: str = ""  # "Teacher", or the papers' name of a method or loss
    label: str = ""  # the title, and what tells runs of one title apart

    @property
    def is_teacher(self) -> bool:
        return self.title == TEACHER

    @property
    def seed(self) -> int | None:
        """The training seed. None where the configuration does not say it."""
        return self.config.get("run", {}).get("seed")

    @property
    def teachers(self) -> dict[str, dict]:
        """The teachers in its configuration, by their keys."""
        if several := self.config.get("teachers"):
            return {f"teachers.{name}": model for name, model in several.items()}
        return {} if self.config["teacher"] is None else {"teacher": self.config["teacher"]}

    @property
    def besides_seed(self) -> str:
        """The configuration without seed and place, as JSON. Paths of the recipe's other stages are relative."""
        config = {key: value for key, value in self.config.items() if key != "run"}
        own = {"dir": "", "name": "", **self.config.get("run", {})}
        return json.dumps(_relative(config, pathlib.Path(own["dir"], own["name"])), sort_keys=True)

    @property
    def columns(self) -> dict[str, dict]:
        """The scores of its sets, by the name of their column in tables."""
        return {rouge.named(name, self.settings["rouge_tokens"]): scores for name, scores in self.sets.items()}

    @property
    def dev_rouge(self) -> str:
        """ROUGE-L on dev rows, named."""
        return rouge.named("ROUGE-L", self.config.get("eval", {}).get("rouge_tokens", "words"))

    @property
    def start(self) -> list:
        """The path, adapter and LoRA settings that the student starts from."""
        return [self.config["student"][key] for key in ("path", "adapter", "lora")]

    def begins_with(self, other: "Run") -> bool:
        """Whether the student starts as the other run's result."""
        return is_result(self.config["student"], other)

    def learns_from(self, other: "Run") -> bool:
        """Whether the other run's result is the teacher. A teacher that the method doesn't use does not count."""
        uses_teacher = self.config["method"] not in WITHOUT_TEACHER
        return uses_teacher and any(is_result(model, other) for model in self.teachers.values())

    def curve(self, kind: str, key: str) -> tuple[list[int], list[float]]:
        """The steps and values of the points of a kind ("train", "dev") that have this value."""
        pairs = [(p["step"], p[key]) for p in self.points if p["kind"] == kind and p.get(key) is not None]
        return [step for step, _ in pairs], [value for _, value in pairs]


def _relative(value: object, root: pathlib.Path) -> object:
    """JSON values in which paths within the folder are relative to it."""
    if isinstance(value, dict):
        return {key: _relative(inner, root) for key, inner in value.items()}
    is_within = isinstance(value, str) and root.parts and root in pathlib.Path(value).parents
    return str(pathlib.Path(value).relative_to(root)) if is_within else value


def is_result(model: dict | None, run: Run) -> bool:
    """Whether a model, or its adapter, is the run's result. The folder of all runs may have moved since."""
    path = model and (model["adapter"] or model["path"])
    return path is not None and pathlib.Path(path).parts[-3:] == (run.folder.absolute() / "final").parts[-3:]


def read_runs(folders: Iterable[pathlib.Path]) -> list[Run]:
    """Reads finished runs, the teacher first. Each folder is a run's, or holds those of a recipe's stages.

    Raises ConfigError for a folder without a finished run, and for a run that can't be read.
    """
    found = []
    for folder in folders:
        check_path_length("run", folder)
        runs = [folder] if _is_run(folder) else [*filter(_is_run, entries(folder))]
        if not runs:
            raise ConfigError(f"{folder}: no finished run there (config.json, summary.json), and none in its folders")
        found += [_read(run) for run in runs if run.resolve() not in [other.folder.resolve() for other in found]]
    found = sorted(found, key=lambda run: not any(other.learns_from(run) for other in found))
    titled = [dataclasses.replace(run, title=_title(run, found)) for run in found]
    groups = replicates(titled)
    labels = {run.folder: label for group, label in zip(groups, _labels(groups), strict=True) for run in group}
    return [dataclasses.replace(run, label=labels[run.folder]) for run in titled]


def replicates(runs: Iterable[Run]) -> list[list[Run]]:
    """Groups runs that differ in nothing but their training seed. A run without such others is a group of its own.

    Runs with the same seed, too, are no replicates: counted twice, one result would make the spread too small.
    """
    alike = collections.defaultdict(list)
    for run in runs:
        alike[run.title, run.besides_seed].append(run)
    groups = []
    for group in alike.values():
        seeds = {run.seed for run in group} - {None}
        groups += [group] if len(seeds) == len(group) else [[run] for run in group]
    return groups


def _is_run(folder: pathlib.Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "summary.json", points.FILE))


def _read(folder: pathlib.Path) -> Run:
    config, summary = (read_json(folder / f"{name}.json", shape=shape) for name, shape in SHAPES.items())
    for key in ("dev_loss", "dev_rouge_l"):
        if (summary[key] is None) != (summary[f"{key}_before"] is None):
            raise ConfigError(f"{folder / 'summary.json'} can't be read ({key} without {key}_before, or the other way)")
    found, damaged = points.read_points(folder)
    if damaged:
        console.print(f"{folder / points.FILE}: {damaged} damaged lines are left out")
    path = folder / "eval" / SCORES
    scores = read_scores(path) if path.exists() else {"sets": {}, "settings": {}}
    return Run(folder, config, summary, found, scores["sets"], scores["settings"])


def _labels(groups: list[list[Run]]) -> list[str]:
    """A label for each group: the papers' names.

    Groups of one name also get the numbers of their losses; if that is not enough, folders.
    """
    names = [group[0].title for group in groups]
    numbers = [group[0].config["loss"].partition(":")[2] for group in groups]
    for details in (numbers, [_folders(group) for group in groups]):
        pairs = set(zip(names, details, strict=True))
        shared = collections.Counter(name for name, _ in pairs)
        names = [
            f"{name} ({detail})" if shared[name] > 1 and detail else name
            for name, detail in zip(names, details, strict=True)
        ]
    return names


def _folders(group: list[Run]) -> str:
    return group[0].folder.name + (f" and {len(group) - 1} more" if len(group) > 1 else "")


def _title(run: Run, runs: list[Run]) -> str:
    if any(other.learns_from(run) for other in runs):
        return TEACHER
    if any(other.begins_with(run) for other in runs):
        return "Initial student"
    method, loss = run.config["method"], run.config["loss"].partition(":")[0]
    if method not in WORD_LEVEL:
        return METHODS.get(method, method)
    return BY_NAME[loss].title if loss in BY_NAME else loss
