"""Models as transformers' Trainer has them: wrapped by accelerate, and used for other things before and after."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models import forms, loading
from ..models.attention import NAME
from ..models.causal_lm import CausalLM


def form_of(model: nn.Module, key: str, device: torch.device) -> CausalLM:
    """The model, packed if that computes the same. Raises ConfigError where it is right in no form."""
    inner = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    loading.fuse_activations(inner)
    before = inner.config._attn_implementation
    form = forms.choose(inner.config, key, device).build(model, key)
    inner.set_attn_implementation(before)
    return form


@contextlib.contextmanager
def packed_attention(models: Iterable[CausalLM]) -> Iterator[None]:
    """A context in which the models read packed rows, also where backward computes layers again."""
    packed = [each.causal_lm for each in models if each.form == "packed"]
    before = [model.config._attn_implementation for model in packed]
    for model in packed:
        model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        for model, name in zip(packed, before, strict=True):
            model.set_attn_implementation(name)


@contextlib.contextmanager
def entered(student: CausalLM, wrapped: nn.Module, loss_of: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """A context in which the student runs by way of `wrapped`, which may be itself, and tells its logits.

    loss_of: gets what the output projection reads, where the model calls it: sharded weights are gathered there. The
    logits depend on its result: DDP takes weights that the outputs don't lead to for unused.
    """
    logits, head = [], student.head

    def call(**inputs: Any) -> Any:
        keep = head.forward
        head.forward = lambda hidden: keep(hidden) + 0.0 * loss_of(hidden)
        outputs = wrapped(**inputs)
        head.forward = keep
        logits.append(outputs.logits)
        return outputs

    student.entry = call
    try:
        yield logits
    finally:
        student.entry = None
