"""Command-line options made from the fields of configuration sections. Imports no PyTorch."""

from __future__ import annotations

import argparse
import typing

from .schema import SamplingConfig, TrainConfig


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
    add_options(parser, SamplingConfig, "batch_size")
    add_options(parser, TrainConfig, "device", "dtype")
