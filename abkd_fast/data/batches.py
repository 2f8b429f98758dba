"""The way from tokenized samples to the micro-batches of a step: order, balance, packing, prefetch."""

from __future__ import annotations

import dataclasses
import functools
import heapq
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import datasets
import torch
from torch import Tensor

from .. import distributed


@dataclasses.dataclass(frozen=True)
class Batch:
    """A micro-batch: whole sequences, one after the other, of T tokens. N of these predict a trained token: a label."""

    input_ids: Tensor  # [1, T]
    position_ids: Tensor  # [1, T], from 0 in every sequence
    cu_seqlens: Tensor  # [sequences + 1], int32: the start of each sequence, and T
    max_seqlen: int
    positions: Tensor  # [N], indices into T: the next token is a label
    labels: Tensor  # [N], these next tokens; always on the CPU
    samples: list[dict]  # in the order of the sequences
    is_pretrain: bool = False  # whether the samples are blocks of plain text
    teacher_hidden: Tensor | None = None  # [N, H], the teacher's states of the labels, where they were read ahead
    parts: tuple[Batch, ...] = ()  # of several teachers, one for each with its states, where they were read ahead
    loss_scale: float = 1.0  # of the loss, which is summed over the labels
    token_share: float = 1.0  # of this micro-batch in the tokens of the step, on all ranks and with plain text

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def lengths(self) -> list[int]:
        """The tokens of each sequence, known to the host."""
        return [len(sample["input_ids"]) for sample in self.samples]

    def to(self, device: torch.device) -> Batch:
        """The same batch with all tensors but the labels on `device`."""
        return self._replaced(lambda tensor: tensor.to(device, non_blocking=True), but="labels")

    def pin(self) -> Batch:
        """The same batch in page-locked memory: a GPU copies from it while the CPU goes on."""
        return self._replaced(Tensor.pin_memory)

    def _replaced(self, function: Callable[[Tensor], Tensor], but: str = "") -> Batch:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor) and name != but}
        return dataclasses.replace(self, **{name: function(tensor) for name, tensor in tensors.items()})


@dataclasses.dataclass(frozen=True)
class StepBatch:
    """The samples and blocks of one step, of all ranks together, and the micro-batches of this rank."""

    samples: list[dict]
    pretrain_blocks: list[dict]  # blocks of plain text; empty without data.pretrain
    micro_batches: list[Batch]  # those of plain text come last
    max_rank_tokens: int  # tokens of the rank that has the most

    @property
    def num_labels(self) -> int:
        return sum(map(count_labels, self.samples))

    @property
    def num_pretrain_labels(self) -> int:
        return sum(map(count_labels, self.pretrain_blocks))

    def pin(self) -> StepBatch:
        return dataclasses.replace(self, micro_batches=[micro_batch.pin() for micro_batch in self.micro_batches])


def count_labels(sample: dict) -> int:
    """The number of a sample's trained tokens: those in its spans."""
    spans = sample["spans"]
    return sum(spans[1::2]) - sum(spans[::2])


def prompt_of(sample: dict) -> list[int]:
    """The tokens before the last trained span: what a model answers in its place."""
    return sample["input_ids"][: sample["spans"][-2]]


def teacher_view(sample: dict) -> dict:
    """The sample as the teacher reads it: the same trained tokens, after the teacher's prompt if it has its own."""
    if "teacher_input_ids" not in sample:
        return sample
    return {"input_ids": sample["teacher_input_ids"], "spans": sample["teacher_spans"]}


def make_step_batch(samples: list[dict], pretrain_blocks: list[dict], max_tokens: int) -> StepBatch:
    """Distributes a step over the ranks, and packs this rank's part: equally many micro-batches on all, if possible."""
    micro_batches, loads = [], [0] * distributed.world_size()
    for items, is_pretrain in ((samples, False), (pretrain_blocks, True)):
        lengths = [len(item["input_ids"]) for item in items]
        shares = balance_by_tokens(lengths, distributed.world_size())
        groups = [fill_micro_batches([items[index] for index in share], max_tokens) for share in shares]
        own = split_largest(groups[distributed.rank()], max(map(len, groups)))
        micro_batches += [dataclasses.replace(collate(group), is_pretrain=is_pretrain) for group in own]
        loads = [load + sum(lengths[index] for index in share) for load, share in zip(loads, shares, strict=True)]
    micro_batches = [dataclasses.replace(part, token_share=part.tokens / sum(loads)) for part in micro_batches]
    return StepBatch(samples, pretrain_blocks, micro_batches, max(loads))


def pack(samples: list[dict], max_tokens: int) -> list[Batch]:
    """Packs samples, in their order, into micro-batches of at most max_tokens tokens."""
    return [collate(group) for group in fill_micro_batches(samples, max_tokens)]


def fill_micro_batches(samples: list[dict], max_tokens: int) -> list[list[dict]]:
    """Groups samples in their order: at most max_tokens tokens, or one longer sample, in each group."""
    groups, room = [], -1
    for sample in samples:
        room -= len(sample["input_ids"])
        if not groups or room < 0:
            groups.append([])
            room = max_tokens - len(sample["input_ids"])
        groups[-1].append(sample)
    return groups


def split_largest(groups: list[list[dict]], count: int) -> list[list[dict]]:
    """Halves the groups with the most samples until there are `count` groups, if possible."""
    groups = [*groups]
    while len(groups) < count and groups and len(most := max(groups, key=len)) > 1:
        place, half = groups.index(most), len(most) // 2
        groups[place : place + 1] = most[:half], most[half:]
    return groups


def collate(samples: list[dict]) -> Batch:
    """Packs samples into one micro-batch."""
    lengths = [len(sample["input_ids"]) for sample in samples]
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    # The token before a label predicts it.
    places = [
        torch.arange(start + first - 1, start + stop - 1)
        for start, sample in zip(starts[:-1], samples, strict=True)
        for first, stop in zip(sample["spans"][::2], sample["spans"][1::2], strict=True)
    ]
    positions = torch.cat(places)
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


@functools.lru_cache(maxsize=4)  # one epoch each of rows, plain text, prompts and rollouts
def shuffled_batches(num_samples: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The sample indices of an epoch's batches, a function of the arguments alone. An incomplete batch is left out."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(num_samples, generator=generator).tolist()
    return [order[start : start + batch_size] for start in range(0, num_samples - batch_size + 1, batch_size)]


def step_samples(dataset: datasets.Dataset, batch_size: int, seed: int, step: int) -> list[dict]:
    """The samples of a step, counted from 0, a function of the arguments alone: epochs of `shuffled_batches`.

    Each sample has its "index" in the data set, by which the teacher's cache finds it.
    """
    epoch, batch = divmod(step, len(dataset) // batch_size)
    indices = shuffled_batches(len(dataset), batch_size, seed, epoch)[batch]
    columns = dataset[indices] | {"index": indices}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


Item = TypeVar("Item")


def prefetch(items: Iterator[Item]) -> Iterator[Item]:
    """Yields the same items. A thread makes the next item while the caller works with the last one."""
    end, use_gpu = object(), None
    if torch.cuda.is_initialized():  # a new thread would use the first GPU
        use_gpu = functools.partial(torch.cuda.set_device, torch.cuda.current_device())
    with ThreadPoolExecutor(1, "prefetch", use_gpu) as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item


def balance_by_tokens(lengths: list[int], ranks: int) -> list[list[int]]:
    """The sample indices of each rank, sorted: equal numbers of samples, rounded up, and about equal numbers of tokens.

    The longest samples are assigned first, each to the rank with the fewest tokens that still has room.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    room = -(-len(lengths) // ranks)
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        load, rank = heapq.heappop(loads)
        shares[rank].append(index)
        if len(shares[rank]) < room:
            heapq.heappush(loads, (load + lengths[index], rank))
    return [sorted(share) for share in shares]
