"""The configuration of a run: all keys of a recipe, as frozen dataclasses that check their own values."""

import dataclasses
import json
import pathlib
from typing import Annotated, Literal

from ..errors import ConfigError, check_number, nearest, reading
from ..files import check_path_length
from ..losses.divergences import parse
from .methods import METHODS, WITH_SERVED_TEACHER, WITHOUT_TEACHER, MiniLLMConfig, OnPolicyConfig
from .models import ModelConfig, TeacherConfig, check_several
from .sampling import SamplingKeys
from .section import Section
from .training import CheckpointConfig, EvalConfig, LogConfig, OptimConfig, TrainConfig


def check_repository(key: str, name: str) -> None:
    """Raises ConfigError, which names the key, for what can't be the name of a repository of the Hub."""
    from huggingface_hub.utils import validate_repo_id  # most runs don't wait for it

    with reading(f"{key}: expected a repository of the Hub, USER/NAME", key=key):
        validate_repo_id(name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """Where results go. The folder of a run is DIR/NAME, or DIR/NAME/STAGE for a stage of a recipe."""

    name: Annotated[str, "name of the run"]
    stage: Annotated[str | None, "name of the stage; recipes with stages set it"] = None
    dir: Annotated[str, "folder that holds all runs"] = "runs"
    seed: Annotated[int, "seeds weights, dropout and the order of the data", 0, 2**32 - 1] = 10
    save_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None,
        "type of the weights in final/: auto (that of the student's base), float32, bfloat16 or float16 (null: the one "
        "they are trained in)",
    ] = None
    push_to_hub: Annotated[
        str | None, "repository of the Hugging Face Hub, USER/NAME, that gets final/ with a model card (docs/hub.md)"
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.push_to_hub is not None:
            check_repository("push_to_hub", self.push_to_hub)
        names = {"name": self.name, "stage": self.name if self.stage is None else self.stage}
        for key, name in names.items():  # with any other name the run would end up elsewhere
            good = name == pathlib.PurePath(name).name and name.strip(". ") and name.isprintable() and ":" not in name
            if not good or len(name.encode()) > 200:
                raise ConfigError(f'{key} is "{name[:60]}", expected the name of a folder, without "/" or ":"', key)
        check_path_length("dir", self.folder, is_written=True)

    @property
    def root(self) -> pathlib.Path:
        return pathlib.Path(self.dir) / self.name

    @property
    def folder(self) -> pathlib.Path:
        return self.root / (self.stage or "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(Section):
    """Plain text. Every step adds its language-modeling loss, one block for each sample, as the papers do."""

    path: Annotated[str, "JSONL file with 'text', .txt file, the papers' .bin and .idx files, or a folder of these"]
    weight: Annotated[float, "factor of its mean cross-entropy; 0: the text is not read", 0] = 1.0
    rows: Annotated[int | None, "use only so many documents (items of binary files), the first ones", 1] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Rows in any common format, or the papers' .bin and .idx files (docs/data.md); --show-rows shows some."""

    train: Annotated[
        str,
        "training rows: a file (JSONL, JSON, CSV, Parquet, .bin), a folder, or a Hub name, also as NAME:CONFIG:SPLIT; "
        '"quickstart:train" means generated tasks, "stage:NAME" the responses of an earlier stage with method generate',
    ]
    dev: Annotated[str | None, "rows for evaluation during training"] = None
    train_rows: Annotated[int | None, "use only so many rows, the first ones", 1] = None
    dev_rows: Annotated[int | None, "use only so many rows, the first ones", 1] = None
    columns: Annotated[
        dict | None,
        'names of your columns, by ours: {"prompt": "question", "output": "answer"}; ours are prompt, instruction, '
        "input, output, messages, tools, teacher, teacher_prompt and teacher_messages, and other columns are then not "
        "read",
    ] = None
    teachers: Annotated[
        dict[str, str] | None,
        'of several teachers, those of rows that name none in a column "teacher", by file: {"code.jsonl": "code"}',
    ] = None
    on_bad_row: Annotated[
        Literal["stop", "skip"], "if a row can't be used: end the run, or leave it out; the first lines name them"
    ] = "stop"
    train_on: Annotated[
        Literal["all", "last"],
        "turns of the assistant in a row of messages that are trained; methods that write responses answer the last",
    ] = "all"
    begin_token: Annotated[
        Literal["auto", True, False],
        "begin token before each prompt, never two; auto: before plain text if the tokenizer itself adds one, and in "
        "messages what the chat template says",
    ] = "auto"
    chat_template: Annotated[str | None, "file with a chat template in place of the tokenizer's"] = None
    chat_template_kwargs: Annotated[dict | None, 'values for the template, such as {"enable_thinking": false}'] = None
    max_length: Annotated[int, "tokens of prompt and response together; longer responses are cut", 2] = 512
    max_prompt_length: Annotated[int | None, "tokens of a prompt; longer ones are left out (null: no limit)", 1] = 256
    pretrain: Annotated[PretrainConfig | None, "plain text for an additional language-modeling loss"] = None

    @property
    def stage(self) -> str | None:
        """The name of the stage that writes the training rows; None if they are there already."""
        return self.train.removeprefix("stage:") if self.train.startswith("stage:") else None

    @property
    def uses_pretrain(self) -> bool:
        return self.pretrain is not None and self.pretrain.weight > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig(SamplingKeys):
    """How on-policy methods and stages with method generate sample; data.max_length also limits responses."""

    batch_size: Annotated[int, "responses in progress at a time; no response depends on it", 1] = 64

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, 1e-3, 1e3)
        super().__post_init__()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The teacher's final hidden states at the response tokens: computed once, not in every epoch.

    They are exact, unless dtype says otherwise.
    """

    mode: Annotated[
        Literal["off", "auto", "memory", "disk"],
        "off: the teacher runs in every step; disk: a mapped file; memory: also loaded into device memory (and kept in "
        "a file if one can be written); auto: what fits",
    ] = "auto"
    dir: Annotated[str | None, "folder of all caches (default: $ABKD_CACHE, or abkd_fast in the user's caches)"] = None
    dtype: Annotated[
        Literal["float8"] | None,
        "float8: half the bytes of bfloat16, and an error in losses and gradients (docs/teacher-cache.md); null: the "
        "type of the computation, exact",
    ] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Section):
    """One run: a student, how to train it, and data."""

    method: Annotated[
        str,
        "sft: cross-entropy, no teacher; ab, kd: divergence to a teacher on the responses of the data; imitkd, gkd, "
        "distillm: also on responses of the student; minillm: policy gradient; seqkd: sft on responses of an earlier "
        "stage; generate: no training, the model given as student (mostly a teacher) answers data.train",
    ] = "ab"
    loss: Annotated[
        str,
        "the divergence: ab:ALPHA,BETA, fkl, rkl, wsd:LAM, bdkd, jsd:LAM, akl:MU, tvd, sfkl:LAM, srkl:LAM, "
        "hellinger, alpha:ALPHA or alphanet:ALPHA1,ALPHA2[,batch] (the larger of two; batch decides once for a "
        "micro-batch, as published, so results depend on train.max_tokens and on the number of processes)",
    ] = "ab:0.2,0.7"
    temperature: Annotated[float, "divides the logits of both models in the divergence", 1e-3, 1e3] = 1.0
    hard_weight: Annotated[float, "w in (1 - w) divergence + w cross-entropy", 0, 1] = 0.0
    tokenizer: Annotated[str | None, "folder or Hub name (default: the student's)"] = None
    run: RunConfig
    student: ModelConfig
    teacher: TeacherConfig | None = None
    teachers: Annotated[
        dict[str, TeacherConfig] | None,
        "several teachers {NAME: keys of teacher} in place of teacher: each row has its own (docs/several-teachers.md)",
    ] = None
    data: DataConfig
    sampling: SamplingConfig = SamplingConfig()
    on_policy: OnPolicyConfig = OnPolicyConfig()
    minillm: MiniLLMConfig = MiniLLMConfig()
    cache: CacheConfig = CacheConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self) -> None:
        names = (*METHODS, "generate")
        if self.method not in names:
            raise ConfigError(f'method: unknown method "{self.method}"{nearest(self.method, names)}', "method")
        try:
            parse(self.loss)
        except ValueError as error:
            raise ConfigError(str(error), "loss") from None
        super().__post_init__()
        if self.teachers is not None and self.teacher is not None:
            raise ConfigError("teachers: there is a teacher, too; give null for one of the two", "teachers")
        if self.teachers is not None:
            check_several(self.teachers, self.data.teachers or {}, self.method)
        elif self.data.teachers and self.is_taught:
            problem = "gives rows a teacher by name, but teachers is missing; give null for it"
            raise ConfigError(f"data.teachers: {problem}", "data.teachers")
        if self.is_taught and not self.all_teachers:
            raise ConfigError(f'teacher: missing, and method "{self.method}" needs one; give teacher.path')
        self._check_served_teacher()
        if self.student.device_map is not None:
            problem, way_out = "a student is trained on one device", "student.quantize and LoRA make it smaller"
            if self.method == "generate":
                problem, way_out = "a model that is spread over devices can't write here", "use student.quantize"
            raise ConfigError(f"student.device_map: {problem}; {way_out}")
        if self.teacher is not None and self.teacher.device_map is not None and self.method == "minillm":
            problem = "minillm's teacher also writes, and a model that is spread over devices can't here"
            raise ConfigError(f"teacher.device_map: {problem}; use teacher.quantize, or another method")
        if self.tokenizer is None and self.student.path is None:
            raise ConfigError("tokenizer: missing, and a student with random weights brings none")
        if self.eval.select != "last" and self.data.dev is None:
            problem = f"eval.select is {self.eval.select}, but data.dev is missing"
            raise ConfigError(f"{problem}; give it, or select last", "eval.select")
        if self.eval.patience is not None and self.data.dev is None:
            raise ConfigError("eval.patience: there is no data.dev that could be evaluated; give it", "eval.patience")
        if self.eval.rouge_rows is not None and self.data.dev is None:
            raise ConfigError("eval.rouge_rows: there is no data.dev whose rows could be answered", "eval.rouge_rows")
        if self.log.samples and self.data.dev is None:
            raise ConfigError("log.samples: there is no data.dev whose rows could be answered", "log.samples")
        if self.train.max_tokens < self.data.max_length:
            longest = f"data.max_length = {self.data.max_length} tokens"
            problem = f"train.max_tokens is {self.train.max_tokens}, but one sample may have {longest}"
            raise ConfigError(f"{problem}; raise the first or lower the second")
        self._check_generation()
        self._check_labels()
        for key, teacher in self.all_teachers.items():
            if teacher.hidden_states is not None:
                self._check_given_states(f"{key}.hidden_states")

    @property
    def is_taught(self) -> bool:
        """Whether the method has a teacher, or several."""
        return self.method not in (*WITHOUT_TEACHER, "generate")

    @property
    def all_teachers(self) -> dict[str, TeacherConfig]:
        """The teachers by their keys: "teacher", or "teachers.NAME" for each of several."""
        if self.teachers is not None:
            return {f"teachers.{name}": teacher for name, teacher in self.teachers.items()}
        return {} if self.teacher is None else {"teacher": self.teacher}

    def of_teacher(self, key: str) -> "Config":
        """The same run with one of its teachers alone."""
        data = dataclasses.replace(self.data, teachers=None)
        return dataclasses.replace(self, teacher=self.all_teachers[key], teachers=None, data=data)

    @property
    def asks_in_training(self) -> bool:
        """Whether the method asks the teacher about responses that are written in training."""
        return self.method in ("imitkd", "distillm", "minillm") or (
            self.method == "gkd" and self.on_policy.fraction > 0
        )

    @property
    def served_teacher(self) -> str | None:
        """teacher.top_k, if the method reads it."""
        return self.teacher.top_k if self.teacher and self.method in WITH_SERVED_TEACHER else None

    def _check_served_teacher(self) -> None:
        """Raises ConfigError where the method or the loss needs more than a few of the teacher's tokens."""
        if self.teacher is None or self.teacher.top_k is None:
            return
        if self.method not in (*WITH_SERVED_TEACHER, *WITHOUT_TEACHER, "generate"):
            problem = f'method "{self.method}" needs a teacher that reads what the student writes'
            raise ConfigError(f"teacher.top_k: {problem}; give teacher.path, or method=ab or kd", "teacher.top_k")
        if self.served_teacher and self.temperature != 1:
            problem = f"temperature is {self.temperature}, but teacher.top_k has no logits of the other tokens"
            way_out = "set temperature=1, or give teacher.path"
            raise ConfigError(f"{problem}, which it would divide; {way_out}", "temperature")

    def _check_generation(self) -> None:
        self.on_policy.check_method(self.method)
        capacity, batch_size = self.on_policy.replay_rows, self.train.batch_size
        replays = self.method == "distillm" or (self.method in ("imitkd", "gkd") and capacity > 0)
        if replays and capacity < batch_size:
            problem = f"is {capacity}, fewer than train.batch_size = {batch_size}, what a step takes"
            raise ConfigError(f"on_policy.replay_rows {problem}", "on_policy.replay_rows")
        if self.method == "distillm" and self.data.dev is None:
            raise ConfigError("data.dev: missing, and method distillm follows its loss", "data.dev")
        if self.method == "generate" and (self.student.path is None or self.student.lora is not None):
            raise ConfigError("student: method generate trains nothing: give the path of a model", "student")

    def _check_labels(self) -> None:
        """Raises ConfigError where the student's own responses would be the labels of the cross-entropy."""
        writes = self.method in ("imitkd", "distillm") or (self.method == "gkd" and self.on_policy.fraction > 0)
        if writes and self.hard_weight > 0:
            problem = (
                f'hard_weight is {self.hard_weight}, but method "{self.method}" trains on the student\'s responses'
            )
            instead = "; or on_policy.fraction=0, to train on the data's alone" if self.method == "gkd" else ""
            way_out = f"which are no right answers: set hard_weight=0{instead}"
            raise ConfigError(f"{problem}, {way_out}", "hard_weight")

    def _check_given_states(self, key: str) -> None:
        """Raises ConfigError where the method needs the teacher itself, or the cache is off."""
        if self.asks_in_training:
            problem = f'method "{self.method}" asks the teacher about responses that are written in training'
            raise ConfigError(f"{key}: {problem}; give its path, or a method that trains on the data: ab, kd", key)
        if self.cache.mode == "off":
            raise ConfigError(f"{key}: cache.mode is off, but the states are a cache; leave cache.mode out", key)

    def to_dict(self) -> dict:
        """All keys as JSON values. The loss has all its values, so no change of a default changes what it means."""
        return json.loads(json.dumps(dataclasses.asdict(self) | {"loss": str(parse(self.loss))}))
