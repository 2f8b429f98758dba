"""What a folder of hidden states says about its making, for machines that have neither the teacher nor the data."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator

from transformers import PretrainedConfig

from ..config.schema import Config
from ..losses.arguments import LogitMap
from ..models.identity import portable_config
from ..models.vocabularies import Vocabulary

DATA_KEYS = ("begin_token", "train_on", "chat_template_kwargs", "max_prompt_length", "max_length")


@dataclasses.dataclass(frozen=True)
class Origin:
    """The teacher of a folder, and how rows became its samples."""

    teacher: str  # its name, for people
    config: str  # its configuration as JSON
    logit_map: LogitMap
    settings: dict  # of the samples, by their names for people
    vocabulary: dict[str, int] | None  # its tokens; None: the tokenizer is the run's

    @classmethod
    def of(cls, config: Config, teacher: PretrainedConfig, logit_map: LogitMap, vocabulary: Vocabulary) -> "Origin":
        spec, theirs = config.teacher, vocabulary.teacher_tokenizer
        name = f"random weights ({teacher.model_type})" if spec.path is None else _name(spec.path)
        if spec.adapter is not None:
            name += f" with {_name(spec.adapter)}"
        if spec.quantize is not None:
            name += f" in {spec.quantize}"
        tokens = None if theirs is None else dict(sorted(theirs.get_vocab().items(), key=lambda item: item[1]))
        return cls(name, portable_config(teacher), logit_map, settings_of(config, vocabulary), tokens)


def settings_of(config: Config, vocabulary: Vocabulary) -> dict:
    """What decides which tokens rows become, by the names for people. Long ones are hashes."""
    tokenizer = vocabulary.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    tokens = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    values = {"the tokenizer": _hash(tokens), "the chat template": _hash(str(tokenizer.chat_template))}
    return values | {f"data.{key}": getattr(config.data, key) for key in DATA_KEYS}


def differences(theirs: dict, ours: dict) -> Iterator[str]:
    """What differs between the settings of a folder and those of a run, in words."""
    for name, value in ours.items():
        if theirs.get(name) == value:
            continue
        if name.startswith("data."):
            yield f"{name} is {json.dumps(theirs.get(name))} there and {json.dumps(value)} here"
        else:
            yield f"{name} is another one there"


def _name(path: str) -> str:
    """A folder's own name, or a Hub name. The folders above say where a person works."""
    return pathlib.Path(path).resolve().name if pathlib.Path(path).exists() else path


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
