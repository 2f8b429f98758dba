"""The teacher: frozen hidden states and the output projection that reads them, computed or from the cache."""

import dataclasses

import torch
from torch import Tensor

from .. import distributed
from ..data.batches import Batch, count_labels, pack, teacher_view
from ..losses.arguments import LinearHead, LogitMap
from ..models.causal_lm import CausalLM
from .shards import Rows
from .store import Places


class Teacher:
    """A live teacher: its body runs in every step."""

    def __init__(self, model: CausalLM, note: str = "runs in every step") -> None:
        self.model = model.eval().requires_grad_(False)
        self.note = note

    def read_ahead(self, batch: Batch) -> Batch:
        """The micro-batch as it is: there is nothing to read."""
        return batch

    @torch.no_grad()
    def linear_head(self, batch: Batch) -> LinearHead:
        """The hidden states of the response tokens, each sample read after the teacher's prompt; the output projection.

        On a CPU each sample runs alone, so its bits don't depend on the other samples: matrix products and vector loops
        may round differently with the number of rows (Llama's do). Short samples then take up to 1.4 times as long.
        """
        head = self.model.head
        views, is_sharded = [*map(teacher_view, batch.samples)], distributed.is_sharded(self.model)
        if head.weight.device.type == "cpu" and not is_sharded:
            batches = [pack([view], batch.tokens)[0] for view in views]
        elif views[0] is batch.samples[0]:  # then all are
            batches = [batch]
        else:
            batches = [part.to(batch.input_ids.device) for part in pack(views, batch.tokens)]
            if is_sharded:  # no rank can compute without the others
                batches += [batches[-1]] * (int(distributed.all_reduce_max(len(batches))) - len(batches))
        hidden = torch.cat([self.model(part, lambda student: student.hidden) for part in batches])
        hidden = hidden[: len(batch.labels)].to(head.weight.dtype)
        return LinearHead(hidden, head.weight, head.bias, self.model.logit_map)


class CachedTeacher:
    """Looks hidden states up: rows [R, H] in device memory, or mapped from disk."""

    def __init__(
        self,
        rows: Rows,
        places: Places,
        samples: int,
        head: tuple[Tensor, Tensor | None],
        logit_map: LogitMap,
        seconds: tuple[float, float],
    ) -> None:
        """places: of the rows of each sample, by its "index". samples: how many there are.

        head: the output projection and its bias; logit_map: what follows it.
        seconds: what one process takes to compute all rows, and what this run spent on it.
        """
        self.rows, self.places, self.samples = rows, places, samples
        self.weight, self.bias = head
        self.logit_map = logit_map
        self.pass_seconds, self.build_seconds = seconds
        self.note = ""

    def seconds_saved(self, samples: float) -> float:
        """About how many seconds the cache saves over so many samples; negative where building it took longer."""
        return self.pass_seconds / distributed.world_size() * samples / self.samples - self.build_seconds

    def read_ahead(self, batch: Batch) -> Batch:
        """The micro-batch with its hidden states, if a step would wait for the disk. Another thread may call this."""
        if batch.is_pretrain or self._is_on_device:
            return batch
        return dataclasses.replace(batch, teacher_hidden=self._gather(batch.samples))

    def linear_head(self, batch: Batch) -> LinearHead:
        hidden = self._gather(batch.samples) if batch.teacher_hidden is None else batch.teacher_hidden
        return LinearHead(self._to_device(hidden), self.weight, self.bias, self.logit_map)

    def hidden_states(self, sample: dict) -> Tensor:
        """The hidden states [n, H] of one sample's response."""
        return self._to_device(self._gather([sample]))

    @property
    def _is_on_device(self) -> bool:
        return self.rows.device == self.weight.device

    def _gather(self, samples: list[dict]) -> Tensor:
        """The samples' rows, one after the other. Those that a GPU will copy lie in page-locked memory."""
        rows = [self.rows[self.places.sample(sample["index"])] for sample in samples]
        if self._is_on_device:
            return torch.cat(rows)
        pinned = torch.empty(sum(map(len, rows)), self.rows.width, dtype=self.rows.dtype, pin_memory=True)
        return torch.cat(rows, out=pinned)

    def _to_device(self, hidden: Tensor) -> Tensor:
        return hidden.to(self.weight.device, non_blocking=True)


class OnPolicyTeacher:
    """Reads generated sequences once and keeps their hidden states with the sample. The data's come from the cache."""

    def __init__(self, live: Teacher, data: Teacher | CachedTeacher) -> None:
        self.live, self.data = live, data
        self.note = f"runs for generated text; for the data: {data.note}"

    def read_ahead(self, batch: Batch) -> Batch:
        """What the teacher of the data does; every sample must be one of the data's."""
        return self.data.read_ahead(batch)

    def uncached(self, samples: list[dict]) -> list[dict]:
        """The samples that the body has to read. The data's carry an "index", others keep their "hidden_states"."""
        cached = isinstance(self.data, CachedTeacher)
        return [sample for sample in samples if "hidden_states" not in sample and not (cached and "index" in sample)]

    def linear_head(self, batch: Batch) -> LinearHead:
        fresh = self.uncached(batch.samples)
        if distributed.is_sharded(self.live.model) and distributed.all_reduce_max(len(fresh)):
            fresh = fresh or batch.samples  # no rank can compute without the others
        if fresh:
            part = pack(fresh, batch.tokens)[0].to(batch.input_ids.device)
            for sample, rows in zip(
                fresh, self.live.linear_head(part).hidden.split([*map(count_labels, fresh)]), strict=True
            ):
                sample["hidden_states"] = rows.clone()  # a view would keep the whole batch alive
        distributed.unshard_root(self.live.model)
        head, hidden = self.live.model.head, batch.teacher_hidden
        if hidden is None:
            hidden = torch.cat(
                [
                    sample["hidden_states"] if "hidden_states" in sample else self.data.hidden_states(sample)
                    for sample in batch.samples
                ]
            )
        return LinearHead(hidden, head.weight, head.bias, self.live.model.logit_map)
