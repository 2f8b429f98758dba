"""What a folder of hidden states says about its making, for machines that have neither the teacher nor the data."""

import contextlib
import copy
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..config.models import weights_in_words
from ..config.schema import Config
from ..data.chat import SECONDS, PromptFormat
from ..data.time_limit import time_limit
from ..errors import printable
from ..losses.arguments import LogitMap
from ..models.identity import portable_config
from ..models.tokenizers import take_back_values
from ..models.vocabularies import Vocabulary

DATA_KEYS = ("begin_token", "train_on", "chat_template_kwargs", "max_prompt_length", "max_length")


@dataclasses.dataclass(frozen=True)
class Origin:
    """The teacher of a folder, and how rows became its samples."""

    teacher: str  # its name, for people
    config: str  # its configuration as JSON
    logit_map: LogitMap
    settings: dict  # of the samples, by their names for people
    vocabulary: dict[str, int]  # the tokens of its tokenizer, or of the run's where it brings none

    @classmethod
    def of(cls, config: Config, teacher: PretrainedConfig, logit_map: LogitMap, vocabulary: Vocabulary) -> "Origin":
        spec, theirs = config.teacher, vocabulary.teacher_tokenizer
        theirs = vocabulary.tokenizer if theirs is None else theirs
        name = weights_in_words(vars(spec), _name)
        if spec.adapter is not None:
            name += f" with {_name(spec.adapter)}"
        if spec.quantize is not None:
            name += f" in {spec.quantize}"
        tokens = dict(sorted(theirs.get_vocab().items(), key=lambda item: item[1]))
        return cls(name, portable_config(teacher), logit_map, settings_of(config, vocabulary), tokens)


def settings_of(config: Config, vocabulary: Vocabulary) -> dict:
    """What decides which tokens rows become, by the names for people. Long ones are hashes."""
    tokenizer = vocabulary.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    tokens = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    values = {"the tokenizer": _hash(tokens), "the chat template": _hash(str(tokenizer.chat_template))}
    spec = config.teacher
    if spec.system is not None:
        values["teacher.system"] = _hash(spec.system)
    if spec.chat_template is not None:
        values["teacher.chat_template"] = _hash(pathlib.Path(spec.chat_template).read_text(encoding="utf-8"))
    if spec.chat_template_kwargs is not None:
        values["teacher.chat_template_kwargs"] = spec.chat_template_kwargs
    return values | {f"data.{key}": getattr(config.data, key) for key in DATA_KEYS}


def date_note(config: Config, key: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A line about a chat template of the teacher's prompts that writes the date; None for others. key: the teacher's.

    The tokenizer is the run's.
    """
    spec, kwargs, tokenizer = config.teacher, config.data.chat_template_kwargs or {}, copy.copy(tokenizer)
    if spec.chat_template_kwargs is not None:
        take_back_values(tokenizer, PromptFormat.from_config(config.data))
        kwargs = spec.chat_template_kwargs
    if spec.chat_template is not None:
        tokenizer.chat_template = pathlib.Path(spec.chat_template).read_text(encoding="utf-8")
    if "strftime_now" not in str(tokenizer.chat_template):
        return None

    def prompt(day: str) -> str:
        question = [{"role": "user", "content": "question"}]
        values = {**kwargs, "strftime_now": lambda _: day}
        return tokenizer.apply_chat_template(question, tokenize=False, **values)

    with contextlib.suppress(Exception), time_limit(SECONDS):  # a template is a program, and may fail in any way
        if prompt("one") == prompt("other"):
            return None
    section = "data" if spec.chat_template is None and spec.chat_template_kwargs is None else key
    return (
        "the chat template writes the date, so rows with messages become other tokens on another day; give it one date "
        f"in {section}.chat_template_kwargs (for Llama 3.2: date_string), or another {section}.chat_template"
    )


def differences(theirs: dict, ours: dict) -> Iterator[str]:
    """What differs between the settings of a folder and those of a run, in words."""
    for name in {**ours, **theirs}:
        if theirs.get(name) == ours.get(name):
            continue
        if name.startswith("data."):
            yield f"{name} is {json.dumps(theirs.get(name))} there and {json.dumps(ours.get(name))} here"
        else:
            yield f"{printable(name)} is another one there"


def _name(path: str) -> str:
    """A folder's own name, or a Hub name. The folders above say where a person works."""
    return pathlib.Path(path).resolve().name if pathlib.Path(path).exists() else path


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
