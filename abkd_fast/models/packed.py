"""The fast form of a causal language model: sequences packed end to end, without padding."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..data.batches import Batch
from ..losses.arguments import LogitMap
from . import attention
from .causal_lm import CausalLM


class PackedCausalLM(CausalLM):
    """A causal language model on packed batches. `forms.choose` says which models compute the same that way."""

    form = "packed"

    def __init__(self, model: nn.Module, key: str, logit_map: LogitMap = LogitMap()) -> None:  # noqa: B008 - a tuple
        """Also replaces the model's attention. Raises ConfigError, with the reason, where that can't be replaced."""
        super().__init__(model, key, logit_map)
        with self.explained():
            self.causal_lm.set_attn_implementation(attention.NAME)
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
        # Some models lose the options on their way to attention, which then takes the ones given here.
        with attention.given(options):
            options = options if self.passes_options else {}
            return self.run(input_ids=input_ids, position_ids=position_ids, **options)

    @contextlib.contextmanager
    def own_attention(self) -> Iterator[None]:
        self.causal_lm.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.causal_lm.set_attn_implementation(attention.NAME)
