"""The arguments of the DistillationTrainer, checked before a model is changed. All mistakes are ConfigErrors."""

import numbers
import os
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from ..errors import ConfigError, reading
from ..losses.arguments import LossSpec, check_loss
from ..losses.divergences import Divergence, parse
from .rows import NO_TOKENS, collate_rows

NO_USE = {
    "model_init": "the student is checked before: give it as model",
    "data_collator": "rows are packed by this trainer's own: leave it out, and give rows with input_ids and labels",
    "compute_loss_func": "the loss is a divergence: give divergence",
    "compute_metrics": "no logits are held that it could get: leave it out, or call it in a callback",
    "preprocess_logits_for_metrics": "no logits are held that it could get: leave it out",
}


def check_options(options: dict[str, Any]) -> None:
    """Refuses arguments of `transformers.Trainer` that have no meaning here."""
    for name, way_out in NO_USE.items():
        if options.get(name) not in (None, collate_rows):
            raise ConfigError(f"{name} can't be used: {way_out}")


def check_settings(args: TrainingArguments) -> None:
    """Refuses training arguments under which the losses would be others than these, or none."""
    if not isinstance(args, TrainingArguments):
        expected = "expected transformers.TrainingArguments"
        raise ConfigError(f"args is a {type(args).__name__}, {expected}: TrainingArguments(output_dir, …)")
    if args.label_smoothing_factor:
        problem = f"label_smoothing_factor is {args.label_smoothing_factor}, expected 0"
        raise ConfigError(
            f"{problem}: the loss has no smoothed labels; a teacher at a temperature above 1 smooths, too"
        )
    if args.accelerator_config.dispatch_batches:
        raise ConfigError("accelerator_config: dispatch_batches would cut packed rows into pieces: leave it out")
    if args.n_gpu > 1:  # so would transformers
        raise ConfigError(f"one process sees {args.n_gpu} GPUs: start one for each (torchrun), or show it one alone")
    if is_deepspeed_zero3_enabled():
        raise ConfigError("deepspeed: ZeRO stage 3 shards what the losses read; take stage 2, or FSDP")


def loss_options(divergence: Divergence | str, temperature: float, hard_weight: float) -> dict[str, Any]:
    """The arguments of the loss. Raises ValueError for a number out of range, and for a spelling of no divergence."""
    if isinstance(divergence, str):
        divergence = parse(divergence)
    if not isinstance(divergence, Divergence):
        expected = "expected one of abkd_fast.losses.divergences, or its spelling"
        raise ConfigError(f"divergence is a {type(divergence).__name__}, {expected}: AlphaBeta(0.2, 0.7)")
    for name, value in (("temperature", temperature), ("hard_weight", hard_weight)):
        if not isinstance(value, numbers.Real):
            raise ConfigError(f"{name} is {value!r}, expected a number")
    check_loss(LossSpec(divergence, temperature, hard_weight), "sum", torch.empty(0), 0)
    return {"divergence": divergence, "temperature": temperature, "hard_weight": hard_weight}


def check_rows(name: str, rows: Any) -> None:
    """Refuses rows that are not tokenized, where their columns are known. `name` is that of their argument."""
    if name == "train_dataset" and isinstance(rows, dict):
        raise ConfigError(f"{name} has the splits {', '.join(rows)}, expected one data set: {name}=rows[…]")
    for part in rows.values() if isinstance(rows, dict) else [rows]:
        columns = getattr(part, "column_names", None)
        if columns is not None and "input_ids" not in columns:
            raise ConfigError(f"{name} has the columns {', '.join(columns)}; {NO_TOKENS}")


def load_model(name: str, model: Any) -> PreTrainedModel | nn.Module:
    """The model, which may be a transformers model, peft's wrapper around one, a folder, or a name on the Hub."""
    if isinstance(model, str | os.PathLike):
        with reading(f"{name}: {model} can't be loaded", "; give a model, a folder or a name on the Hub"):
            model = AutoModelForCausalLM.from_pretrained(os.fspath(model), trust_remote_code=False)
    if not isinstance(model, PreTrainedModel) and not hasattr(model, "get_base_model"):
        expected = "expected a transformers model, a PEFT model, a folder or a name on the Hub"
        raise ConfigError(f"{name} is a {type(model).__name__}, {expected}")
    return model


def check_models(model: nn.Module, teacher: nn.Module | None, is_trained: bool) -> None:
    """Refuses a student that can't be trained, and a teacher that is the student or within it.

    is_trained: whether there are rows to train on.
    """
    if is_trained and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("model: none of its weights requires a gradient; call requires_grad_() on what is to learn")
    own = {*model.parameters()}
    if teacher is not None and any(parameter in own for parameter in teacher.parameters()):
        raise ConfigError("model and teacher share weights, which can't be trained and frozen: load the teacher apart")
