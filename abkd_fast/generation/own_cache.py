"""The decoder of models that slots don't serve. It reads each sequence alone, with transformers' own cache."""

import inspect
import logging
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ..errors import first_line
from ..models.causal_lm import CausalLM, compute_dtype
from .decoder import Decoder

CHECKED = 3  # tokens that the check decodes
# By model: whether it has a cache that works, for a type of products and for one or several sequences.
_verdicts: weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple[torch.dtype, bool], bool]] = (
    weakref.WeakKeyDictionary()
)


class OwnCacheDecoder(Decoder):
    """One model that reads each sequence alone, as transformers' `generate` feeds it. A context manager.

    So no response depends on another one, whatever windows and recurrent states the model has.

    A model without a cache reads the whole sequence for each token. So does one whose cache gives other logits than its
    whole forward pass. The first prompt shows that, once for each model. A warning then says so.
    """

    def __init__(self, model: CausalLM, slots: int, capacity: int) -> None:
        super().__init__(model, slots, capacity)
        self.inner = model.causal_lm
        self.parameters = inspect.signature(self.inner.forward).parameters
        self.states: dict[int, dict[str, Any]] = {}  # by slot: cache and positions, as the model names them
        self.has_cache: bool | None = None  # None: not known yet

    def __enter__(self) -> "OwnCacheDecoder":
        self.attention = self.model.own_attention()
        self.attention.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.attention.__exit__(*error)

    def prefill(self, prompts: dict[int, list[int]]) -> Tensor:
        if self.has_cache is None:
            self.has_cache = self._check(next(iter(prompts.values())))
        if not self.has_cache:
            return self.decode(prompts)
        return torch.cat([self._read_first(slot, tokens) for slot, tokens in prompts.items()])

    def decode(self, sequences: dict[int, list[int]]) -> Tensor:
        if not self.has_cache:
            return torch.cat([self._read_all(tokens)[-1:] for tokens in sequences.values()])
        return torch.cat([self._read_last(slot, tokens) for slot, tokens in sequences.items()])

    def _read_first(self, slot: int, tokens: list[int]) -> Tensor:
        """Reads a prompt into its slot. Returns the logits [1, V] after it."""
        self.states.pop(slot, None)  # its memory is needed
        state: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in self.parameters:
            state["logits_to_keep"] = 1
        if "position_ids" in self.parameters:
            state["position_ids"] = torch.arange(len(tokens), device=self.inner.device)[None]
        self.inner._prepare_cache_for_generation(GenerationConfig(), state, None, 1, self.capacity)
        inputs = self.inner.prepare_inputs_for_generation(self._ids(tokens), is_first_iteration=True, **state)
        return self._step(slot, inputs, state)

    def _read_last(self, slot: int, tokens: list[int]) -> Tensor:
        """Reads the last token; the slot has the others. Returns the logits [1, V] after it."""
        if len(tokens) - 1 == self.model.longest_decoded:  # from here on the model has other keys for all tokens
            return self._read_first(slot, tokens)
        inputs = self.inner.prepare_inputs_for_generation(
            self._ids(tokens), next_sequence_length=1, **self.states[slot]
        )
        return self._step(slot, inputs, self.states[slot])

    def _step(self, slot: int, inputs: dict[str, Any], state: dict[str, Any]) -> Tensor:
        self.tokens_read = inputs["input_ids"].shape[1]
        output = self.inner(**inputs, return_dict=True)
        self.states[slot] = self.inner._update_model_kwargs_for_generation(output, state)
        logits = output.logits[:, -1]
        return logits if logits.dtype == torch.float64 else logits.float()

    def _read_all(self, tokens: list[int]) -> Tensor:
        """The logits [T, V] after each of T tokens, from the model's whole forward pass."""
        return self._logits(self.model.run(input_ids=self._ids(tokens))[0])

    def _ids(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], device=self.inner.device)

    def _check(self, prompt: list[int]) -> bool:
        """Whether the model has a cache that can be used. Warns once where it can't."""
        dtype = compute_dtype(self.model.head.weight)
        verdicts, kind = _verdicts.setdefault(self.inner, {}), (dtype, self.slots > 1)
        if kind not in verdicts:
            try:
                problem = self._problem(prompt, tolerance=2e-3 if dtype.itemsize > 2 else 5e-2)
            except Exception as error:  # models have code of their own
                problem = first_line(error)
            self.states.clear()
            verdicts[kind] = problem is None
            if problem is not None:
                way = "generation reads the whole sequence for each token, which is slow"
                logging.getLogger("abkd_fast").warning(f"{self.model.key}: {way}: {problem}")
        return verdicts[kind]

    def _problem(self, prompt: list[int], tolerance: float) -> str | None:
        """Why decoding with the cache is not right or of no use; None where it is."""
        tokens = (prompt * (CHECKED + 1))[: min(len(prompt) + CHECKED, self.capacity)]
        # Two take turns where several will: some models keep the state of one sequence within their modules.
        sequences = dict(enumerate([tokens, tokens[:0:-1] or tokens][: self.slots]))
        starts = {slot: max(1, len(tokens) - CHECKED) for slot, tokens in sequences.items()}
        logits = {slot: [self._read_first(slot, tokens[: starts[slot]])] for slot, tokens in sequences.items()}
        reads_all = []
        for step in range(1, CHECKED + 1):
            for slot, tokens in sequences.items():
                if (length := starts[slot] + step) <= len(tokens):
                    logits[slot].append(self._read_last(slot, tokens[:length]))
                    reads_all.append(self.tokens_read == length)
        if all(reads_all):
            return "it has no cache"
        for slot, tokens in sequences.items():
            expected = self._read_all(tokens)[starts[slot] - 1 :]
            difference = (torch.cat(logits[slot]) - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
            if not difference < tolerance:
                return f"with its cache, its logits differ from its whole forward pass by {difference:.1e} relative"
        return None
