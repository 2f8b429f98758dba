"""LoRA adapters, through peft: compare them with their model, attach or merge them.

peft takes a second or two to import, and most runs don't need it. Import this module where an adapter is used.
"""

import logging
import os
import re

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..config.models import ModelConfig
from ..errors import ConfigError, printable, reading
from . import wrappers
from .identity import find_adapter


def check_adapter(model: PreTrainedModel, spec: ModelConfig, key: str) -> int:
    """Compares an adapter with its model, given on the meta device; returns how many weights the adapter has.

    The meta model is changed. Raises ConfigError where the adapter doesn't fit. An adapter of the output projection is
    refused: the losses read that as one frozen matrix.
    """
    source = f"{key}.adapter: {spec.adapter}" if spec.adapter else f"{key}.lora.targets: {', '.join(spec.lora.targets)}"
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embeddings.weight
    if spec.lora is not None:
        _check_targets(model, spec, key)
    with reading(f"{source} can't be used"):  # broken or foreign files, names of modules that aren't there
        settings = _settings(model, spec, key)
        if settings.peft_type != peft.PeftType.LORA:
            raise ConfigError(f"{key}.adapter: {spec.adapter} is a {settings.peft_type.value} adapter, expected LORA")
        with torch.device("meta"):
            ours = peft.get_peft_model_state_dict(peft.PeftModel(model, settings), save_embedding_layers=False)
        theirs = peft.load_peft_weights(str(find_adapter(spec.adapter, key)), "cpu") if spec.adapter else ours
    if model.get_output_embeddings() is not head or (tied and model.get_input_embeddings() is not embeddings):
        raise ConfigError(f"{source}: adapts the output projection, which has to stay as it is here")
    sizes = [{name: list(tensor.shape) for name, tensor in tensors.items()} for tensors in (theirs, ours)]
    inside = f"base_model.model.{place}." if (place := wrappers.language_place(model)) else ""
    outside = [name for name in ours if not name.startswith(inside)]
    if key == "student" and outside:
        raise ConfigError(f"{source} adapts {outside[0]}, but the language model ({place}) alone is trained here")
    for name in sorted({*theirs, *ours}):
        there, here = (shapes.get(name, "missing") for shapes in sizes)
        if there != here:
            raise ConfigError(f"{source} doesn't fit {key}.path: {spec.path}: {name} is {there} there, {here} here")
    return sum(tensor.numel() for tensor in ours.values())


def _check_targets(model: PreTrainedModel, spec: ModelConfig, key: str) -> None:
    """Raises ConfigError for an unknown target. peft complains only if it finds none of them."""
    model = wrappers.language_model(model)
    projections = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    for target in spec.lora.targets:
        if not any(f".{name}".endswith(f".{target}") for name in projections):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in projections}))
            kind = model.config.model_type
            raise ConfigError(f"{key}.lora.targets: no {target} in a {kind} model; its projections are {known}")


def _settings(model: PreTrainedModel, spec: ModelConfig, key: str) -> peft.PeftConfig:
    if spec.adapter is not None:
        settings = peft.PeftConfig.from_pretrained(str(find_adapter(spec.adapter, key)))
        if spec.dropout is not None:
            settings.lora_dropout = spec.dropout
        return settings
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.lora.rank,
        lora_alpha=spec.lora.alpha,
        lora_dropout=spec.lora.dropout if spec.dropout is None else spec.dropout,
        target_modules=_targets(model, spec),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )


def _targets(model: PreTrainedModel, spec: ModelConfig) -> list[str] | str:
    """The projections' names, or an expression for those of a multimodal model's language model alone."""
    place, names = wrappers.language_place(model), spec.lora.targets
    return rf"{re.escape(place)}\.(.*\.)?({'|'.join(map(re.escape, names))})" if place else list(names)


def attach_adapter(model: PreTrainedModel, spec: ModelConfig, key: str) -> peft.PeftModel:
    """The frozen model with its trainable adapter, which is in at least float32."""
    settings = _settings(model, spec, key)
    with reading(f"{key}: an adapter can't be attached to its layers"):  # peft may not know quantized ones
        if spec.lora is not None:
            adapted = peft.get_peft_model(model, settings)
        else:
            folder = str(find_adapter(spec.adapter, key))
            adapted = peft.PeftModel.from_pretrained(model, folder, config=settings, is_trainable=True)
    settings = adapted.peft_config["default"]
    base = os.path.abspath(spec.path) if os.path.isdir(spec.path) else spec.path
    if spec.adapter is not None and settings.base_model_name_or_path not in (base, spec.path):
        logging.getLogger("abkd_fast").warning(
            printable(
                f"{key}.adapter: {spec.adapter} was trained on {settings.base_model_name_or_path}, "
                f"and goes on {base} now"
            )
        )
    settings.base_model_name_or_path = base
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False  # else autocast's 16 bits become 32 before the dropout
    return adapted


def merge_adapter(model: PreTrainedModel, spec: ModelConfig, key: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model with the adapter's product added to its float32 weights, converted to `dtype`."""
    with reading(f"{key}.adapter: {spec.adapter} can't be merged"):  # its weights may not be finite
        adapted = peft.PeftModel.from_pretrained(model, str(find_adapter(spec.adapter, key)))
        merged = adapted.merge_and_unload(safe_merge=True)
    for parameter in merged.parameters():  # buffers keep float32: rotary frequencies need it
        parameter.data = parameter.data.to(dtype)
    return merged
