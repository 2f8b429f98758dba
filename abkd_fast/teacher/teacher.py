"""The teacher: a frozen forward pass up to the hidden states that its output projection reads, and their cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import distributed
from ..data.batches import Batch, pack
from ..losses.arguments import LinearHead
from ..models.packed import PackedCausalLM
from . import store


class Teacher:
    """Runs in every step."""

    def __init__(self, model: PackedCausalLM, note: str = "runs in every step") -> None:
        self.model = model.eval().requires_grad_(False)
        self.note = note

    @torch.no_grad()
    def states(self, batch: Batch) -> LinearHead:
        """The response tokens' states. On a processor each sample's are the same bits in any company.

        Matrix products and vector loops may round differently with the number of rows (Llama's do); alone, a sample
        is always the same computation, and takes a processor up to 1.4 times as long for short samples.
        """
        head = self.model.head
        alone = head.weight.device.type == "cpu" and not distributed.is_sharded(self.model)
        batches = [pack([sample], batch.tokens)[0] for sample in batch.samples] if alone else [batch]
        hidden = torch.cat([self.model(part, _hidden) for part in batches])
        return LinearHead(hidden.to(head.weight.dtype), head.weight, head.bias)


def _hidden(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In the place of a loss."""
    return hidden


class CachedTeacher:
    """Looks its states up: rows [R, H] in device memory, or mapped from disk."""

    def __init__(
        self, rows: Tensor, layout: store.Layout, head: tuple[Tensor, Tensor | None], seconds: tuple[float, float]
    ) -> None:
        """Seconds: one process's for all rows, whenever they were computed, and what this run spent."""
        self.rows, self.layout = rows, layout
        self.weight, self.bias = head
        self.pass_seconds, self.build_seconds = seconds
        self.note = ""

    def saved(self, samples: int) -> float:
        """About how many seconds a run has saved that has seen so many samples; below 0 where building took longer."""
        return self.pass_seconds / distributed.world_size() * samples / len(self.layout.starts) - self.build_seconds

    def states(self, batch: Batch) -> LinearHead:
        hidden = torch.cat([self.rows[self.layout.sample(sample["index"])] for sample in batch.samples])
        return LinearHead(self._on_device(hidden), self.weight, self.bias)

    def rows_of(self, sample: dict) -> Tensor:
        """The states [n, H] of one sample's response."""
        return self._on_device(self.rows[self.layout.sample(sample["index"])])

    def _on_device(self, rows: Tensor) -> Tensor:
        if rows.device == self.weight.device:
            return rows
        return rows.pin_memory().to(self.weight.device, non_blocking=True)


class OnPolicyTeacher:
    """Of sequences that a model has written: computed once, then kept with the sample. Of the data: from the cache."""

    def __init__(self, live: Teacher, data: Teacher | CachedTeacher) -> None:
        self.live, self.data = live, data
        self.note = f"runs for generated text; for the data: {data.note}"

    def unknown(self, samples: list[dict]) -> list[dict]:
        """Those whose states have to be computed. Samples of the data carry an "index", others get their "states"."""
        cached = isinstance(self.data, CachedTeacher)
        return [sample for sample in samples if "states" not in sample and not (cached and "index" in sample)]

    def states(self, batch: Batch) -> LinearHead:
        fresh = self.unknown(batch.samples)
        if distributed.is_sharded(self.live.model) and distributed.all_reduce_max(len(fresh)):
            fresh = fresh or batch.samples  # no rank computes without the others
        if fresh:
            part = pack(fresh, batch.tokens)[0].to(batch.input_ids.device)
            counts = [len(sample["input_ids"]) - sample["prompt_length"] for sample in fresh]
            for sample, rows in zip(fresh, self.live.states(part).hidden.split(counts), strict=True):
                sample["states"] = rows.clone()  # a view would keep those of the whole batch alive
        distributed.unshard_root(self.live.model)
        hidden = [sample["states"] if "states" in sample else self.data.rows_of(sample) for sample in batch.samples]
        head = self.live.model.head
        return LinearHead(torch.cat(hidden), head.weight, head.bias)
