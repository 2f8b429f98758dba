"""The text of `--help` about the keys of a recipe."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator
from typing import Annotated, Literal

from .schema import Config

REFUSED = ("teacher.lora",)  # a key of models that the teacher must not have


def describe(cls: type = Config, prefix: str = "") -> Iterator[str]:
    """Lines of text: every section, and every key with its meaning, its default and its other values."""
    yield f"{prefix.rstrip('.') or 'top level'}: {cls.__doc__}"
    hints, notes = typing.get_type_hints(cls), typing.get_type_hints(cls, include_extras=True)
    sections = {}
    for field in dataclasses.fields(cls):
        name, options = prefix + field.name, (hints[field.name], *typing.get_args(hints[field.name]))
        if name in REFUSED:
            continue
        sections |= {f"{name}.": option for option in options if dataclasses.is_dataclass(option)}
        if typing.get_origin(notes[field.name]) is Annotated:
            required = field.default is dataclasses.MISSING
            default = "required" if required else json.dumps(field.default)
            if typing.get_origin(hints[field.name]) is Literal:
                others = {*typing.get_args(hints[field.name])} - {field.default}
                default = f"{default}, or {', '.join(sorted(map(json.dumps, others)))}"
            yield f"  {name:22} {notes[field.name].__metadata__[0]} [{default}]"
    yield ""
    for name, section in sections.items():
        yield from describe(section, name)
