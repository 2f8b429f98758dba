"""Configurations: frozen dataclasses, and their way from JSON, with errors that name the key and the way out."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import pathlib
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

RECIPES = pathlib.Path(__file__).parent / "recipes"


class ConfigError(ValueError):
    """Something the user wrote, or pointed to, can't be used. The message is one line and says what to do."""


def _check_range(section: object, **ranges: tuple[float, float]) -> None:
    """Raises ConfigError for a number outside its range; the 0 below lr, eps, clip_norm is excluded."""
    for name, (low, high) in ranges.items():
        value = getattr(section, name)
        is_open = name in ("lr", "eps", "clip_norm")
        if value is not None and not (low < value <= high if is_open else low <= value <= high):
            bound = f"above {low}" if is_open else f"at least {low}"
            limit = "" if high == math.inf else f" and at most {high:g}"
            raise ConfigError(f"{name} is {value}, expected {bound}{limit}")


def _nearest(name: str, valid: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; valid are {', '.join(valid)}"


def _section(cls: type) -> type:
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


@_section
class RunConfig:
    """Where results go. A run's folder is DIR/NAME, or DIR/NAME/STAGE for a stage of a recipe."""

    name: Annotated[str, "name of the run"]
    stage: Annotated[str, "name of the stage; set by recipes with stages"] = ""
    dir: Annotated[str, "folder of all runs"] = "runs"
    seed: Annotated[int, "seeds weights, dropout and the order of the data"] = 10

    def __post_init__(self) -> None:
        _check_range(self, seed=(0, 2**32 - 1))
        if not self.name.strip("./ "):
            raise ConfigError(f'name is "{self.name}", expected the name of a folder')

    @property
    def root(self) -> pathlib.Path:
        return pathlib.Path(self.dir) / self.name

    @property
    def folder(self) -> pathlib.Path:
        return self.root / self.stage


@_section
class LoraConfig:
    """A new low-rank adapter: only it is trained. The defaults are the papers'."""

    rank: Annotated[int, "width of the two factors"] = 16
    alpha: Annotated[float, "the product of the factors is scaled by alpha / rank"] = 64.0
    dropout: Annotated[float, "on the adapter's input"] = 0.1
    targets: Annotated[tuple[str, ...], "names of the projections that get one"] = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        _check_range(self, rank=(1, math.inf), alpha=(0, math.inf), dropout=(0, 1))
        if not self.targets:
            raise ConfigError('targets is empty, expected names of projections, for example ["q_proj", "v_proj"]')


@_section
class ModelConfig:
    """A Hugging Face causal language model, as student or teacher."""

    path: Annotated[str | None, 'folder or Hub name; "stage:NAME" is the result of an earlier stage'] = None
    config: Annotated[dict | None, "instead of path: a transformers configuration, for random weights"] = None
    dropout: Annotated[float | None, "sets every dropout rate of the model (default: the model's own)"] = None
    adapter: Annotated[
        str | None,
        "folder or Hub name of a LoRA adapter (or stage:NAME): a student goes on with it, a teacher merges it",
    ] = None
    lora: Annotated[LoraConfig | None, "train a new LoRA adapter instead of all weights"] = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.config is None):
            raise ConfigError("give either path or config")
        if self.config is not None and "model_type" not in self.config:
            raise ConfigError('config needs "model_type", for example "gpt2" or "llama"')
        if self.adapter is not None and self.lora is not None:
            raise ConfigError("give either adapter, to go on with one, or lora, for a new one")
        _check_range(self, dropout=(0, 1))

    @property
    def is_stage(self) -> bool:
        return self.path is not None and self.path.startswith("stage:")


@_section
class PretrainConfig:
    """Plain text whose language-modelling loss is added in every step, as the papers do: one block a sample."""

    path: Annotated[str, "JSONL file or folder of them with text, plain .txt, or the papers' .bin and .idx files"]
    weight: Annotated[float, "factor of its mean cross-entropy"] = 1.0
    rows: Annotated[int | None, "use only the first documents"] = None

    def __post_init__(self) -> None:
        _check_range(self, weight=(0, math.inf), rows=(1, math.inf))


@_section
class DataConfig:
    """Rows with instruction, input and output, or prompt and output, or messages: JSONL file, folder, or Hub name."""

    train: Annotated[str, 'training rows; "quickstart:train" are tasks that the package generates']
    dev: Annotated[str | None, "rows whose loss is reported during training"] = None
    train_rows: Annotated[int | None, "use only the first rows"] = None
    dev_rows: Annotated[int | None, "use only the first rows"] = None
    max_length: Annotated[int, "tokens of prompt and response together; longer responses are cut"] = 512
    max_prompt_length: Annotated[int | None, "rows with longer prompts, in tokens, are left out (null: none is)"] = 256
    pretrain: Annotated[PretrainConfig | None, "plain text, for an additional language-modelling loss"] = None

    def __post_init__(self) -> None:
        _check_range(self, train_rows=(1, math.inf), dev_rows=(1, math.inf), max_length=(2, math.inf))
        _check_range(self, max_prompt_length=(1, math.inf))


@_section
class CacheConfig:
    """The teacher's final hidden states at the response tokens, computed once instead of once an epoch; exact."""

    mode: Annotated[
        Literal["off", "auto", "memory", "disk"],
        "off: the teacher runs in every step; disk: a mapped file; memory: the file, if it can be written, is also "
        "loaded into device memory; auto: what fits",
    ] = "auto"
    dir: Annotated[str | None, "folder of all caches (default: $ABKD_CACHE, or abkd_fast in the user's caches)"] = None


@_section
class OptimConfig:
    """AdamW; weights of one dimension (biases, norms) don't decay."""

    lr: Annotated[float, "peak learning rate"] = 5e-4
    min_lr: Annotated[float, "learning rate that the cosine ends at"] = 1e-7
    schedule: Annotated[Literal["cosine", "constant"], "after the warm-up"] = "cosine"
    warmup_steps: Annotated[int, "steps from 0 to lr"] = 0
    weight_decay: Annotated[float, "decoupled weight decay"] = 0.01
    betas: Annotated[tuple[float, float], "moment decay rates"] = (0.9, 0.999)
    eps: Annotated[float, "added to the root of the second moment"] = 1e-8
    clip_norm: Annotated[float, "gradients of a larger norm are scaled down to it"] = 1.0

    def __post_init__(self) -> None:
        rates = dict.fromkeys(("lr", "clip_norm", "eps"), (0, math.inf))
        _check_range(self, **rates, min_lr=(0, self.lr), warmup_steps=(0, math.inf), weight_decay=(0, math.inf))
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas are {list(self.betas)}, expected two numbers from 0 up to 1")


@_section
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

    def __post_init__(self) -> None:
        _check_range(self, **dict.fromkeys(("epochs", "steps", "batch_size", "max_tokens"), (1, math.inf)))


@_section
class EvalConfig:
    """The loss on data.dev: cross-entropy of the reference responses, mean over their tokens."""

    every_steps: Annotated[int | None, "how often, besides before the first and after the last step"] = None
    select: Annotated[Literal["last", "dev_loss"], "whose weights final/ holds: the last step's, or the best one's"] = (
        "last"
    )

    def __post_init__(self) -> None:
        _check_range(self, every_steps=(1, math.inf))


@_section
class LogConfig:
    """metrics.jsonl, TensorBoard and the terminal."""

    every_steps: Annotated[int, "steps that one logged point sums up"] = 10
    wandb: Annotated[str | None, "a project of Weights & Biases that gets the points too (needs wandb)"] = None

    def __post_init__(self) -> None:
        _check_range(self, every_steps=(1, math.inf))


@_section
class CheckpointConfig:
    """Checkpoints for --resume, each with a model folder's files. SIGTERM and Ctrl-C save one and end the run."""

    every_steps: Annotated[int | None, "how often, besides at every best dev loss (default: once an epoch)"] = None
    keep: Annotated[int, "the newest so many stay, and the one of the best dev loss"] = 2

    def __post_init__(self) -> None:
        _check_range(self, every_steps=(1, math.inf), keep=(1, math.inf))


@_section
class Config:
    """One run: a student, a way to train it, and data."""

    method: Annotated[str, "sft (no teacher), or ab or kd (divergence to a teacher on the data's responses)"] = "ab"
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
    cache: CacheConfig = CacheConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self) -> None:
        from .divergences import parse
        from .methods import NAMES

        if self.method not in NAMES:
            raise ConfigError(f'method: unknown method "{self.method}"{_nearest(self.method, NAMES)}')
        try:
            parse(self.loss)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        _check_range(self, hard_weight=(0, 1), temperature=(1e-3, 1e3))
        if self.method != "sft" and self.teacher is None:
            raise ConfigError(f'teacher: missing, and method "{self.method}" needs one; give teacher.path')
        if self.tokenizer is None and self.student.path is None:
            raise ConfigError("tokenizer: missing, and a student with random weights brings none")
        if self.train.max_tokens < self.data.max_length:
            raise ConfigError(
                f"train.max_tokens is {self.train.max_tokens}, but one sample may have data.max_length = "
                f"{self.data.max_length} tokens; raise the first or lower the second"
            )

    def to_dict(self) -> dict:
        return json.loads(json.dumps(dataclasses.asdict(self)))


def load(name_or_path: str, overrides: list[str] = ()) -> list[Config]:
    """The stages of a recipe (one, unless it lists several), with overrides applied.

    Args:
        name_or_path: a JSON file, or the name of a packaged recipe, with or without ".json".
        overrides: "key=value" for what the stages share, or "STAGE:key=value" for one stage, which wins; keys dotted,
            values JSON or else text.

    Raises ConfigError, naming file, key and value.
    """
    path = pathlib.Path(name_or_path)
    if not path.exists():
        packaged = RECIPES / path.with_suffix(".json").name
        if path.parent != pathlib.Path(".") or not packaged.exists():
            names = sorted(recipe.name for recipe in RECIPES.glob("*.json"))
            near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else f"; packaged recipes are {', '.join(names)}"
            raise ConfigError(f"{name_or_path}: no such file{hint}")
        path = packaged
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} line {error.lineno}: broken JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    values.pop("comment", None)
    stages = values.pop("stages", None)
    pairs = [_parse_override(override, stages or {}) for override in overrides]
    for stage, keys, value in pairs:
        if stage is None:
            _set(values, keys, value)
    if stages is None:
        return [_build(Config, values, "", path.name)]
    if not isinstance(stages, dict) or not stages or not all(isinstance(stage, dict) for stage in stages.values()):
        raise ConfigError(f'{path.name}: stages: expected an object of objects, {{"NAME": {{…}}, …}}')
    configs = []
    for name, own in stages.items():
        merged = _merge(_merge(values, own), {"run": {"stage": name}})
        for stage, keys, value in pairs:
            if stage == name:
                _set(merged, keys, value)
        configs.append(_build(Config, merged, "", f"{path.name} stage {name}"))
    return configs


def _merge(base: dict, over: dict) -> dict:
    """`over` on top of `base`, section by section; null removes a section."""
    merged = json.loads(json.dumps(base))
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _parse_override(override: str, stages: dict) -> tuple[str | None, list[str], Any]:
    """The stage (None: all), the keys and the value of "STAGE:key.key=value"."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f'--set {override}: expected key=value, for example "optim.lr=1e-4"')
    stage, colon, rest = key.partition(":")
    if colon and stage not in stages:
        raise ConfigError(f'--set {override}: no stage "{stage}"{_nearest(stage, stages) if stages else ""}')
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    return (stage if colon else None), (rest if colon else key).split("."), value


def _set(values: dict, keys: list[str], value: Any) -> None:
    for section in keys[:-1]:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise ConfigError(f"--set {'.'.join(keys)}: {section} is not a section")
    values[keys[-1]] = value


def _build(cls: type, values: Any, where: str, file: str) -> Any:
    """A dataclass from a JSON object; `where` is the dotted path so far."""
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: {where}: expected an object, got {json.dumps(values)}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    arguments = {}
    for key, value in values.items():
        name = f"{where}.{key}" if where else key
        if key == "comment":
            continue
        if key not in fields:
            raise ConfigError(f"{file}: {name}: unknown key{_nearest(key, fields)}")
        arguments[key] = _convert(hints[key], value, name, file)
    for key, field in fields.items():
        if key not in arguments and field.default is dataclasses.MISSING:
            raise ConfigError(f"{file}: {where + '.' if where else ''}{key}: missing")
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{file}: {where + '.' if where else ''}{error}") from None


def _convert(hint: Any, value: Any, name: str, file: str) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        return None if value is None else _convert(options[0], value, name, file)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, name, file)
    if typing.get_origin(hint) is Literal:
        valid = typing.get_args(hint)
        if value not in valid:
            raise ConfigError(f"{file}: {name} is {json.dumps(value)}, expected one of {', '.join(valid)}")
        return value
    if hint == tuple[str, ...]:
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{file}: {name} must be a list of texts, got {json.dumps(value)}")
        return tuple(value)
    if typing.get_origin(hint) is tuple:
        length = len(typing.get_args(hint))
        if not isinstance(value, list | tuple) or len(value) != length:
            raise ConfigError(f"{file}: {name} must be a list of {length} numbers, got {json.dumps(value)}")
        return tuple(_convert(float, item, name, file) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)
    expected = {float: "a number", int: "a whole number", bool: "true or false", str: "text", dict: "an object"}[hint]
    wrong_number = isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value))
    if not isinstance(value, hint) or (hint in (int, float) and wrong_number):
        raise ConfigError(f"{file}: {name} must be {expected}, got {json.dumps(value)}")
    return value


def describe(cls: type = Config, prefix: str = "") -> Iterator[str]:
    """Every key with its default and meaning, section by section, a line each."""
    yield f"{prefix.rstrip('.') or 'top level'}: {cls.__doc__}"
    hints, notes = typing.get_type_hints(cls), typing.get_type_hints(cls, include_extras=True)
    sections = {}
    for field in dataclasses.fields(cls):
        name, options = prefix + field.name, (hints[field.name], *typing.get_args(hints[field.name]))
        sections |= {f"{name}.": option for option in options if dataclasses.is_dataclass(option)}
        if typing.get_origin(notes[field.name]) is Annotated:
            required = field.default is dataclasses.MISSING
            default = "required" if required else json.dumps(field.default)
            yield f"  {name:22} {notes[field.name].__metadata__[0]} [{default}]"
    yield ""
    for name, section in sections.items():
        yield from describe(section, name)
