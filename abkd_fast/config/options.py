"""The command line's view of configuration sections: options made from fields, and `--help` about the keys of a recipe.

Imports no PyTorch.
"""

import argparse
import contextlib
import dataclasses
import json
import typing
from collections.abc import Iterator

from ..errors import JSON_ERRORS, ConfigError, is_deep
from .schema import Config, DataConfig, SamplingConfig
from .training import TrainConfig


def add_options(parser: argparse.ArgumentParser, section: type, *names: str, **defaults: object) -> None:
    """Adds an option for each named field, with the field's help text, type, choices and (other) default."""
    hints, notes = typing.get_type_hints(section), typing.get_type_hints(section, include_extras=True)
    for name in names:
        default, text = defaults.get(name, getattr(section, name)), notes[name].__metadata__[0]
        alternatives = typing.get_args(hints[name])  # of a Literal: its values; of "int | None": the types
        of_types = not alternatives or isinstance(alternatives[0], type)
        values = {"type": (alternatives or [hints[name]])[0], "metavar": "N"} if of_types else {"choices": alternatives}
        shown = text if default is None else f"{text} [{default}]"
        parser.add_argument(f"--{name.replace('_', '-')}", **values, default=default, help=shown)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds what all commands that sample from a model say about it, besides its name."""
    parser.add_argument("--tokenizer", metavar="DIR", help="folder or Hub name (default: the model's)")
    help_of = {name: note.__metadata__[0] for name, note in DataConfig.__annotations__.items()}
    begins = {"choices": ("auto", "true", "false"), "default": "auto"}
    parser.add_argument("--begin-token", **begins, help=f"{help_of['begin_token']} [auto]")
    parser.add_argument("--chat-template", metavar="FILE", help=help_of["chat_template"])
    parser.add_argument("--chat-template-kwargs", metavar="JSON", help=help_of["chat_template_kwargs"])
    add_options(parser, SamplingConfig, "batch_size")
    add_options(parser, TrainConfig, "device", "dtype")


def prompt_options(options: argparse.Namespace) -> dict:
    """The values of begin_token and chat_template_kwargs. Raises ConfigError for what is no JSON object."""
    text, kwargs = options.chat_template_kwargs, None
    if text is not None:
        with contextlib.suppress(*JSON_ERRORS):
            kwargs = json.loads(text)
        if not isinstance(kwargs, dict) or is_deep(kwargs):
            problem = f"chat_template_kwargs: {text[:60]}: expected a JSON object"
            raise ConfigError(f'{problem}, for example {{"enable_thinking": false}}')
    begins = {"auto": "auto", "true": True, "false": False}
    return {"begin_token": begins[options.begin_token], "chat_template_kwargs": kwargs}


def describe(cls: type = Config, prefix: str = "") -> Iterator[str]:
    """Lines of text: every section, and every key with its meaning, its default and its other values."""
    yield f"{prefix.rstrip('.') or 'top level'}: {cls.__doc__}"
    hints, sections = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        name, hint = prefix + field.name, hints[field.name]
        if name in ("teacher.lora", "student.device_map"):  # keys of models that this one must not have
            continue
        sections |= {
            f"{name}.": option for option in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(option)
        }
        if hasattr(field.type, "__metadata__"):
            default = "required" if field.default is dataclasses.MISSING else json.dumps(field.default)
            if typing.get_origin(hint) is typing.Literal:
                others = {*typing.get_args(hint)} - {field.default}
                default = f"{default}, or {', '.join(sorted(map(json.dumps, others)))}"
            yield f"  {name:22} {field.type.__metadata__[0]} [{default}]"
    yield ""
    for name, section in sections.items():
        yield from describe(section, name)
