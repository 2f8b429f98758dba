"""A recipe's stages, one after the other. A finished stage runs no more; "stage:NAME" is its result in later ones."""

import dataclasses
import functools
import gc
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator

import torch
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from . import distributed
from .config.methods import WITHOUT_TEACHER
from .config.models import ModelConfig, TeacherConfig
from .config.recipe import load
from .config.sampling import OPTIONS, SamplingParams
from .config.schema import Config
from .console import console
from .data import pretrain
from .data.rows import Row, Rows, read_rows
from .device import choose_device, choose_dtype
from .errors import ConfigError, check_number
from .evaluation import tables
from .evaluation.evaluator import Evaluation
from .evaluation.runs import read_runs
from .evaluation.test_sets import Protocol, TestSet, read_sets
from .files import LOCK, check_folder, leftovers
from .generation import answers
from .losses.divergences import AlphaNet, parse
from .models import loading, quantized
from .teacher import top_k
from .training.dry_run import describe
from .training.given import NOTHING, Given
from .training.prepare import Prepared, dev_rows, read_tokenizer, teacher_format, train_format, train_rows
from .training.show_rows import print_samples, shown_samples
from .training.trainer import Trainer

ReadRows = Callable[..., Rows]


def run(stages: list[Config], resume: bool = False, given: Given = NOTHING) -> list[dict]:
    """Runs the stages that are not finished and returns the summary of every stage.

    resume: continues a stage that was begun. Without it such a stage is an error.
    given: objects that stand for models and rows of the stages, and functions that training calls.

    Raises ConfigError before any training, and what `Trainer.train` raises.
    """
    prepared = _check_all(stages, given)
    stages = [resolve(config) for config in stages]
    for config in stages:
        distributed.run_on_rank0(_is_finished, config, resume)  # no stage trains before all folders are checked
    summaries = []
    for config in stages:
        inputs = prepared.pop(0)  # freed after its stage
        if distributed.run_on_rank0(_is_finished, config, resume):
            console.print(f"[bold]{config.run.folder}[/bold]  is finished already: its result is used")
            summary = _read_summary(config.run.folder)
        else:
            if config.method == "generate":  # a kind of stage, not a training method
                summary = answers.write_stage(config, _take_prompts(config, inputs))
            else:
                summary = Trainer(config, resume, inputs).train()
            console.print(f"saved {config.run.folder / 'final'}", markup=False)
            _free_memory()
        summaries.append(summary)
        if config.eval.sets and config.method != "generate":
            evaluation = _evaluate(config, inputs)
            _free_memory()
            if len(stages) == 1:
                console.print(evaluation.table())
    distributed.run_on_rank0(_conclude, stages, summaries)
    return summaries


def _take_prompts(config: Config, prepared: Prepared) -> list[Row]:
    return prepared.take_rows(*train_rows(config))


def _free_memory() -> None:
    """Frees a stage's weights. Compiled layers refer to themselves, so only the garbage collector finds them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _conclude(stages: list[Config], summaries: list[dict]) -> None:
    """Prints the tables of a recipe. Where results were scored it also says what distillation gained, and draws it."""
    if len(stages) > 1:
        console.print(_table(stages, summaries))
    trained = [config for config in stages if config.method != "generate"]
    if not any(config.eval.sets for config in trained):
        return
    runs = read_runs(config.run.folder for config in trained)
    if len(stages) > 1 and (scores := tables.score_table(runs)):
        console.print(scores.table())
    if sentence := tables.gain(runs):
        console.print(sentence, markup=False)
    root = stages[0].run.root
    try:
        tables.write_report(runs, root)
        console.print(f"tables and figures are in {root}, and in each stage's report.md", markup=False)
    except ConfigError as error:
        console.print(f"no figures: {error}", markup=False)


def _evaluate(config: Config, prepared: Prepared) -> Evaluation:
    """Scores a stage's result on its test sets. Scores that are there already stay."""
    evaluated, folder = config.eval, config.run.folder
    arguments = str(folder / "final"), prepared.test_sets, folder / "eval", evaluated.seeds, protocol(config)
    evaluation = Evaluation(*arguments, device=config.train.device, dtype=config.train.dtype)
    evaluation.run()
    return evaluation


def protocol(config: Config) -> Protocol:
    """How a result answers test sets: the papers' protocol with the recipe's changes."""
    evaluated, data = config.eval, config.data
    return Protocol(
        sampling=SamplingParams.from_options(evaluated),
        max_prompt_length=min(256, data.max_length - 1),
        begin_token=data.begin_token if evaluated.begin_token is None else evaluated.begin_token,
        chat_template_kwargs=data.chat_template_kwargs,
        rouge_tokens=evaluated.rouge_tokens,
    )


def plan(stages: list[Config], resume: bool = False) -> None:
    """Prints what `run` would do. Loads no weights, writes no run folder. Raises ConfigError as `run` does."""
    students: dict[str, ModelConfig] = {}  # by stage
    prompts: dict[str, str] = {}  # by stage, the rows that it answers
    for config, known in zip(stages, _check_all(stages), strict=True):
        specs = {role: as_begun(spec, students) for role, spec in _models(config).items()}
        students[config.run.stage], prompts[config.run.stage] = specs["student"], config.data.train
        console.print(f"[bold]{config.run.folder}[/bold]")
        if _is_finished(resolve(config), resume):
            console.print("  is finished already: its result would be used")
            continue
        if config.data.stage:
            console.print(f"  {config.data.train} is not written yet: these are the rows whose prompts it answers")
            specs["data"] = dataclasses.replace(config.data, train=prompts[config.data.stage])
        if config.method == "generate":
            lines = answers.describe(config, _take_prompts(config, known))
        else:
            lines = describe(Trainer(_replaced(config, specs), resume, known))
        for line in lines:
            console.print(line, markup=False)


def show_rows(stages: list[Config], count: int) -> None:
    """Prints the first rows of each stage's training data as its model sees them. Loads no weights.

    Stages that see the same print it once. What was read, and what not, goes to stderr. Raises ConfigError.
    """
    check_number("show-rows", count, 1)
    samples, notes, earlier = [], {}, {}
    for config in stages:
        earlier[config.run.stage] = config
        tokenizer = _read_tokenizer(config, earlier)
        data = resolve(config).data
        if config.data.stage and not pathlib.Path(data.train).exists():
            continue  # nothing is written yet
        source, limit, *others = train_rows(dataclasses.replace(config, data=data))
        rows = read_rows(source, min(count, limit or count), *others)
        notes |= dict.fromkeys(rows.notes)
        samples += shown_samples(rows, tokenizer, data, train_format(config), teacher_format(config, tokenizer))
    for note in notes:
        print(note, file=sys.stderr)
    print_samples(samples)


def as_begun(spec: ModelConfig, students: dict[str, ModelConfig]) -> ModelConfig:
    """The same model, with the result of a stage replaced by what that stage starts from. Shapes are the same."""
    begun = {key: students[name] for key, name in spec.stages.items()}
    if "path" in begun:
        spec = dataclasses.replace(spec, path=begun["path"].path, config=begun["path"].config)
    if "adapter" in begun:
        lora = None if isinstance(spec, TeacherConfig) else begun["adapter"].lora  # a teacher's adapter is merged
        spec = dataclasses.replace(spec, adapter=begun["adapter"].adapter, lora=lora)
    return spec


def _check_all(stages: list[Config], given: Given = NOTHING) -> list[Prepared]:
    """Checks every stage before the first one starts, and returns what was read. Raises ConfigError."""
    read = functools.cache(given.read_rows)  # stages mostly share their rows: each source is read once
    return [
        _check(config, {other.run.stage: other for other in stages[:index]}, read, given)
        for index, config in enumerate(stages)
    ]


def _check(config: Config, earlier: dict[str, Config], read: ReadRows, given: Given) -> Prepared:
    """Raises ConfigError for devices, models, references and rows that can't be used."""
    prepared = Prepared(given=given)
    choose_dtype(config.train.dtype, choose_device(config.train.device, "train."), "train.")
    for role, spec in _models(config).items():
        if spec.has_adapter and spec.path is None:
            raise ConfigError(
                f"{role}: an adapter needs the same weights every time, config gives random ones: use path"
            )
        for key, name in spec.stages.items():
            _check_reference(f"{role}.{key}: stage:{name}", key, name, spec, earlier)
        if "path" not in spec.stages:
            spec = dataclasses.replace(spec, adapter=None) if "adapter" in spec.stages else spec
            prepared.models[role] = loading.read_meta_model(spec, role)
            if role == "student" and config.method != "generate":
                quantized.check_student(prepared.models[role].quantization, config.student)
    _check_rows(config, earlier, prepared, read)
    if config.eval.sets and config.method != "generate":
        prepared.test_sets = _read_test_sets(config, earlier, read)
    if config.data.uses_pretrain:
        pretrain.check_source(config.data.pretrain.path)
    if config.served_teacher:
        top_k.check_file(config.served_teacher)
    return prepared


def _check_rows(config: Config, earlier: dict[str, Config], prepared: Prepared, read: ReadRows) -> None:
    data = config.data
    if data.stage:
        where = f"data.train: {data.train}"
        _check_earlier(where, data.stage, earlier)
        if earlier[data.stage].method != "generate":
            raise ConfigError(f'{where} trains a model, and writes no rows: only method "generate" does')
        if config.teachers and config.is_taught and not data.teachers:  # they keep the teacher of their prompt
            for row in read(*train_rows(earlier[data.stage])):
                if row.teacher not in config.teachers:
                    names = ", ".join(config.teachers)
                    raise ConfigError(f'{where}: {row.where}: has no "teacher" that is one of {names}')
    for key, arguments in (("train", train_rows(config)), ("dev", dev_rows(config))):
        if getattr(data, key) is not None and (key == "dev" or not data.stage):
            try:
                prepared.rows[arguments] = read(*arguments)
            except ConfigError as error:
                raise ConfigError(f"data.{key}: {error}") from None


def _ancestry(config: Config, earlier: dict[str, Config]) -> list[Config]:
    """The stage, the one whose result is its student, and so on, to the first whose student is nobody's result."""
    chain = [config]
    while "path" in chain[-1].student.stages:
        chain.append(earlier[chain[-1].student.stages["path"]])
    return chain


def _read_tokenizer(config: Config, earlier: dict[str, Config]) -> PreTrainedTokenizerBase:
    """The tokenizer of a stage, also where the model that brings it is not trained yet. Raises ConfigError."""
    chain = _ancestry(config, earlier)
    first = next((place for place, stage in enumerate(chain) if stage.tokenizer), len(chain) - 1)
    return read_tokenizer(*reversed(chain[: first + 1]))


def _read_test_sets(config: Config, earlier: dict[str, Config], read: ReadRows) -> list[TestSet]:
    """The test sets of a stage, tokenized. Raises ConfigError for those that its result could not answer."""
    tokenizer = _read_tokenizer(config, earlier)
    base = dataclasses.replace(_ancestry(config, earlier)[-1].student, adapter=None, lora=None)
    student = loading.read_meta_model(base, "student").config
    loading.check_length(student, "student", config.data.max_length)  # which prompts are cut to
    try:
        return read_sets(config.eval.sets, tokenizer, student, protocol(config), read=read)
    except ConfigError as error:
        raise ConfigError(f"eval.sets.{error}") from None


def _check_reference(where: str, key: str, name: str, spec: ModelConfig, earlier: dict[str, Config]) -> None:
    """Raises ConfigError unless the stage exists and leaves what the key needs: a model, or an adapter of it."""
    _check_earlier(where, name, earlier)
    result = earlier[name].student
    if earlier[name].method == "generate":
        raise ConfigError(f"{where} writes rows, not a model: give it as data.train")
    if key == "path" and result.has_adapter:
        raise ConfigError(f"{where} is a LoRA adapter: give it as adapter, and its base {result.path} as path")
    if key == "adapter" and not result.has_adapter:
        raise ConfigError(f"{where} is a whole model, not an adapter: give it as path")
    if key == "adapter" and result.path != spec.path:
        raise ConfigError(f"{where} is an adapter of {result.path}, but path is {spec.path}: give them one base")


def _check_earlier(where: str, name: str, earlier: dict[str, Config]) -> None:
    if name not in earlier:
        raise ConfigError(f"{where}: no such stage before this one; earlier stages: {', '.join(earlier) or 'none'}")


def _models(config: Config) -> dict[str, ModelConfig]:
    """The models by role. A served teacher is none."""
    return {"student": config.student} | {key: spec for key, spec in config.all_teachers.items() if spec.top_k is None}


def _replaced(config: Config, sections: dict) -> Config:
    """The configuration with other sections, also "teachers.NAME"."""
    teachers = {name: sections.pop(f"teachers.{name}", spec) for name, spec in (config.teachers or {}).items()}
    return dataclasses.replace(config, teachers=teachers or None, **sections)


def resolve(config: Config) -> Config:
    """The same configuration, with "stage:NAME" replaced by the folder of that stage's result."""
    resolved = {}
    for role, spec in _models(config).items():
        folders = {key: str(config.run.root / name / "final") for key, name in spec.stages.items()}
        resolved[role] = dataclasses.replace(spec, **folders)
    if config.data.stage:
        rows = str(config.run.root / config.data.stage / "final")
        resolved["data"] = dataclasses.replace(config.data, train=rows)
    return _replaced(config, resolved)


def _is_finished(config: Config, resume: bool) -> bool:
    """Whether this run has its result. Raises ConfigError where its folder can't be used, or needs --resume."""
    folder = config.run.folder
    if not folder.exists():
        return False
    if not (folder / "config.json").exists():
        is_begun = folder.is_dir() and {*folder.iterdir()} <= {folder / LOCK, *leftovers(folder, "config.json.")}
        check_folder(folder, resume and is_begun)
        return False
    finished = (folder / "final").exists()
    if finished and not resume and not config.run.stage:
        check_folder(folder)
    if not finished and not resume:
        raise ConfigError(f"{folder} exists, but was not finished: add --resume, or choose another run.name")
    then = _read_config(folder / "config.json")
    changed = "; ".join(_differences(_deciding(then.to_dict()), _deciding(config.to_dict())))
    if changed:
        way_out = "choose another run.name" if finished else "undo that to resume it, or choose another run.name"
        raise ConfigError(f"{folder} is the result of another configuration ({changed}): {way_out}")
    return finished


def _read_config(path: pathlib.Path) -> Config:
    """The configuration of a run. A value that an earlier version left out is what it meant then, not today's default.

    It trained the last turn alone, without a begin token, and AlphaNet decided per micro-batch.
    """
    (then,) = load(str(path))
    given = json.loads(path.read_text(encoding="utf-8-sig"))["data"]
    meant = {"train_on": "last", "begin_token": False}
    left_out = {key: value for key, value in meant.items() if key not in given}
    loss = parse(then.loss)
    if isinstance(loss, AlphaNet) and then.loss.count(",") < 2:
        loss = dataclasses.replace(loss, per="batch")
    return dataclasses.replace(then, loss=str(loss), data=dataclasses.replace(then.data, **left_out))


def _read_summary(folder: pathlib.Path) -> dict:
    path = folder / "summary.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read ({error}): move {folder} aside to run it again") from None


def _deciding(values: dict) -> dict:
    """The values that a run's weights depend on. Paths within the folder of the runs become relative."""
    root = pathlib.Path(values["run"].pop("dir"), values["run"]["name"])
    models = [values["student"], values["teacher"] or {}, *(values["teachers"] or {}).values()]
    for section, key in [*itertools.product(models, ("path", "adapter")), (values["data"], "train")]:
        path = section.get(key)
        if path is not None and pathlib.Path(path).is_relative_to(root):
            section[key] = str(pathlib.Path(path).relative_to(root))
    test_sampling = {*OPTIONS} - {"max_new_tokens"}  # responses to dev rows follow none of these
    for section, key in (
        *(("train", key) for key in ("on_nonfinite", "gradient_checkpointing", "parallel", "timeout_minutes")),
        *(("eval", key) for key in ("sets", "seeds", "begin_token", *test_sampling)),
    ):
        values[section].pop(key, None)
    exact = {"dtype": values["cache"]["dtype"]}
    return {key: value for key, value in values.items() if key not in ("log", "checkpoint")} | {"cache": exact}


def _differences(then: dict, now: dict, prefix: str = "") -> Iterator[str]:
    for key in sorted({*then, *now}):
        old, new = then.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} was {json.dumps(old)}, is {json.dumps(new)}"


def _table(stages: list[Config], summaries: list[dict]) -> Table:
    """A row for every stage: its losses and its seconds per sample (per answer, where it generates)."""
    table = Table("stage", "method", "loss", "dev loss before", "dev loss", "s/sample")
    losses_of = {"generate": "-"} | dict.fromkeys(WITHOUT_TEACHER, "cross-entropy")
    for config, summary in zip(stages, summaries, strict=True):
        losses = ["-" if summary[key] is None else f"{summary[key]:.4f}" for key in ("dev_loss_before", "dev_loss")]
        loss = losses_of.get(config.method, config.loss)
        table.add_row(config.run.stage, config.method, loss, *losses, f"{summary['seconds_per_sample']:.4f}")
    return table
