"""Recipes in YAML, read about as YAML 1.2 says: `1e-4` is a number, and `off` is text."""

import re
from typing import Any

import yaml

from ..errors import ConfigError


class _Loader(yaml.SafeLoader):
    """PyYAML reads YAML 1.1, where `mode: off` is false and `lr: 1e-4` is text."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - PyYAML's own way

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            problem = "what an alias stands for is not read; write it out, or take it from a base"
            raise ConfigError(f"*{event.anchor}: {problem}")
        if event.tag not in (None, "!"):
            raise ConfigError(f"line {event.start_mark.line + 1}: a tag ({event.tag}) is not read; leave it out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name in names:
            if not isinstance(name, str):
                raise ConfigError(f"{name!r}: expected a name before the colon, in quotation marks if it is a number")
            if names.count(name) > 1:
                raise ConfigError(f"{name}: written twice")
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), [*_first, ""])


def _number(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node))


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:float", _number)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def read(text: str) -> Any:
    """The value of a YAML document. Raises ConfigError, with the line, for what is broken, and for a key twice."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{line}broken YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"broken YAML: {error}") from None
