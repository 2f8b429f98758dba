"""A model that reads prompts and continues them: slots of keys and values, attention over them, fast CPU products."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError
from ..models import forms, wrappers
from ..models.attention import Settings, by_own_place, option, packed_attention, read_settings
from ..models.causal_lm import CausalLM, compute_dtype
from ..models.packed import PackedCausalLM
from ..models.sinks import written_out

NAME = "abkd_slots"


class Decoder:
    """One model, with slots for the keys and values of sequences in progress. A context manager.

    Each sequence attends to its keys on its own: no padding, and the same rounding in any batch. `GraphDecoder` is the
    one for GPUs.
    """

    def __init__(self, model: PackedCausalLM, slots: int, capacity: int) -> None:
        """Sequences may have `capacity` tokens. The model has to be `prepared`."""
        self.model, self.slots, self.capacity = model, slots, capacity
        self.device = model.head.weight.device
        self.keys: list[Tensor] = []  # one for each layer
        self.values: list[Tensor] = []

    def __enter__(self) -> "Decoder":
        for layer, product in [*self._fast_products()]:
            layer.forward = product
        return self

    def __exit__(self, *error: object) -> None:
        for layer in projections(self.model):
            layer.__dict__.pop("forward", None)

    def prefill(self, prompts: dict[int, list[int]]) -> Tensor:
        """Reads whole prompts into their slots, packed end to end. Returns the logits [B, V] after each prompt."""
        lengths = [len(prompt) for prompt in prompts.values()]
        slots = [slot for slot, prompt in prompts.items() for _ in prompt]
        tokens = [token for prompt in prompts.values() for token in prompt]
        positions = [position for length in lengths for position in range(length)]
        starts = [0, *itertools.accumulate(lengths)]
        self.reads_prompts = True
        uploaded = upload([*slots, *tokens, *positions, *starts], self.device)
        inputs, boundaries = uploaded[: 3 * len(tokens)].view(3, -1), uploaded[3 * len(tokens) :]
        hidden = self._hidden_states(inputs, boundaries.int(), max(lengths))  # [T, H]
        return self._logits(hidden.index_select(0, boundaries[1:] - 1))

    def decode(self, sequences: dict[int, list[int]]) -> Tensor:
        """Reads each sequence's last token; its slot has the others. Returns the logits [B, V] after that token."""
        self.reads_prompts = False
        self.rows = [(slot, len(tokens)) for slot, tokens in sequences.items()]
        last = [[slot, tokens[-1], len(tokens) - 1] for slot, tokens in sequences.items()]
        return self._logits(self._hidden_states(torch.tensor(last).T))

    def _hidden_states(self, inputs: Tensor, boundaries: Tensor | None = None, longest: int | None = None) -> Tensor:
        """The final hidden states [T, H] of T tokens, given their slots, tokens and positions [3, T].

        boundaries: where packed prompts start and the last one ends; None for single tokens.
        """
        self.layer, self.where = 0, (inputs[0], inputs[2])
        return self.model.run_body(inputs[1:2], inputs[2:], boundaries, longest, decoder=self)[0]

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self.model.head
        logits = self.model.logit_map(head(hidden.to(head.weight.dtype)))  # [B, V]
        return logits if logits.dtype == torch.float64 else logits.float()

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new tokens' keys and values [1, key heads, T, dim] in their slots.

        Returns the layer's keys and values of all slots, [slots, key heads, capacity, dim].
        """
        if self.layer == len(self.keys):
            self.keys.append(value.new_empty(self.slots, key.shape[1], self.capacity, key.shape[3]))
            self.values.append(value.new_empty(self.slots, value.shape[1], self.capacity, value.shape[3]))
        keys, values = self.keys[self.layer], self.values[self.layer]
        slots, positions = self.where
        keys[slots, :, positions] = key[0].transpose(0, 1).to(keys.dtype)
        values[slots, :, positions] = value[0].transpose(0, 1)
        self.layer += 1
        return keys, values

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, settings: Settings) -> Tensor:
        """Attention of one query a sequence [1, heads, B, dim] over its slot's tokens: [1, B, heads, values' dim]."""
        # One call takes all queries that share a key head, in the time of a single one.
        query = query[0].transpose(0, 1).to(keys.dtype)
        query = query.unflatten(1, (keys.shape[1], -1))  # [B, key heads, heads / key heads, dim]
        is_plain = settings.softcap is None and settings.sinks is None
        outputs = []
        for row, (slot, length) in enumerate(self.rows):
            seen = slice(settings.first_seen(length), length)
            q, k, v = query[row : row + 1], keys[slot : slot + 1, :, seen], values[slot : slot + 1, :, seen]
            if is_plain:
                outputs.append(F.scaled_dot_product_attention(q, k, v, scale=settings.scale))
            else:
                outputs.append(one_query_written_out(q, k, v, None, settings))
        return torch.cat(outputs).flatten(1, 2)[None]

    def _fast_products(self) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
        """On a CPU in float32, layers and what computes them from a copy of the weight that oneDNN has rearranged once.

        A product of few rows then takes half to a fifth of the time. With two rows or more, a row has the same bits
        whatever the others are.
        """
        for layer in projections(self.model):
            if rearranges(layer.weight.device, layer.weight.dtype) and not torch.is_autocast_enabled("cpu"):
                weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight  # [out, in]
                arranged = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
                yield layer, functools.partial(_product, arranged, layer.bias)


def upload(numbers: list[int], device: torch.device) -> Tensor:
    """Whole numbers on the device. The host does not wait for a GPU."""
    return torch.tensor(numbers, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def one_query_written_out(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, settings: Settings) -> Tensor:
    """Attention of one query a sequence by matrix products. q: [B, key heads, heads / key heads, dim]; `written_out`
    has the other arguments."""
    sinks = None if settings.sinks is None else settings.sinks.view(*q.shape[1:3], 1)
    return written_out(q, k, v, seen, settings.scale, settings.softcap, sinks)


def slot_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, dim]
    key: Tensor,  # [1, key heads, T, dim]
    value: Tensor,  # [1, key heads, T, its own dim]
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention within packed prompts, or of one new token a sequence over its slot: [1, T, heads, values' dim].

    options: as in `packed_attention`, and the decoder.
    """
    decoder = option(options, "decoder")
    keys, values = decoder.store(key, value)
    if decoder.reads_prompts:
        return packed_attention(module, query, key, value, attention_mask, **options)
    query = by_own_place(module, query, options)
    out = decoder.attend(query, keys, values, read_settings(module, query, options))
    return out[..., : value.shape[-1]].contiguous(), None


@contextlib.contextmanager
def prepared(model: CausalLM | PreTrainedModel) -> Iterator[CausalLM]:
    """Makes a model ready for a decoder, in eval mode; undoes that at the end.

    A multimodal model's language model is taken. Raises ConfigError for a model that is right in no form, and on a GPU
    for a packed one that computes in more than 16 bits. A CausalLM has been checked already.
    """
    is_checked = isinstance(model, CausalLM)
    inner = model.causal_lm if is_checked else wrappers.language_model(model)
    implementation, training = inner.config._attn_implementation, (inner if is_checked else model).training
    try:
        if not is_checked:
            model = forms.choose(inner.config, "model", model.device).build(inner, "model")
        weight, is_packed = model.head.weight, model.form == "packed"
        if is_packed and weight.device.type == "cuda" and (dtype := compute_dtype(weight)).itemsize > 2:
            name, way_out = str(dtype).removeprefix("torch."), 'torch.autocast("cuda", torch.bfloat16)'
            problem = f"it computes in {name}, but attention on a GPU needs 16 bits"
            raise ConfigError(f"{model.key}: {problem}: sample under {way_out}, or convert it to bfloat16")
        if not is_checked:
            model.check()
        inner.eval()
        if is_packed:
            inner.set_attn_implementation(NAME)
        # Compiled layers would be compiled again for every step.
        is_compiled = any(module._compiled_call_impl for module in inner.modules())
        eager = torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext()
        with eager:
            yield model
    finally:
        if inner.config._attn_implementation != implementation:
            inner.set_attn_implementation(implementation)
        inner.train(training)


def projections(model: nn.Module) -> list[nn.Module]:
    """The layers that multiply with a weight."""
    return [module for module in model.modules() if type(module) in (nn.Linear, Conv1D)]


def rearranges(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products use a rearranged copy of weights of this kind."""
    return device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()


def padded_rows(count: int) -> int:
    """The number of rows, rounded up to one of few, by a quarter at most.

    oneDNN keeps a kernel for each number that it has met: hundreds of kilobytes each, a thousand of them.
    """
    step = 1 << max(0, (count - 1).bit_length() - 3)
    return max(2, -(-count // step) * step)  # it has another kernel for one row, which rounds differently


def _product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    padding = padded_rows(len(rows)) - len(rows)
    padded = F.pad(rows, (0, 0, 0, padding)) if padding else rows
    out = torch.ops.mkldnn._linear_pointwise(padded, weight, bias, "none", [], "")
    return out[: len(rows)].view(*x.shape[:-1], -1)


AttentionInterface.register(NAME, slot_attention)
