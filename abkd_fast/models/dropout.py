"""The dropout rates of a model, which every family calls by names of its own."""

import copy
import logging
import re
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from ..errors import reading
from . import attention, forms
from .packed import PackedCausalLM

# The names of transformers' causal families, without those of classifiers and summaries, which no causal model reads.
RATE = re.compile(r"(?!classifier|summary)\w*(dropout|pdrop)(_p|_prob|_rate)?")
LAYER_RATE = re.compile(r"\w*layerdrop")


def set_rates(config: PretrainedConfig, rate: float, key: str) -> None:
    """Sets every dropout rate of a configuration. Zero also keeps all layers, of which LayerDrop leaves some out.

    Raises ConfigError for a rate that transformers doesn't take: MPT's attn_pdrop has to be a whole number.
    """
    for part, name in _rates(config):
        problem = f"{key}.dropout is {rate}, but a {config.model_type} model can't have that as {name}"
        with reading(problem, ": give 0, or leave it out"):
            _set(part, name, rate)
    for part, name in _rates(config, LAYER_RATE) if rate == 0 else ():
        _set(part, name, rate)


def set_modules(model: nn.Module, rate: float) -> None:
    """Sets the rates of a model's dropout modules, some of which no key of the configuration decides.

    A module whose rate is 0 stays so: a GPU's attention may have no dropout, and some models have none at a place.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p:
            module.p = rate


def without_rates(values: dict) -> dict:
    """JSON values of a configuration without its dropout rates. A model that is not trained has no dropout."""
    values = copy.deepcopy(values)
    for part, name in _rates(values):
        del part[name]
    return values


def remove_from_attention(config: PretrainedConfig, key: str, device: torch.device) -> None:
    """Sets the rates of packed attention to 0, with a warning: PyTorch's attention has no dropout on a GPU.

    A padded model has attention of its own, and keeps them.
    """
    is_packed = forms.choose(config, key, device).problem is None
    for part, name in _rates(config) if is_packed else ():
        rate = _values(part)[name]
        if rate and _reaches_attention(config, rate, name):
            logging.getLogger("abkd_fast").warning(
                f"{key}: {name} is {rate}, but PyTorch's attention has no dropout on a GPU; it is set to 0 "
                "(install flash-attn to keep it)"
            )
            _set(part, name, 0.0)


def _reaches_attention(config: PretrainedConfig, rate: float, name: str) -> bool:
    """Whether attention is given this rate, found out on a small model that has no other."""
    config = copy.deepcopy(config)
    for part, other in _rates(config):
        _set(part, other, rate if other == name else 0.0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = PackedCausalLM(forms.small_model(config), "student").train()
        attention.used.clear()
        model.difference(forms.LENGTHS)
    return "dropout" in attention.used


def _rates(part: dict | PretrainedConfig, names: re.Pattern = RATE) -> list[tuple[dict | PretrainedConfig, str]]:
    """The dropout rates of a configuration and of its parts: the part that a rate is in, and its name."""
    found = []
    for name, value in _values(part).items():
        if isinstance(value, dict | PretrainedConfig):
            found += _rates(value, names)
        elif names.fullmatch(str(name)) and isinstance(value, int | float | None) and not isinstance(value, bool):
            found.append((part, name))
    return found


def _values(part: dict | PretrainedConfig) -> dict[str, Any]:
    return part if isinstance(part, dict) else vars(part)


def _set(part: dict | PretrainedConfig, name: str, rate: float) -> None:
    if isinstance(_values(part)[name], int) and rate == int(rate):
        rate = int(rate)  # transformers checks the types of some
    if isinstance(part, dict):
        part[name] = rate
    else:
        setattr(part, name, rate)
