"""A model that reads prompts and continues them: slots of keys and values, attention over them, fast CPU products."""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .. import distributed
from ..models.attention import packed_attention
from ..models.packed import PackedCausalLM

NAME = "abkd_slots"
BUCKET = 256  # on a GPU all slots read keys up to the next multiple of this, so that few shapes occur


class Decoder:
    """One model, with slots for the keys and values of sequences in progress.

    On a CPU each sequence attends to its keys on its own: no padding, and the same rounding in any batch. On a GPU all
    slots, idle ones included, are computed at once: one shape for each bucket of lengths, replayed as a CUDA graph.
    """

    def __init__(self, model: PackedCausalLM, slots: int, capacity: int) -> None:
        """Sequences may have `capacity` tokens. The model has to be `prepared`."""
        self.model, self.slots, self.capacity = model, slots, capacity
        self.device = model.head.weight.device
        self.all_at_once = self.device.type == "cuda"
        self.keys: list[Tensor] = []  # one for each layer, [slots, key heads, capacity, dim]
        self.values: list[Tensor] = []
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        # The communication around the layers of a sharded model can't be captured.
        self.use_graphs = self.device.type == "cuda" and not distributed.is_sharded(model)
        self.inputs = torch.zeros(3, slots, dtype=torch.long, device=self.device)  # slot, token, position of each row
        self.inputs[0] = torch.arange(slots)

    def prefill(self, prompts: dict[int, list[int]]) -> Tensor:
        """Reads whole prompts into their slots, packed end to end. Returns the logits [B, V] after each prompt."""
        lengths = [len(prompt) for prompt in prompts.values()]
        starts = [0, *itertools.accumulate(lengths)]
        rows = [
            [slot for slot, prompt in prompts.items() for _ in prompt],
            [token for prompt in prompts.values() for token in prompt],
            [position for length in lengths for position in range(length)],
        ]
        self.reads_prompts = True
        boundaries = torch.tensor(starts, dtype=torch.int32, device=self.device)
        hidden = self._hidden_states(torch.tensor(rows, device=self.device), boundaries, max(lengths))  # [T, H]
        return self._logits(hidden[boundaries[1:] - 1])

    def decode(self, sequences: dict[int, list[int]]) -> Tensor:
        """Reads each sequence's last token; its slot has the others. Returns the logits [B, V] after that token."""
        self.reads_prompts = False
        self.rows = [(slot, len(tokens)) for slot, tokens in sequences.items()]
        last = [[slot, tokens[-1], len(tokens) - 1] for slot, tokens in sequences.items()]
        inputs = torch.tensor(last, device=self.device).T  # [3, B]
        if not self.all_at_once:
            return self._logits(self._hidden_states(inputs))
        self.inputs[1:] = 0
        self.inputs[:, inputs[0]] = inputs
        longest = max(length for _, length in self.rows)
        self.span = min(self.capacity, -(-longest // BUCKET) * BUCKET)
        hidden = self._replay() if self.use_graphs else self._hidden_states(self.inputs)
        return self._logits(hidden[inputs[0]])

    def _hidden_states(self, inputs: Tensor, boundaries: Tensor | None = None, longest: int | None = None) -> Tensor:
        """The final hidden states [T, H] of T tokens, given their slots, tokens and positions [3, T].

        boundaries: where packed prompts start and the last one ends; None for single tokens.
        """
        self.layer, self.where = 0, (inputs[0], inputs[2])
        return self.model.causal_lm.base_model(
            input_ids=inputs[1:2],
            position_ids=inputs[2:],
            use_cache=False,
            cu_seq_lens_q=boundaries,
            cu_seq_lens_k=boundaries,
            max_length_q=longest,
            max_length_k=longest,
            decoder=self,
        ).last_hidden_state[0]

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self.model.head
        logits = head(hidden.to(head.weight.dtype))  # [B, V]
        return logits if logits.dtype == torch.float64 else logits.float()

    def _replay(self) -> Tensor:
        """The same as `_hidden_states(self.inputs)`, from a CUDA graph if one can be captured."""
        if self.span not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            try:
                self._hidden_states(self.inputs)  # outside the graph: kernels are loaded and chosen
                torch.cuda.synchronize(self.device)
                # Another thread may pin memory meanwhile (data.batches.prefetch). The default mode forbids that.
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    hidden = self._hidden_states(self.inputs)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                warnings.warn(f"abkd_fast: generation goes on without CUDA graphs ({reason})", RuntimeWarning, 2)
                self.use_graphs = False
                return self._hidden_states(self.inputs)
            self.graphs[self.span] = graph, hidden
        graph, hidden = self.graphs[self.span]
        graph.replay()
        return hidden

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new tokens' keys and values [1, key heads, T, dim] in their slots.

        Returns the layer's keys and values of all slots, [slots, key heads, capacity, dim].
        """
        if self.layer == len(self.keys):
            make = value.new_zeros if self.all_at_once else value.new_empty  # a mask does not hide NaN: zeros
            self.keys.append(make(self.slots, key.shape[1], self.capacity, key.shape[3]))
            self.values.append(make(self.slots, value.shape[1], self.capacity, value.shape[3]))
        keys, values = self.keys[self.layer], self.values[self.layer]
        slots, positions = self.where
        keys[slots, :, positions] = key[0].transpose(0, 1).to(keys.dtype)
        values[slots, :, positions] = value[0].transpose(0, 1)
        self.layer += 1
        return keys, values

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None, window: int | None) -> Tensor:
        """Attention of one query a sequence [1, heads, B, dim] over its slot's tokens: [1, B, heads, dim].

        window: how many of the last tokens are seen; None: all.
        """
        query = query[0].transpose(0, 1).to(keys.dtype)  # [B, heads, dim]
        if self.all_at_once:
            lengths = self.inputs[2, :, None] + 1
            index = torch.arange(self.span, device=self.device)
            mask = index < lengths  # [slots, span]
            if window is not None:
                mask &= index >= lengths - window
            grouped = query.shape[1] != keys.shape[1]
            keys, values, mask = keys[:, :, : self.span], values[:, :, : self.span], mask[:, None, None]
            out = F.scaled_dot_product_attention(query[:, :, None], keys, values, mask, scale=scale, enable_gqa=grouped)
            return out[None, :, :, 0]
        # One call takes all queries that share a key head, in the time of a single one.
        query = query.unflatten(1, (keys.shape[1], -1))  # [B, key heads, heads / key heads, dim]
        outputs = []
        for row, (slot, length) in enumerate(self.rows):
            seen = slice(0 if window is None else max(0, length - window), length)
            k, v = keys[slot : slot + 1, :, seen], values[slot : slot + 1, :, seen]
            outputs.append(F.scaled_dot_product_attention(query[row : row + 1], k, v, scale=scale))
        return torch.cat(outputs).flatten(1, 2)[None]


def slot_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, dim]
    key: Tensor,  # [1, key heads, T, dim]
    value: Tensor,  # [1, key heads, T, dim]
    attention_mask: Tensor | None,
    *,
    decoder: Decoder,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention within packed prompts, or of one new token a sequence over its slot: [1, T, heads, dim]."""
    keys, values = decoder.store(key, value)
    if decoder.reads_prompts:
        settings |= {"scaling": scaling, "sliding_window": sliding_window}
        return packed_attention(module, query, key, value, attention_mask, **settings)
    return decoder.attend(query, keys, values, scaling, sliding_window), None


@contextlib.contextmanager
def prepared(model: PackedCausalLM | PreTrainedModel) -> Iterator[PackedCausalLM]:
    """Makes a model ready for a Decoder, in eval mode; undoes that at the end.

    Raises ConfigError for a model that can't take packed sequences. A PackedCausalLM has been checked already.
    """
    is_packed = isinstance(model, PackedCausalLM)
    inner = model.causal_lm if is_packed else model
    implementation, training = inner.config._attn_implementation, inner.training
    try:
        packed = model if is_packed else PackedCausalLM(model, "model")
        if not is_packed:
            packed.check()
        inner.eval()
        inner.set_attn_implementation(NAME)
        # Compiled layers would be compiled again for every step.
        is_compiled = any(module._compiled_call_impl for module in inner.modules())
        eager = torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext()
        with _fast_products(inner), eager:
            yield packed
    finally:
        inner.set_attn_implementation(implementation)
        inner.train(training)


def projections(model: nn.Module) -> list[nn.Module]:
    """The layers that multiply with a weight."""
    return [module for module in model.modules() if type(module) in (nn.Linear, Conv1D)]


def rearranges(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products use a rearranged copy of weights of this kind."""
    return device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()


@contextlib.contextmanager
def _fast_products(model: nn.Module) -> Iterator[None]:
    """On a CPU in float32, multiplies with a copy of the weights that oneDNN has rearranged once.

    A product of few rows then takes half to a fifth of the time. With two rows or more, a row has the same bits
    whatever the others are.
    """
    is_fast = not torch.is_autocast_enabled("cpu")
    layers = [x for x in projections(model) if is_fast and rearranges(x.weight.device, x.weight.dtype)]
    try:
        for layer in layers:
            weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight  # [out, in]
            arranged = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
            layer.forward = functools.partial(_product, arranged, layer.bias)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    alone = len(rows) == 1  # oneDNN has another kernel for one row, which rounds differently
    out = torch.ops.mkldnn._linear_pointwise(rows.expand(2, -1) if alone else rows, weight, bias, "none", [], "")
    return (out[:1] if alone else out).view(*x.shape[:-1], -1)


AttentionInterface.register(NAME, slot_attention)
