"""Distillation from Python: `distill`, a recipe whose models, tokenizer and rows may be objects."""

import contextlib
import dataclasses
import hashlib
import inspect
import itertools
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import datasets
import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import pipeline, processes
from .config.models import IN_MEMORY
from .config.recipe import load, merged
from .config.schema import Config
from .errors import ConfigError, reading
from .evaluation import points
from .files import TOKENIZERS, cache_folder, check_trusted, make_cache_folder
from .finished import read_summary
from .losses.divergences import Divergence
from .models.identity import NOT_THE_MODEL
from .output import forgiving
from .training.given import Given

EXAMPLES = {  # of the functions that a program may give
    "on_step": "lambda point: print(point)",
    "on_eval": "lambda point: print(point)",
    "on_checkpoint": "lambda folder: print(folder)",
    "optimizer": "lambda groups: torch.optim.AdamW(groups, lr=1e-4)",
    "scheduler": "lambda optimizer, steps: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)",
}
WAYS_OUT = {  # by the key of a recipe that is missing
    **dict.fromkeys(("run", "run.name"), 'give run={"name": …}'),
    **dict.fromkeys(("data", "data.train"), "give train_dataset"),
    "student": "give student: a model, a folder or a Hub name",
}
Path = str | os.PathLike
Rows = Path | datasets.Dataset | datasets.IterableDataset | Iterable[dict]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run has left. Of a recipe with stages it is that of the last stage, and `stages` has all by name."""

    final: pathlib.Path  # folder of the trained model, or of the answers of method generate
    summary: dict  # summary.json
    history: list[dict]  # the points of metrics.jsonl: "kind" is train or dev
    stages: dict[str, "Result"] = dataclasses.field(default_factory=dict, repr=False)


def distill(
    recipe: Path | Mapping | None = None,
    *,
    student: PreTrainedModel | Path | Mapping | None = None,
    teacher: PreTrainedModel | Path | Mapping | None = None,
    tokenizer: PreTrainedTokenizerBase | Path | None = None,
    train_dataset: Rows | None = None,
    eval_dataset: Rows | None = None,
    on_step: Callable[[dict], object] | None = None,
    on_eval: Callable[[dict], object] | None = None,
    on_checkpoint: Callable[[pathlib.Path], object] | None = None,
    optimizer: Callable[[list[dict]], Optimizer] | None = None,
    scheduler: Callable[[Optimizer, int], LRScheduler] | None = None,
    resume: bool = False,
    **values: object,
) -> Result:
    """Trains a student as `python -m abkd_fast.train` does, to the same bits.

    Args:
        recipe: a recipe's file or packaged name, or a mapping with its keys. May be left out: `values` then are all.
        student, teacher: a model, its folder or Hub name, or a mapping with the keys of this section of a recipe. A
            model is used, not copied, unless a teacher has another type than it is read in. The student is trained in
            place, in float32; with eval.select it ends with the last weights, and `final` has the best.
        tokenizer: an object, a folder or a Hub name (default: the one beside the student's weights).
        train_dataset, eval_dataset: rows in place of `data.train` and `data.dev`: a path or Hub name, a data set of the
            `datasets` library, also a streaming one, or mappings in any format of rows (docs/data.md).
        on_step: gets each point of the log, every `log.every_steps` steps: a mapping with step, loss, lr and others.
        on_eval: gets each measurement on the development rows: step, loss and, where the recipe asks for them, rouge_l
            and samples (a list of mappings with row, prompt, output, response and scores).
        on_checkpoint: gets the folder of each checkpoint once it is whole, which may be at the next save or evaluation.
            All three are called on rank 0. One that returns true ends the training after the present step; the result
            is then complete.
        optimizer: makes the optimizer from groups of parameters, or from some of them; the first group's decay. Of
            `optim` only weight_decay, clip_norm and the schedule may be given then. Its state must consist of tensors,
            numbers and text, for checkpoints: else the first step raises ConfigError.
        scheduler: makes the schedule of learning rates from the optimizer and the number of steps, in place of that
            in `optim`.
        resume: continues an interrupted run from its newest checkpoint, whose weights a student in memory gets: it
            may be another object, or the one that the interruption left as it was after its last step. Give all
            other objects as they were. The result of a finished run is returned, and the objects are left alone.
        values: other keys of a recipe, such as `method="kd"`, `optim={"lr": 1e-4}` or `run={"name": "mine"}`. They
            replace those of the recipe, as --set does.

    Raises ConfigError for values that can't be used, before any weights load; FloatingPointError for a loss that is not
    finite; Interrupted after a signal: call again with resume=True.
    """
    if not torch.is_grad_enabled():
        raise ConfigError("gradients are off: call distill outside of torch.no_grad() and torch.inference_mode()")
    functions = {"on_step": on_step, "on_eval": on_eval, "on_checkpoint": on_checkpoint}
    functions |= {"optimizer": optimizer, "scheduler": scheduler}
    functions = {name: function for name, function in functions.items() if function is not None}
    for name, function in functions.items():
        _check_function(name, function)
    recipe = {} if recipe is None else _plain(recipe)
    if not isinstance(recipe, str | dict):
        expected = "a file, a packaged name or a mapping"
        raise ConfigError(f"recipe is a {type(recipe).__name__}, expected {expected}", "recipe")
    roles = {"student": student, "teacher": teacher}
    models = {role: model for role, model in roles.items() if isinstance(model, PreTrainedModel)}
    if len(models) == 2 and student is teacher:
        raise ConfigError(
            "student and teacher are one model, which can't be trained and frozen: load it twice", "teacher"
        )
    beneath = merged(recipe) if models else {}
    if beneath.get("stages") is not None:
        problem = "a model in memory is for a recipe without stages"
        raise ConfigError(f"{next(iter(models))}: {problem}; save it, and give its folder", next(iter(models)))
    data_sets = {"train": ("train_dataset", train_dataset), "dev": ("eval_dataset", eval_dataset)}
    rows = {name: data for name, data in data_sets.values() if not isinstance(data, str | os.PathLike | None)}
    layer = _plain(values)
    for role, model in roles.items():
        if model is not None:
            layer[role] = _section(role, model)
    if tokenizer is not None:
        layer["tokenizer"] = _kept(tokenizer) if isinstance(tokenizer, PreTrainedTokenizerBase) else _plain(tokenizer)
    elif "student" in models and layer.get("tokenizer", beneath.get("tokenizer")) is None:
        layer["tokenizer"] = _name_of(models["student"])
    for key, (name, data) in data_sets.items():
        if data is not None:
            layer["data"] = {**_mapping("data", layer.get("data")), key: name if name in rows else _plain(data)}
    cleared = {role: {"config": None} for role in models}  # else the recipe's values would be mixed with these
    configs = _load(recipe, [cleared, layer])
    _check_read(configs, {*functions, *(["teacher"] if teacher is not None else [])})
    rows = {name: _in_memory(name, data, configs) for name, data in rows.items()}
    given = Given(models=models, rows=rows, **functions)
    before = [_restorer(model, role == "teacher") for role, model in models.items()]
    same = {config.run.stage or "recipe": config.to_dict() for config in configs} | {"resume": resume}
    try:
        with forgiving(), processes.process_group(configs[0].train.timeout_minutes, same):
            pipeline.run(configs, resume, given)
    finally:
        for restore in before:
            restore()
    results = [_result(config) for config in configs]
    stages = {config.run.stage: result for config, result in zip(configs, results, strict=True)}
    return dataclasses.replace(results[-1], stages={} if None in stages else stages)


def _check_function(name: str, function: object) -> None:
    """Raises ConfigError for what can't be called with the arguments that it gets."""
    way_out, parameters = f"for example {name}={EXAMPLES[name]}", EXAMPLES[name].partition(":")[0].split(",")
    if not callable(function):
        raise ConfigError(f"{name} is a {type(function).__name__}, expected a function; {way_out}", name)
    problem = None
    with contextlib.suppress(ValueError):  # some that are built in don't tell
        try:
            inspect.signature(function).bind(*parameters)
        except TypeError as error:
            problem = f"{name} takes other arguments ({error})"
    if problem:
        raise ConfigError(f"{problem}; {way_out}", name)


def _load(recipe: str | dict, layers: list[dict]) -> list[Config]:
    """The stages. An error says how a program gives what is missing."""
    try:
        return load(recipe, values=layers)
    except ConfigError as error:
        if error.key in WAYS_OUT and str(error).endswith(": missing"):
            raise ConfigError(f"{error}; {WAYS_OUT[error.key]}", error.key) from None
        raise


def _check_read(configs: list[Config], names: set[str]) -> None:
    """Raises ConfigError for an argument that no stage reads. names: of those that are given."""
    methods = ", ".join(dict.fromkeys(config.method for config in configs))
    unread = {} if any(config.is_taught for config in configs) else {"teacher": f"method {methods} has none"}
    if all(config.data.dev is None for config in configs):
        unread["on_eval"] = "nothing is evaluated; give eval_dataset"
    if all(config.method == "generate" for config in configs):
        unread |= dict.fromkeys(EXAMPLES, f"method {methods} trains nothing")
    for name in sorted(names & {*unread}):
        raise ConfigError(f"{name}: {unread[name]}, or leave {name} out", name)


def _restorer(model: PreTrainedModel, is_teacher: bool) -> Callable[[], None]:
    """What gives a model back its attention (that of packed rows can do nothing else), and a teacher its state."""
    attention, is_training = model.config._attn_implementation, model.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def restore() -> None:
        model.set_attn_implementation(attention)
        if is_teacher:
            model.train(is_training)
            for parameter in trained:
                parameter.requires_grad_(True)

    return restore


def _mapping(name: str, value: Any) -> dict:
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a mapping, got {str(value)[:60]}", name)
    return dict(value or {})


def _plain(value: Any) -> Any:
    """The value as JSON would have it: paths, types and divergences become text, tuples lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, Divergence):
        return str(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, np.generic):
        return value.item()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _section(role: str, model: PreTrainedModel | Path | Mapping) -> dict:
    """The section of a recipe for a model. Raises ConfigError for an object that can't be used as it is."""
    if isinstance(model, Mapping):
        return _plain(model)
    if isinstance(model, str | os.PathLike):
        return {"path": os.fspath(model), "config": None}
    way_out = "save it with save_pretrained, and give its folder"
    if hasattr(model, "peft_config"):  # also a model of transformers may have an adapter
        way_out = f'save it with save_pretrained, and give {role}={{"path": BASE, "adapter": FOLDER}}'
    if not isinstance(model, PreTrainedModel):
        expected = "a transformers model, a folder, a Hub name, or a mapping"
        raise ConfigError(f"{role} is a {type(model).__name__}, expected {expected}; {way_out}", role)
    if any(parameter.is_meta or parameter.is_inference() for parameter in model.parameters()):
        problem = "some weights are on the meta device, or were made under torch.inference_mode()"
        raise ConfigError(f"{role}: {problem}; load it with from_pretrained, outside of both", role)
    for problem, is_there in {
        "has quantized weights": getattr(model, "is_quantized", False),
        "has an adapter": getattr(model, "_hf_peft_config_loaded", False),
        "is spread over devices": len({*getattr(model, "hf_device_map", {}).values()}) > 1,
    }.items():
        if is_there:
            raise ConfigError(f"{role}: the model {problem}, which only works with a path; {way_out}", role)
    if role == "student" and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("student: none of its weights requires a gradient: nothing could be trained", role)
    config = json.loads(model.config.to_json_string(use_diff=False))
    config = {key: value for key, value in config.items() if key not in NOT_THE_MODEL}  # loading and saving change them
    return {"config": config | {"architectures": [type(model).__name__], IN_MEMORY: model.name_or_path}, "path": None}


def _name_of(student: PreTrainedModel) -> str:
    """Where the tokenizer of a model in memory is."""
    if not student.name_or_path:
        raise ConfigError("tokenizer: missing, and the student was not loaded from a folder that could have one")
    return student.name_or_path


def _kept(tokenizer: PreTrainedTokenizerBase) -> str:
    """A folder with the tokenizer, named by its content: a resumed run finds the same one."""
    if tokenizer.eos_token_id is None:
        raise ConfigError("tokenizer: has no end token (eos_token), which every response needs", "tokenizer")
    root = cache_folder() / TOKENIZERS
    with reading(f"{root} can't be made", "; ABKD_CACHE names another folder"):
        make_cache_folder(root)
    temporary, digest = pathlib.Path(tempfile.mkdtemp(dir=root)), hashlib.sha256()
    tokenizer.save_pretrained(temporary)
    for file in sorted(temporary.rglob("*")):
        if file.is_file():
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    folder = root / digest.hexdigest()[:32]
    try:
        temporary.rename(folder)  # whole or not at all: other processes do the same
    except OSError:  # it is there already
        shutil.rmtree(temporary)
    check_trusted(root.parent, root, folder, *folder.iterdir())
    return str(folder)


def _in_memory(name: str, data: Any, configs: list[Config]) -> Iterable[dict]:
    """Rows that can be read more than once. Of an iterator no more are taken than the recipe wants."""
    if isinstance(data, Mapping | bytes) and not isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise ConfigError(f"{name} is one {type(data).__name__}, expected rows: an iterable of mappings", name)
    if not isinstance(data, Iterable):
        expected = "a path, a data set of the datasets library, or an iterable of mappings"
        raise ConfigError(f"{name} is a {type(data).__name__}, expected {expected}", name)
    if not isinstance(data, Iterator):
        return data
    limits = [config.data.train_rows if name == "train_dataset" else config.data.dev_rows for config in configs]
    return [*itertools.islice(data, None if None in limits else max(limits))]


def _result(config: Config) -> Result:
    folder = config.run.folder
    history, _ = points.read_points(folder) if (folder / points.FILE).exists() else ([], 0)
    return Result(folder / "final", read_summary(folder), history)
