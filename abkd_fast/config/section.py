"""The base of all sections of a configuration: the range of a value stands beside its key."""

import dataclasses
import typing

from ..errors import check_number

Text = typing.NewType("Text", str)  # prose of any length; other texts are names and paths


class Section:
    """A frozen dataclass with fields of type `Annotated[type, help, low, high]`; `low` and `high` may be left out.

    Raises ConfigError for a value below or above its range. None is always in range.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _, *limits = getattr(field.type, "__metadata__", [""])
            if limits:
                check_number(field.name, getattr(self, field.name), *limits)
