"""From tokenized samples to the micro-batches of a step: order, balance, packing, prefetch."""

from __future__ import annotations

import dataclasses
import functools
import heapq
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import datasets
import torch
from torch import Tensor

from .. import distributed


@dataclasses.dataclass(frozen=True)
class Batch:
    """Whole sequences end to end, T tokens in all, N of them predicting a token of a response."""

    input_ids: Tensor  # [1, T]
    position_ids: Tensor  # [1, T], restarting at 0 with every sequence
    cu_seqlens: Tensor  # [sequences + 1], int32: where each begins, and T
    max_seqlen: int
    positions: Tensor  # [N], indices into T whose next token is in the response
    labels: Tensor  # [N], those next tokens; on the CPU
    samples: list[dict]  # as packed
    is_pretrain: bool = False  # blocks of plain text

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]

    def to(self, device: torch.device) -> Batch:
        """The same batch with everything but the labels on `device`."""
        moved = ("input_ids", "position_ids", "cu_seqlens", "positions")
        return dataclasses.replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in moved})

    def pin(self) -> Batch:
        """The same batch in page-locked memory, which a GPU copies from while the processor goes on."""
        pinned = ("input_ids", "position_ids", "cu_seqlens", "positions", "labels")
        return dataclasses.replace(self, **{name: getattr(self, name).pin_memory() for name in pinned})


@dataclasses.dataclass(frozen=True)
class StepBatch:
    """What one step trains on, on all ranks together, and the micro-batches that are this rank's."""

    samples: list[dict]
    pretrain_blocks: list[dict]  # plain text
    micro_batches: list[Batch]  # those of plain text come last
    max_rank_tokens: int  # that a rank has

    @property
    def num_labels(self) -> int:
        return _count_labels(self.samples)

    @property
    def num_pretrain_labels(self) -> int:
        return _count_labels(self.pretrain_blocks)

    def pin(self) -> StepBatch:
        return dataclasses.replace(self, micro_batches=[micro_batch.pin() for micro_batch in self.micro_batches])


def _count_labels(samples: list[dict]) -> int:
    return sum(len(sample["input_ids"]) - sample["prompt_length"] for sample in samples)


def make_step_batch(samples: list[dict], pretrain_blocks: list[dict], max_tokens: int) -> StepBatch:
    """Deals a step's samples and blocks to the ranks, and packs this rank's.

    Every rank gets as many micro-batches as the others, where there are samples for that.
    """
    micro_batches, loads = [], [0] * distributed.world_size()
    for items, is_pretrain in ((samples, False), (pretrain_blocks, True)):
        lengths = [len(item["input_ids"]) for item in items]
        shares = balance_by_tokens(lengths, distributed.world_size())
        groups = [fill_micro_batches([items[place] for place in share], max_tokens) for share in shares]
        own = split_largest(groups[distributed.rank()], max(map(len, groups)))
        micro_batches += [dataclasses.replace(collate(group), is_pretrain=is_pretrain) for group in own]
        loads = [load + sum(lengths[place] for place in share) for load, share in zip(loads, shares, strict=True)]
    return StepBatch(samples, pretrain_blocks, micro_batches, max(loads))


def pack(samples: list[dict], max_tokens: int) -> list[Batch]:
    """Samples in order, in as many micro-batches as a budget of max_tokens asks for."""
    return [collate(group) for group in fill_micro_batches(samples, max_tokens)]


def fill_micro_batches(samples: list[dict], max_tokens: int) -> list[list[dict]]:
    groups, used = [], 0
    for sample in samples:
        length = len(sample["input_ids"])
        if not groups or used + length > max_tokens:
            groups.append([])
            used = 0
        groups[-1].append(sample)
        used += length
    return groups


def split_largest(groups: list[list[dict]], count: int) -> list[list[dict]]:
    """So many groups: those with the most samples are halved."""
    groups = list(groups)
    while len(groups) < count and groups and len(most := max(groups, key=len)) > 1:
        place, half = groups.index(most), len(most) // 2
        groups[place : place + 1] = most[:half], most[half:]
    return groups


def collate(samples: list[dict]) -> Batch:
    lengths = [len(sample["input_ids"]) for sample in samples]
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    # The last token of a prompt predicts the first of the response; the last of a sequence predicts nothing.
    positions = torch.cat(
        [
            torch.arange(start + sample["prompt_length"] - 1, start + length - 1)
            for start, length, sample in zip(starts, lengths, samples, strict=False)
        ]
    )
    input_ids = torch.tensor([token for sample in samples for token in sample["input_ids"]])
    return Batch(
        input_ids=input_ids[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        max_seqlen=max(lengths),
        positions=positions,
        labels=input_ids[positions + 1],
        samples=samples,
    )


@functools.lru_cache(maxsize=4)  # an epoch of the rows, of the plain text, of prompts, and of rollouts
def shuffled_batches(rows: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The row numbers of an epoch's batches: they depend on these four alone; a last, incomplete batch is left out."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(rows, generator=generator).tolist()
    return [order[start : start + batch_size] for start in range(0, rows - batch_size + 1, batch_size)]


def step_samples(dataset: datasets.Dataset, batch_size: int, seed: int, step: int) -> list[dict]:
    """The samples of a step, counted from 0: epoch after epoch of `batch_rows`, and a function of these four alone.

    Samples carry their "index" in the data set: the teacher's cache finds them by it.
    """
    epoch, batch = divmod(step, len(dataset) // batch_size)
    indices = shuffled_batches(len(dataset), batch_size, seed, epoch)[batch]
    columns = dataset[indices] | {"index": indices}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


Item = TypeVar("Item")


def prefetch(items: Iterator[Item]) -> Iterator[Item]:
    """The same items; a thread makes the next one while the caller is busy with the last."""
    end = object()
    start = None
    if torch.cuda.is_initialized():  # a new thread begins with the first GPU
        start = functools.partial(torch.cuda.set_device, torch.cuda.current_device())
    with ThreadPoolExecutor(1, "ahead", start) as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item


def balance_by_tokens(lengths: list[int], ranks: int) -> list[list[int]]:
    """The places of each rank's samples, in order: at most an equal share, rounded up, and about as many tokens.

    The longest go first, each to the rank with the fewest tokens so far that still has room.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, number) for number in range(ranks)]
    room = -(-len(lengths) // ranks)
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        load, number = heapq.heappop(loads)
        shares[number].append(place)
        if len(shares[number]) < room:
            heapq.heappush(loads, (load + lengths[place], number))
    return [sorted(places) for places in shares]
