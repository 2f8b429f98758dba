"""Reading before any weights load: rows, models' configurations, tokenizers, tokenized data."""

import copy
import dataclasses
import json
from collections.abc import Callable

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from .. import distributed
from ..config.methods import WITHOUT_TEACHER
from ..config.models import ModelConfig
from ..config.schema import Config
from ..data import formats, pretrain
from ..data.chat import PromptFormat
from ..data.row_teachers import TeacherNames
from ..data.rows import DEV, TRAIN, Rows
from ..data.teacher_prompts import SeveralFormats, TeacherFormat
from ..data.tokenize import tokenize
from ..errors import ConfigError
from ..evaluation.test_sets import TestSet
from ..methods import METHODS
from ..methods.base import Method, OnPolicyMethod
from ..models import loading, quantized, tokenizers
from ..models.causal_lm import rope_border
from ..models.loading import MetaModel
from ..models.vocabularies import Vocabulary
from ..teacher.folder import StatesFolder
from ..teacher.store import lengths_of, table_of
from ..teacher.top_k import TopKTargets
from .dev_eval import DevEvaluator
from .given import NOTHING, Given

OF_TEACHERS = ("teacher", *formats.TEACHER)  # columns that dev rows need not have


@dataclasses.dataclass
class Prepared:
    """The inputs that the checks of a run have read. The run reads the others: an earlier stage may write them."""

    models: dict[str, MetaModel] = dataclasses.field(default_factory=dict)  # by role
    rows: dict[tuple, Rows] = dataclasses.field(default_factory=dict)  # by the arguments of `read_rows`
    test_sets: list[TestSet] | None = None
    given: Given = NOTHING

    def model(self, role: str, spec: ModelConfig) -> MetaModel:
        """A model's configuration and shapes. Raises ConfigError."""
        known = self.models.get(role)
        return known if known and known.spec == spec else loading.read_meta_model(spec, role)

    def take_rows(self, *arguments: object) -> Rows:
        """The rows. They are not kept any longer, because they may fill much memory. Raises ConfigError."""
        return self.rows.pop(arguments, None) or self.given.read_rows(*arguments)


@dataclasses.dataclass(frozen=True)
class TrainData:
    """The tokenized data of a run, and the steps that they make."""

    train_set: datasets.Dataset
    where: list[str]  # file and line of every training row
    dev: DevEvaluator | None
    pretrain_set: datasets.Dataset | None
    notes: list[str]  # for people: how the training rows become tokens, and which rows are cut or left out
    steps_per_epoch: int
    steps: int
    teachers: list[str | None]  # of several, the name of every training row's

    def place(self, index: int) -> str:
        """The file and line of a training sample."""
        return self.where[self.train_set[index]["row"]]


def train_rows(config: Config) -> tuple:
    """The arguments of `read_rows` for data.train. A method that writes all responses itself needs none in the data.

    Raises ConfigError for settings that don't fit the method, and for a data.columns that can't be meant.
    """
    outputs = "ignored"
    if config.method != "generate":
        outputs = "optional" if _writes_all_responses(config) else "required"
    names = TeacherNames() if config.method == "generate" else None  # its rows keep theirs
    if config.teachers and config.method not in WITHOUT_TEACHER:
        names = TeacherNames((*config.teachers,), tuple((config.data.teachers or {}).items()))
    return config.data.train, config.data.train_rows, TRAIN, outputs, *_reading(config), names


def train_format(config: Config) -> PromptFormat:
    """The format of data.train. A method that writes all responses itself answers the last turn of each row alone."""
    style = PromptFormat.from_config(config.data)
    is_answered = config.method != "generate" and _writes_all_responses(config)
    return dataclasses.replace(style, train_on="last") if is_answered else style


def teacher_format(config: Config, tokenizer: PreTrainedTokenizerBase) -> TeacherFormat | SeveralFormats | None:
    """How the teachers of a run read data.train; None for a method without one. Raises ConfigError."""
    if not config.is_taught:
        return None
    if config.teachers:
        keys = dict(zip(config.teachers, config.all_teachers, strict=True))
        return SeveralFormats({name: _format_of(config.of_teacher(key), key, tokenizer) for name, key in keys.items()})
    return _format_of(config, "teacher", tokenizer)


def _format_of(config: Config, key: str, tokenizer: PreTrainedTokenizerBase) -> TeacherFormat:
    """How the teacher of a configuration reads data.train. key: its own, for messages."""
    spec = config.teacher
    style, has_template = train_format(config), bool(spec.chat_template or spec.chat_template_kwargs is not None)
    if has_template:
        tokenizer = copy.deepcopy(tokenizer)  # the student's keeps its template
    if spec.chat_template_kwargs is not None:
        tokenizers.take_back_values(tokenizer, style)
        style = dataclasses.replace(style, chat_template_kwargs=spec.chat_template_kwargs)
    if spec.chat_template is not None:
        tokenizers.use_chat_template(tokenizer, spec.chat_template, f"{key}.chat_template", style)
    return TeacherFormat(tokenizer, style, spec.system, has_template, key)


def _writes_all_responses(config: Config) -> bool:
    return METHODS[config.method](config).off_policy_fraction == 0


def dev_rows(config: Config) -> tuple:
    """The arguments of `read_rows` for data.dev. Raises ConfigError for a data.columns that can't be meant."""
    outputs = "ignored" if config.method == "generate" else "required"
    return config.data.dev, config.data.dev_rows, DEV, outputs, *_reading(config, unread=OF_TEACHERS)


def _reading(config: Config, unread: tuple[str, ...] = ()) -> tuple:
    columns = config.data.columns
    if columns is not None:
        formats.check_columns(columns)
        columns = tuple((ours, theirs) for ours, theirs in columns.items() if ours not in unread)
    return columns, config.data.on_bad_row


def read_tokenizer(config: Config, *later: Config) -> PreTrainedTokenizerBase:
    """The tokenizer of a run: that of its key, or the student's, with the chat template and begin token of `data`.

    later: the stages after this one that take its tokenizer, each from the one before. Raises ConfigError.
    """
    source, key = (config.tokenizer, "tokenizer") if config.tokenizer else (config.student.path, "student.path")
    tokenizer = tokenizers.read_tokenizer(source, key)
    for data in (config.data, *(stage.data for stage in later)):
        style = PromptFormat.from_config(data)
        tokenizers.use_chat_template(tokenizer, data.chat_template, "data.chat_template", style)
        tokenizers.keep_begin_token(tokenizer, style)
        tokenizers.keep_chat_format(tokenizer, style)
    return tokenizer


def check_models(
    config: Config,
    student: MetaModel,
    teacher: MetaModel | None,
    tokenizer: PreTrainedTokenizerBase,
    key: str = "teacher",
) -> Vocabulary:
    """The tokens that the models share. key: the teacher's, for messages.

    Raises ConfigError unless these have what the chat template and the ends of responses need, and the models have room
    for the samples.
    """
    quantized.check_student(student.quantization, config.student)
    if is_sharded(config) and any(model and model.quantization for model in (student, teacher)):
        raise ConfigError("train.parallel is fsdp, but quantized weights can't be cut into parts; use ddp")
    for role, meta in (("student", student), ("teacher", teacher)):
        border = rope_border(meta.model) if meta and meta.form.problem and is_sharded(config) else None
        if border is not None and config.data.max_length > border:
            raise ConfigError(
                f"train.parallel is fsdp, but the {role} is padded, and its LongRoPE treats samples of more than "
                f"{border} tokens differently; use ddp, or lower data.max_length"
            )
    theirs = None
    if teacher and config.teacher.path is not None:
        theirs = tokenizers.read_tokenizer(config.teacher.path, f"{key}.path")
    elif teacher and config.teacher.hidden_states is not None:
        theirs = StatesFolder(config.teacher.hidden_states, f"{key}.hidden_states").vocabulary()
    models = {"student": student.config} | ({"teacher": teacher.config} if teacher else {})
    vocabulary = Vocabulary(tokenizer, {role: model.vocab_size for role, model in models.items()}, theirs)
    vocabulary.check_sizes()
    style = PromptFormat.from_config(config.data)
    vocabulary.check(tokenizers.end_tokens(config.student.path, tokenizer, style), "the end of responses")
    vocabulary.check(tokenizers.template_ids(tokenizer, style), "the chat template")
    for role, model in models.items():
        loading.check_length(model, role, config.data.max_length)
    return vocabulary


def is_sharded(config: Config) -> bool:
    """Whether each process holds a part of the weights."""
    return config.train.parallel == "fsdp" and distributed.world_size() > 1


def read_train_data(
    config: Config, method: Method, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, prepared: Prepared
) -> TrainData:
    """Reads and tokenizes the data of a run. Raises ConfigError where they don't fit the configuration."""
    data = config.data
    style, limits = PromptFormat.from_config(data), (data.max_length, data.max_prompt_length)
    rows = prepared.take_rows(*train_rows(config))
    reads = teacher_format(config, tokenizer)
    tokenized = tokenize(rows, tokenizer, *limits, train_format(config), data.on_bad_row, reads)
    train_set, where, teachers = tokenized.dataset, [row.where for row in rows], [row.teacher for row in rows]
    numbers = [row.number for row in rows]
    check_tokens(vocabulary, train_set, lambda index: where[train_set[index]["row"]])
    notes = [*rows.notes, tokenized.format, *tokenized.notes(rows, data.max_length)]
    if reads is None and (count := sum(any(key in row.values for key in formats.TEACHER) for row in rows)):
        notes.append(f"{count} rows have a prompt of the teacher's own, which method {config.method} does not read")
    templates = [
        key for key, spec in config.all_teachers.items() if spec.chat_template or spec.chat_template_kwargs is not None
    ]
    if reads is not None and templates and not any("messages" in row.values for row in rows):
        notes.append(f"{templates[0]} has a chat template of its own, but no row has messages that it could render")
    dev = None
    if data.dev is not None:
        rows = prepared.take_rows(*dev_rows(config))
        tokenized = tokenize(rows, tokenizer, *limits, style, data.on_bad_row)
        notes += [*rows.notes, *(f"data.dev: {note}" for note in tokenized.notes(rows, data.max_length))]
        dev_set, dev_where = tokenized.dataset, [row.where for row in rows]
        vocabulary.check_samples(dev_set, lambda index: dev_where[dev_set[index]["row"]])
        dev = DevEvaluator(config, rows, dev_set, tokenizer)
        notes += dev.notes
    if not tokenizers.keep_begin_token(tokenizer, style):
        begin = json.dumps(data.begin_token)
        notes.append(f"the tokenizer in final/ can't keep data.begin_token: give later commands --begin-token {begin}")
    steps_per_epoch = _steps_per_epoch(config, len(train_set))
    method.check_rows(len(train_set))
    if config.served_teacher:
        method.top_k = TopKTargets(config.served_teacher, train_set, where, vocabulary.sizes["student"], numbers)
    pretrain_set = None
    if data.uses_pretrain:
        pretrain_set, text = _read_pretrain_set(config, tokenizer), data.pretrain.path
        vocabulary.check_samples(pretrain_set, lambda index: f"data.pretrain: {text}: block {index}")
    steps = config.train.steps or config.train.epochs * steps_per_epoch
    return TrainData(train_set, where, dev, pretrain_set, notes, steps_per_epoch, steps, teachers)


def check_tokens(vocabulary: Vocabulary, train_set: datasets.Dataset, place: Callable[[int], str]) -> None:
    """Raises ConfigError for a training sample with a token that the models don't have in common."""
    for column in ("input_ids", "teacher_input_ids"):
        if column in train_set.column_names:
            vocabulary.check_samples(train_set, place, column)


def check_teacher_prompts(config: Config, method: Method, teacher: MetaModel, data: TrainData) -> None:
    """Raises ConfigError where prompts of the teacher's own don't suit the method, or are too long for the teacher."""
    train_set = data.train_set
    if "teacher_spans" not in train_set.column_names:
        return
    if "teacher" in getattr(method, "generators", ()):
        problem = f"method {config.method} draws tokens from a mixture of both models after one prompt"
        raise ConfigError(f"{problem}, but the teacher has prompts of its own; use imitkd, gkd or distillm")
    lengths = lengths_of(table_of(train_set, of_teacher=True)[0])
    if isinstance(method, OnPolicyMethod) and method.off_policy_fraction < 1:
        prompts, theirs = (np.array([spans[-2] for spans in train_set[key][:]]) for key in ("spans", "teacher_spans"))
        written = np.minimum(config.sampling.max_new_tokens, config.data.max_length - prompts)
        lengths = np.maximum(lengths, theirs + written)
    index, longest = int(lengths.argmax()), int(lengths.max())
    where, positions = data.where[train_set[index]["row"]], loading.max_positions(teacher.config)
    if positions is not None and longest > positions:
        problem = f"the teacher reads {longest} tokens with its own prompt, and has {positions} positions"
        raise ConfigError(f"{where}: {problem}; shorten that prompt, or lower data.max_length, which cuts responses")
    border = rope_border(teacher.model) if teacher.form.problem and is_sharded(config) else None
    if border is not None and longest > border:
        problem = f"the teacher reads {longest} tokens with its own prompt, and is padded; its LongRoPE treats samples"
        raise ConfigError(f"{where}: {problem} of more than {border} tokens differently; use train.parallel=ddp")


def _steps_per_epoch(config: Config, samples: int) -> int:
    """Raises ConfigError for a batch size that processes or data don't allow."""
    batch_size, ranks = config.train.batch_size, distributed.world_size()
    if batch_size < ranks:
        raise ConfigError(
            f"train.batch_size is {batch_size}, but there are {ranks} processes, each of which "
            "needs a sample in every step: raise it, or start fewer"
        )
    if is_sharded(config) and batch_size % ranks:
        raise ConfigError(
            f"train.batch_size is {batch_size}, but train.parallel=fsdp needs a multiple of the "
            f"{ranks} processes, which compute in step"
        )
    if samples < batch_size:
        raise ConfigError(f"{config.data.train}: {samples} rows are fewer than train.batch_size = {batch_size}")
    return samples // batch_size


def _read_pretrain_set(config: Config, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
    spec, length, batch_size = config.data.pretrain, config.data.max_length, config.train.batch_size
    blocks = pretrain.load_blocks(spec, tokenizer, length)
    if len(blocks) < batch_size:
        raise ConfigError(
            f"data.pretrain: {spec.path}: {len(blocks)} blocks of {length} tokens "
            f"are fewer than train.batch_size = {batch_size}"
        )
    return blocks
