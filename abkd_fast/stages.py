"""A recipe's stages: what they refer to, and the checks of all of them before the first one runs."""

import dataclasses
import functools
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from .config.models import ModelConfig, TeacherConfig
from .config.sampling import SamplingParams
from .config.schema import Config
from .data import pretrain
from .data.rows import Rows
from .device import choose_device, choose_dtype
from .errors import ConfigError, of_stage
from .evaluation.test_sets import Protocol, TestSet, read_sets
from .models import loading, quantized
from .teacher import top_k
from .training.given import NOTHING, Given
from .training.optim import check_optimizer
from .training.prepare import Prepared, dev_rows, read_tokenizer, train_rows
from .training.trackers import check_trackers

ReadRows = Callable[..., Rows]


def check_all(stages: list[Config], given: Given = NOTHING) -> list[Prepared]:
    """Checks every stage before the first one starts, and returns what was read. Raises ConfigError."""
    read = functools.cache(given.read_rows)  # stages mostly share their rows: each source is read once
    prepared = []
    for index, config in enumerate(stages):
        with of_stage(config.run.stage):
            prepared.append(_check(config, {other.run.stage: other for other in stages[:index]}, read, given))
    return prepared


def _check(config: Config, earlier: dict[str, Config], read: ReadRows, given: Given) -> Prepared:
    """Raises ConfigError for devices, models, references and rows that can't be used."""
    prepared = Prepared(given=given)
    choose_dtype(config.train.dtype, choose_device(config.train.device, "train."), "train.")
    if config.method != "generate":
        check_optimizer(config, given)
        check_trackers(config.log)
    for role, spec in models_of(config).items():
        if spec.path is None:
            loading.check_weights(spec, role, role in given.models)
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


def resolve(config: Config) -> Config:
    """The same configuration, with "stage:NAME" replaced by the folder of that stage's result."""
    resolved = {}
    for role, spec in models_of(config).items():
        folders = {key: str(config.run.root / name / "final") for key, name in spec.stages.items()}
        resolved[role] = dataclasses.replace(spec, **folders)
    if config.data.stage:
        rows = str(config.run.root / config.data.stage / "final")
        resolved["data"] = dataclasses.replace(config.data, train=rows)
    return replaced(config, resolved)


def as_begun(spec: ModelConfig, students: dict[str, ModelConfig]) -> ModelConfig:
    """The same model, with the result of a stage replaced by what that stage starts from. Shapes are the same."""
    begun = {key: students[name] for key, name in spec.stages.items()}
    if "path" in begun:
        spec = dataclasses.replace(spec, path=begun["path"].path, config=begun["path"].config)
    if "adapter" in begun:
        lora = None if isinstance(spec, TeacherConfig) else begun["adapter"].lora  # a teacher's adapter is merged
        spec = dataclasses.replace(spec, adapter=begun["adapter"].adapter, lora=lora)
    return spec


def models_of(config: Config) -> dict[str, ModelConfig]:
    """The models by role. A served teacher is none."""
    return {"student": config.student} | {key: spec for key, spec in config.all_teachers.items() if spec.top_k is None}


def replaced(config: Config, sections: dict) -> Config:
    """The configuration with other sections, also "teachers.NAME"."""
    teachers = {name: sections.pop(f"teachers.{name}", spec) for name, spec in (config.teachers or {}).items()}
    return dataclasses.replace(config, teachers=teachers or None, **sections)


def read_stage_tokenizer(config: Config, earlier: dict[str, Config]) -> PreTrainedTokenizerBase:
    """The tokenizer of a stage, also where the model that brings it is not trained yet. Raises ConfigError."""
    chain = _ancestry(config, earlier)
    first = next((place for place, stage in enumerate(chain) if stage.tokenizer), len(chain) - 1)
    return read_tokenizer(*reversed(chain[: first + 1]))


def _ancestry(config: Config, earlier: dict[str, Config]) -> list[Config]:
    """The stage, the one whose result is its student, and so on, to the first whose student is nobody's result."""
    chain = [config]
    while "path" in chain[-1].student.stages:
        chain.append(earlier[chain[-1].student.stages["path"]])
    return chain


def _read_test_sets(config: Config, earlier: dict[str, Config], read: ReadRows) -> list[TestSet]:
    """The test sets of a stage, tokenized. Raises ConfigError for those that its result could not answer."""
    tokenizer = read_stage_tokenizer(config, earlier)
    base = dataclasses.replace(_ancestry(config, earlier)[-1].student, adapter=None, lora=None)
    student = loading.read_meta_model(base, "student").config
    loading.check_length(student, "student", config.data.max_length)  # which prompts are cut to
    try:
        return read_sets(config.eval.sets, tokenizer, student, protocol(config), read=read)
    except ConfigError as error:
        raise ConfigError(f"eval.sets.{error}") from None


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
