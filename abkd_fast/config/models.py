"""The sections of a configuration that name models: where they come from, and how they are loaded."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable
from typing import Annotated, Literal

from ..errors import ConfigError
from .section import Section, Text

IN_MEMORY = "in_memory"  # key of `config` for a model that a Python program gives: its name, or nothing
PROMPT_KEYS = ("system", "chat_template", "chat_template_kwargs")  # of a teacher: what it reads, not what it is


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(Section):
    """A new LoRA adapter. Only the adapter is trained. The defaults are those of the papers."""

    rank: Annotated[int, "rank of the product of the two factors", 1] = 16
    alpha: Annotated[float, "the product of the factors is scaled by alpha / rank", 0] = 64.0
    dropout: Annotated[float, "dropout rate of the adapter's input", 0, 1] = 0.1
    targets: Annotated[tuple[str, ...], "names of the linear layers that get an adapter"] = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.targets:
            example = '["q_proj", "v_proj"]'
            raise ConfigError(f"targets is empty, expected names of projections, for example {example}", "targets")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """A causal language model of Hugging Face, as student or teacher."""

    path: Annotated[str | None, 'folder or Hub name; "stage:NAME" means the result of an earlier stage'] = None
    config: Annotated[dict | None, "a transformers configuration instead of a path: the weights are random"] = None
    dropout: Annotated[float | None, "every dropout rate of the model and the adapter (default: their own)", 0, 1] = (
        None
    )
    adapter: Annotated[str | None, "LoRA adapter, given as path is: a student trains it, a teacher merges it"] = None
    lora: Annotated[LoraConfig | None, "trains a new LoRA adapter instead of all weights"] = None
    quantize: Annotated[
        Literal["4bit", "8bit"] | None, "quantizes while loading (needs bitsandbytes); a student needs an adapter then"
    ] = None
    device_map: Annotated[
        Literal["auto"] | None, "auto: spreads a teacher over all GPUs, then CPU memory, then the disk"
    ] = None
    router_aux_loss: Annotated[
        float | None,
        "factor of the auxiliary loss that balances a student's experts; 0: none (null: as the model's own "
        "configuration says, by output_router_logits and router_aux_loss_coef)",
        0,
    ] = None

    def __post_init__(self) -> None:
        if self.path is None and self.config is None:
            raise ConfigError("path: missing; give a folder or a Hub name (or config, for random weights)", "path")
        if self.path is not None and self.config is not None:
            raise ConfigError("has both path and config: give one, and null for the other")
        if self.config is not None and "model_type" not in self.config:
            raise ConfigError('config needs "model_type", for example "gpt2" or "llama"', "config")
        if self.adapter is not None and self.lora is not None:
            raise ConfigError("give either adapter, to go on with one, or lora, for a new one")
        for name in ("quantize", "device_map"):
            if getattr(self, name) is not None and self.path is None:
                raise ConfigError(f"{name}: random weights are not loaded, but this says how: give a path", name)
        if self.device_map is not None and self.adapter is not None:
            problem = "no adapter can be merged into a model that is spread over devices"
            raise ConfigError(f"device_map: {problem}; merge it before and give the result as path", "device_map")
        super().__post_init__()

    @property
    def has_adapter(self) -> bool:
        return self.adapter is not None or self.lora is not None

    @property
    def stages(self) -> dict[str, str]:
        """The names of the stages that `path` and `adapter` refer to, by these keys."""
        values = {key: getattr(self, key) or "" for key in ("path", "adapter")}
        return {key: value.removeprefix("stage:") for key, value in values.items() if value.startswith("stage:")}

    def saved_in(self, folder: pathlib.Path) -> "ModelConfig":
        """The same model after training: `folder` has its weights, or those of its adapter if it has one."""
        if self.has_adapter:
            return dataclasses.replace(self, adapter=str(folder), lora=None)
        return dataclasses.replace(self, path=str(folder), config=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig(ModelConfig):
    """The model that the student learns from. It is frozen. It may read other prompts than the student."""

    system: Annotated[
        Text | None, "text put before every prompt that the teacher reads; before messages, a system message"
    ] = None
    chat_template: Annotated[
        str | None, "file with the chat template of what the teacher reads (default: the student's)"
    ] = None
    chat_template_kwargs: Annotated[
        dict | None, "values for the template of what the teacher reads (default: data.chat_template_kwargs)"
    ] = None
    top_k: Annotated[
        str | None,
        "file with the teacher's likeliest tokens for each token of a response, as inference servers return them, "
        "instead of a model (docs/served-teachers.md)",
    ] = None
    hidden_states: Annotated[
        str | None, "folder of python -m abkd_fast.cache: trains from the teacher's states in it, without the teacher"
    ] = None

    def __post_init__(self) -> None:
        if self.hidden_states is not None or self.top_k is not None:
            self._check_alone()
            return
        super().__post_init__()
        if self.lora is not None:
            raise ConfigError("lora: a teacher is not trained; teacher.adapter merges an adapter into it", "lora")
        if self.router_aux_loss is not None:
            problem = "a teacher is not trained; give it as student.router_aux_loss"
            raise ConfigError(f"router_aux_loss: {problem}", "router_aux_loss")

    def _check_alone(self) -> None:
        """Raises ConfigError for another key beside what replaces the model. States may follow other prompts."""
        key, *others = [name for name in ("hidden_states", "top_k", *vars(self)) if getattr(self, name) is not None]
        prompts = PROMPT_KEYS if key == "hidden_states" else ()
        others = [name for name in dict.fromkeys(others) if name not in (key, *prompts)]
        if others:
            problem = f"{getattr(self, key)} replaces the teacher's model, but {others[0]} is given, too"
            raise ConfigError(f"{key}: {problem}; give null for {', '.join(others)}", key)


def weights_in_words(model: dict, named: Callable[[str], str] = str, kind: Callable[[str], str] = str) -> str:
    """Where the weights of a section come from, for people. named, kind: write a path or name, and a kind of model."""
    if model["path"] is not None:
        return named(model["path"])
    config = model.get("config") or {}
    what = f"({kind(config.get('model_type', 'unknown'))})"
    if IN_MEMORY not in config:
        return f"random weights {what}"
    return f"{named(name)}, given in memory" if (name := config[IN_MEMORY]) else f"a model in memory {what}"


def check_several(teachers: dict[str, TeacherConfig], by_file: dict[str, str], method: str) -> None:
    """Raises ConfigError for teachers that can't be told apart, or that the method can't have.

    by_file: the teachers of rows that name none, as `data.teachers` has them.
    """
    if not teachers:
        raise ConfigError("teachers: is empty; name some, or give teacher", "teachers")
    if method == "minillm":
        problem = "minillm draws tokens from a mixture of the student and one teacher"
        raise ConfigError(f"teachers: {problem}; give teacher, or another method", "teachers")
    for name, teacher in teachers.items():
        if not re.fullmatch(r"[\w-]{1,60}", name):
            problem = f'"{name[:60]}" is no name of a teacher; use letters, digits, "_" and "-"'
            raise ConfigError(f"teachers: {problem}", "teachers")
        if teacher.top_k is not None:
            problem = "a server's likeliest tokens can't be one of several teachers"
            raise ConfigError(f"teachers.{name}.top_k: {problem}; give teacher.top_k alone", "teachers")
    for file, name in by_file.items():
        if name not in teachers:
            problem = f"{file[:60]} has teacher {json.dumps(name)[:60]}, expected one of {', '.join(teachers)}"
            raise ConfigError(f"data.teachers: {problem}", "data.teachers")
