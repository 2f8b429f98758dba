"""Configurations: what can be said in a recipe, as frozen dataclasses that check their own values."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Annotated, Literal

from ..errors import ConfigError, check_positive, check_range, nearest
from ..losses.divergences import parse
from .methods import METHODS, WITHOUT_TEACHER, MiniLLMConfig, OnPolicyConfig
from .sampling import NgramSize, SamplingKeys

SEEDS = (10, 20, 30, 40, 50)  # the papers' for evaluations


def _check_folder_name(section: object, name: str) -> None:
    """Raises ConfigError for what is not one folder's name: it would end up elsewhere."""
    value = getattr(section, name)
    good = value == pathlib.PurePath(value).name and value.strip(". ") and value.isprintable() and ":" not in value
    if not good or len(value.encode()) > 200:
        raise ConfigError(f'{name} is "{value[:60]}", expected the name of a folder, without "/" or ":"', name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where results go. A run's folder is DIR/NAME, or DIR/NAME/STAGE for a stage of a recipe."""

    name: Annotated[str, "name of the run"]
    stage: Annotated[str | None, "name of the stage; set by recipes with stages"] = None
    dir: Annotated[str, "folder of all runs"] = "runs"
    seed: Annotated[int, "seeds weights, dropout and the order of the data"] = 10

    def __post_init__(self) -> None:
        check_range(self, seed=(0, 2**32 - 1))
        _check_folder_name(self, "name")
        if self.stage is not None:
            _check_folder_name(self, "stage")

    @property
    def root(self) -> pathlib.Path:
        return pathlib.Path(self.dir) / self.name

    @property
    def folder(self) -> pathlib.Path:
        return self.root / (self.stage or "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A new low-rank adapter: only it is trained. The defaults are the papers'."""

    rank: Annotated[int, "width of the two factors"] = 16
    alpha: Annotated[float, "the product of the factors is scaled by alpha / rank"] = 64.0
    dropout: Annotated[float, "on the adapter's input"] = 0.1
    targets: Annotated[tuple[str, ...], "names of the projections that get one"] = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        check_range(self, rank=(1, math.inf), alpha=(0, math.inf), dropout=(0, 1))
        if not self.targets:
            example = '["q_proj", "v_proj"]'
            raise ConfigError(f"targets is empty, expected names of projections, for example {example}", "targets")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Hugging Face causal language model, as student or teacher."""

    path: Annotated[str | None, 'folder or Hub name; "stage:NAME" is the result of an earlier stage'] = None
    config: Annotated[dict | None, "instead of path: a transformers configuration, for random weights"] = None
    dropout: Annotated[float | None, "sets every dropout rate of model and adapter (default: their own)"] = None
    adapter: Annotated[
        str | None,
        "folder or Hub name of a LoRA adapter (or stage:NAME): a student goes on with it, a teacher merges it",
    ] = None
    lora: Annotated[LoraConfig | None, "train a new LoRA adapter instead of all weights"] = None

    def __post_init__(self) -> None:
        if self.path is None and self.config is None:
            raise ConfigError("path: missing; give a folder or a Hub name (or config, for random weights)", "path")
        if self.path is not None and self.config is not None:
            raise ConfigError("has both path and config: give one, and null for the other")
        if self.config is not None and "model_type" not in self.config:
            raise ConfigError('config needs "model_type", for example "gpt2" or "llama"', "config")
        if self.adapter is not None and self.lora is not None:
            raise ConfigError("give either adapter, to go on with one, or lora, for a new one")
        check_range(self, dropout=(0, 1))

    @property
    def has_adapter(self) -> bool:
        return self.adapter is not None or self.lora is not None

    @property
    def stages(self) -> dict[str, str]:
        """The names of the stages that path and adapter refer to."""
        values = {key: getattr(self, key) or "" for key in ("path", "adapter")}
        return {key: value.removeprefix("stage:") for key, value in values.items() if value.startswith("stage:")}

    def saved_in(self, folder: pathlib.Path) -> ModelConfig:
        """The same model with the weights that training it left in a folder: the adapter's alone, where it has one."""
        if self.has_adapter:
            return dataclasses.replace(self, adapter=str(folder), lora=None)
        return dataclasses.replace(self, path=str(folder), config=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Plain text whose language-modeling loss is added in every step, as the papers do: one block a sample."""

    path: Annotated[str, "JSONL file or folder of them with text, plain .txt, or the papers' .bin and .idx files"]
    weight: Annotated[float, "factor of its mean cross-entropy; 0 leaves the text unread"] = 1.0
    rows: Annotated[int | None, "use only the first documents (of binary files: items)"] = None

    def __post_init__(self) -> None:
        check_range(self, weight=(0, math.inf), rows=(1, math.inf))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Rows with instruction, input and output, prompt and output, or messages; or the papers' .bin and .idx files."""

    train: Annotated[
        str,
        'training rows; JSONL or .bin file, folder or Hub name; "quickstart:train" are generated tasks, "stage:NAME" '
        "what an earlier stage with method generate has written",
    ]
    dev: Annotated[str | None, "rows whose loss is reported during training"] = None
    train_rows: Annotated[int | None, "use only the first rows"] = None
    dev_rows: Annotated[int | None, "use only the first rows"] = None
    max_length: Annotated[int, "tokens of prompt and response together; longer responses are cut"] = 512
    max_prompt_length: Annotated[int | None, "rows with longer prompts, in tokens, are left out (null: none is)"] = 256
    pretrain: Annotated[PretrainConfig | None, "plain text, for an additional language-modeling loss"] = None

    def __post_init__(self) -> None:
        check_range(self, train_rows=(1, math.inf), dev_rows=(1, math.inf), max_length=(2, math.inf))
        check_range(self, max_prompt_length=(1, math.inf))

    @property
    def stage(self) -> str | None:
        """The name of the stage that writes the training rows."""
        return self.train.removeprefix("stage:") if self.train.startswith("stage:") else None

    @property
    def adds_text(self) -> bool:
        return self.pretrain is not None and self.pretrain.weight > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig(SamplingKeys):
    """How on-policy methods and stages with method generate sample; data.max_length also limits responses."""

    batch_size: Annotated[int, "responses in progress at a time; no response depends on it"] = 64

    def __post_init__(self) -> None:
        check_range(self, temperature=(1e-3, 1e3), batch_size=(1, math.inf))
        super().__post_init__()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The teacher's final hidden states at the response tokens, computed once instead of once an epoch; exact."""

    mode: Annotated[
        Literal["off", "auto", "memory", "disk"],
        "off: the teacher runs in every step; disk: a mapped file; memory: the file, if it can be written, is also "
        "loaded into device memory; auto: what fits",
    ] = "auto"
    dir: Annotated[str | None, "folder of all caches (default: $ABKD_CACHE, or abkd_fast in the user's caches)"] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW; weights of one dimension (biases, norms) don't decay, except a LoRA adapter's."""

    lr: Annotated[float, "peak learning rate"] = 5e-4
    min_lr: Annotated[float, "learning rate that the cosine ends at"] = 1e-7
    schedule: Annotated[Literal["cosine", "constant"], "after the warm-up"] = "cosine"
    warmup_steps: Annotated[int, "steps from 0 to lr"] = 0
    weight_decay: Annotated[float, "decoupled weight decay"] = 0.01
    betas: Annotated[tuple[float, float], "moment decay rates"] = (0.9, 0.999)
    eps: Annotated[float, "added to the root of the second moment"] = 1e-8
    clip_norm: Annotated[float, "gradients of a larger norm are scaled down to it"] = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "lr", "clip_norm", "eps")
        check_range(self, min_lr=(0, self.lr), warmup_steps=(0, math.inf), weight_decay=(0, math.inf))
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas are {list(self.betas)}, expected two numbers from 0 up to 1", "betas")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop. A step is always batch_size samples; max_tokens only decides how many go through at once."""

    epochs: Annotated[int, "passes over the training rows"] = 10
    steps: Annotated[int | None, "stop after so many steps, whatever epochs says"] = None
    batch_size: Annotated[int, "samples of an optimizer step"] = 32
    max_tokens: Annotated[int, "tokens of a micro-batch, packed without padding"] = 8192
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float64"], "of the computation; auto: bfloat16 on a GPU, else float32"
    ] = "auto"
    device: Annotated[Literal["auto", "cpu", "cuda"], "auto: the GPU if there is one"] = "auto"
    gradient_checkpointing: Annotated[bool, "compute the student's layers twice instead of keeping them"] = False
    compile: Annotated[Literal["auto", "off"], "auto: torch.compile on a GPU"] = "auto"
    on_nonfinite: Annotated[
        Literal["stop", "skip"], "a step whose loss or gradient is not finite ends the run, or changes no weight"
    ] = "stop"
    parallel: Annotated[
        Literal["auto", "ddp", "fsdp"],
        "of several processes each holds all weights (ddp), or a part of them, the teacher's too (fsdp); auto: ddp",
    ] = "auto"
    timeout_minutes: Annotated[float, "a process that waits so long for the others ends the run"] = 30.0

    def __post_init__(self) -> None:
        check_range(self, timeout_minutes=(0.01, math.inf))
        check_range(self, **dict.fromkeys(("epochs", "steps", "batch_size", "max_tokens"), (1, math.inf)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig(SamplingKeys):
    """During training: loss and ROUGE-L on data.dev (sampled with max_new_tokens alone). After it: test sets."""

    every_steps: Annotated[
        int | None, "how often, besides before the first and after the last step (default: once an epoch)"
    ] = None
    rouge_rows: Annotated[int | None, "so many dev rows are also answered, for ROUGE-L (null: none)"] = None
    select: Annotated[
        Literal["last", "dev_loss", "rouge_l"],
        "whose weights final/ holds: the last step's, or those of the lowest dev loss, or the highest ROUGE-L",
    ] = "last"
    sets: Annotated[dict | None, "test sets for the result, {NAME: JSONL file}; scores go to eval/"] = None
    seeds: Annotated[tuple[int, ...], "of the answers to test sets"] = SEEDS
    no_repeat_ngram_size: NgramSize = 6
    begin_token: Annotated[bool, "one before every prompt of a test set, as the papers' Llama models had"] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, every_steps=(1, math.inf), rouge_rows=(1, math.inf), no_repeat_ngram_size=(0, math.inf))
        if self.select == "rouge_l" and self.rouge_rows is None:
            raise ConfigError("select is rouge_l, but rouge_rows is missing; give it, or select last", "select")
        for name, path in (self.sets or {}).items():
            if not isinstance(path, str):
                raise ConfigError(f"sets.{name} must be text, got {json.dumps(path)[:60]}", "sets")
        if not self.seeds or not all(0 <= seed < 2**32 for seed in self.seeds):
            raise ConfigError(f"seeds are {list(self.seeds)}, expected at least one, from 0 to {2**32 - 1}", "seeds")
        if len({*self.seeds}) < len(self.seeds):
            raise ConfigError(f"seeds are {list(self.seeds)}: one is given twice", "seeds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """metrics.jsonl, TensorBoard and the terminal."""

    every_steps: Annotated[int, "steps that one logged point sums up"] = 10
    wandb: Annotated[str | None, "a project of Weights & Biases that gets the points too (needs wandb)"] = None

    def __post_init__(self) -> None:
        check_range(self, every_steps=(1, math.inf))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints for --resume, each with a model folder's files. SIGTERM and Ctrl-C save one and end the run."""

    every_steps: Annotated[int | None, "how often, besides at every best one (default: once an epoch)"] = None
    keep: Annotated[int, "the newest so many stay, and the best one"] = 2

    def __post_init__(self) -> None:
        check_range(self, every_steps=(1, math.inf), keep=(1, math.inf))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run: a student, a way to train it, and data."""

    method: Annotated[
        str,
        "sft (no teacher); ab or kd (divergence to a teacher on the data's responses); imitkd, gkd or distillm (also "
        "on the student's own); minillm (policy gradient); seqkd (sft on what a stage with method generate wrote); "
        "generate (no training: the student, here mostly a teacher, answers data.train)",
    ] = "ab"
    loss: Annotated[
        str,
        "the divergence: ab:ALPHA,BETA, fkl, rkl, wsd:LAM, bdkd, jsd:LAM, akl:MU, tvd, sfkl:LAM, srkl:LAM, "
        "alphanet:ALPHA1,ALPHA2[,token], hellinger or alpha:ALPHA",
    ] = "ab:0.2,0.7"
    temperature: Annotated[float, "divides both models' logits in the divergence"] = 1.0
    hard_weight: Annotated[float, "w in (1 - w) divergence + w cross-entropy"] = 0.0
    tokenizer: Annotated[str | None, "folder or Hub name (default: the student's)"] = None
    run: RunConfig
    student: ModelConfig
    teacher: ModelConfig | None = None
    data: DataConfig
    sampling: SamplingConfig = SamplingConfig()
    on_policy: OnPolicyConfig = OnPolicyConfig()  # noqa: RUF009 - it is frozen
    minillm: MiniLLMConfig = MiniLLMConfig()  # noqa: RUF009 - it is frozen
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
        check_range(self, hard_weight=(0, 1), temperature=(1e-3, 1e3))
        if self.method not in (*WITHOUT_TEACHER, "generate") and self.teacher is None:
            raise ConfigError(f'teacher: missing, and method "{self.method}" needs one; give teacher.path')
        if self.teacher is not None and self.teacher.lora is not None:
            raise ConfigError("teacher.lora: a teacher is not trained; teacher.adapter merges an adapter into it")
        if self.tokenizer is None and self.student.path is None:
            raise ConfigError("tokenizer: missing, and a student with random weights brings none")
        if self.eval.select != "last" and self.data.dev is None:
            raise ConfigError(
                f"eval.select is {self.eval.select}, but data.dev is missing; give it, or select last", "eval.select"
            )
        if self.eval.rouge_rows is not None and self.data.dev is None:
            raise ConfigError("eval.rouge_rows: there is no data.dev whose rows could be answered", "eval.rouge_rows")
        if self.train.max_tokens < self.data.max_length:
            raise ConfigError(
                f"train.max_tokens is {self.train.max_tokens}, but one sample may have data.max_length = "
                f"{self.data.max_length} tokens; raise the first or lower the second"
            )
        self._check_generation()

    def _check_generation(self) -> None:
        self.on_policy.check_method(self.method)
        capacity, batch_size = self.on_policy.replay_rows, self.train.batch_size
        replays = self.method == "distillm" or (self.method in ("imitkd", "gkd") and capacity > 0)
        if replays and capacity < batch_size:
            raise ConfigError(
                f"on_policy.replay_rows is {capacity}, fewer than train.batch_size = {batch_size}, what a step takes",
                "on_policy.replay_rows",
            )
        if self.method == "distillm" and self.data.dev is None:
            raise ConfigError("data.dev: missing, and method distillm follows its loss", "data.dev")
        if self.method == "generate" and (self.student.path is None or self.student.lora is not None):
            raise ConfigError("student: method generate trains nothing: give the path of a model", "student")

    def to_dict(self) -> dict:
        return json.loads(json.dumps(dataclasses.asdict(self)))
