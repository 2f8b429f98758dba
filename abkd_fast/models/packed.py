"""The fast form of a causal language model: sequences packed end to end, without padding."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Batch
from ..losses.arguments import LogitMap
from . import attention
from .causal_lm import CausalLM, long_ropes, original_length


class PackedCausalLM(CausalLM):
    """A causal language model on packed batches. `forms.choose` says which models compute the same that way."""

    form = "packed"

    def __init__(self, model: nn.Module, key: str, logit_map: LogitMap = LogitMap()) -> None:  # noqa: B008 - a tuple
        """Also replaces the model's attention. Raises ConfigError, with the reason, where that can't be replaced."""
        super().__init__(model, key, logit_map)
        with self.explained():
            self.causal_lm.set_attn_implementation(attention.NAME)
        attention.note_masks(self.causal_lm)
        modules = [*self.causal_lm.modules()]
        self.chunks = {chunk for x in modules if (chunk := getattr(x, "masked_chunk", None)) is not None}
        self.scales_by_place = any(getattr(x, "attn_temperature_tuning", False) for x in modules)
        self.long_ropes = long_ropes(model)
        parameters = inspect.signature(self.causal_lm.forward).parameters.values()
        self.passes_options = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)

    def hidden_states(self, batch: Batch) -> Tensor:
        states = self.run_body(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
        return states[0].index_select(0, batch.positions)  # indexing would sort the positions in its backward pass

    def run_body(
        self, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, **options: Any
    ) -> Tensor:
        """What the output projection reads [1, T, H], for packed tokens [1, T]. options: for the attention function."""
        lengths = {"max_length_q": max_seqlen, "max_length_k": max_seqlen}
        options |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, **lengths}
        if self.scales_by_place:
            options["places"] = position_ids
        for chunk in self.chunks if cu_seqlens is not None else ():
            options["chunk_cu_seq_lens"] = attention.chunk_boundaries(cu_seqlens, position_ids, chunk)
            options["max_chunk_length"] = min(chunk, max_seqlen)
        # Some models lose the options on their way to attention, which then takes the ones given here. Compiled layers
        # take a number of these for a constant. Few different ones are as good: kernels need a bound alone.
        bound = None if max_seqlen is None else 1 << (max_seqlen - 1).bit_length()
        with attention.given(options | {"max_length_q": bound}), self._own_rope_factors(position_ids, cu_seqlens):
            options = options if self.passes_options else {}
            return self.run(input_ids=input_ids, position_ids=position_ids, **options)

    @contextlib.contextmanager
    def _own_rope_factors(self, position_ids: Tensor, cu_seqlens: Tensor | None) -> Iterator[None]:
        """LongRoPE has other factors for long sequences. The longest one of a row decides for the row.

        Meanwhile each sequence decides for itself. cu_seqlens: None for single tokens, whose positions decide.
        """
        before = [rope.__dict__.get("forward") for rope in self.long_ropes]
        for rope in self.long_ropes:
            rope.forward = _by_sequence(rope, position_ids, cu_seqlens)
        try:
            yield
        finally:
            for rope, forward in zip(self.long_ropes, before, strict=True):
                del rope.forward
                if forward is not None:
                    rope.forward = forward

    @contextlib.contextmanager
    def own_attention(self) -> Iterator[None]:
        self.causal_lm.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.causal_lm.set_attn_implementation(attention.NAME)


def _by_sequence(rope: nn.Module, position_ids: Tensor, cu_seqlens: Tensor | None) -> Callable[..., tuple[Tensor, ...]]:
    """The forward pass of a LongRoPE module with both kinds of factors, each where it belongs."""
    lengths = position_ids[0] + 1
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff()
        lengths = lengths.repeat_interleave(lengths, output_size=position_ids.shape[1])
    is_long = lengths > original_length(rope)  # [T]
    forward = rope.forward

    def both(x: Tensor, position_ids: Tensor, **options: Any) -> tuple[Tensor, ...]:
        short = forward(x, position_ids.masked_fill(is_long, 0), **options)
        long = forward(x, position_ids, **options)
        return tuple(torch.where(is_long[:, None], *pair) for pair in zip(long, short, strict=True))

    return both
