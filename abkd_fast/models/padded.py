"""The form of a causal language model that can't be packed: its own forward pass on sequences of similar length."""

import torch
from torch import Tensor

from .. import distributed
from ..data.batches import Batch, collate, count_labels
from .causal_lm import CausalLM

SHORTEST_SHARE = 0.75  # of a group's longest sequence: the others have at least so many tokens


class PaddedCausalLM(CausalLM):
    """A causal language model on groups of sequences, each padded at its end to the longest of its group.

    A causal model does not see what follows. So no mask is needed, and attention keeps its fast kernels.
    """

    form = "padded"

    def hidden_states(self, batch: Batch) -> Tensor:
        parts: dict[int, Tensor] = {}  # by sample
        lengths = batch.lengths
        # Where weights are gathered in every pass, all ranks have to make equally many.
        one = [[*range(len(lengths))]]
        groups = one if distributed.is_sharded(self) else group_by_length(lengths, self.longest_decoded)
        for group in groups:
            samples = [batch.samples[index] for index in group]
            input_ids, places = pad(samples)
            input_ids = input_ids.to(batch.input_ids.device, non_blocking=True)
            is_token = token_mask(samples).to(input_ids.device, non_blocking=True) if self.experts else None
            states = self.run(is_token, input_ids=input_ids)  # [B, L, H]
            states = states.flatten(0, 1).index_select(0, places.to(states.device, non_blocking=True))
            parts |= zip(group, states.split([*map(count_labels, samples)]), strict=True)
        return torch.cat([parts[index] for index in range(len(lengths))])


def group_by_length(lengths: list[int], border: int | None = None) -> list[list[int]]:
    """Indices of sequences in groups of similar length, the longest first.

    border: LongRoPE's, which decides by the longest one of a group. None of these is longer where another isn't.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = lengths[groups[-1][0]] if groups else 0
        is_short = border is not None and lengths[index] <= border < longest
        if not groups or lengths[index] < SHORTEST_SHARE * longest or is_short:
            groups.append([])
        groups[-1].append(index)
    return groups


def group_shapes(lengths: list[int]) -> list[tuple[int, int]]:
    """Sequences and tokens of each group in which a model reads a micro-batch of sequences of these lengths."""
    return [(len(group), lengths[group[0]]) for group in group_by_length(lengths)]


def padded_tokens(lengths: list[int]) -> int:
    """How many tokens the model reads for such a micro-batch."""
    return sum(rows * length for rows, length in group_shapes(lengths))


def token_mask(samples: list[dict]) -> Tensor:
    """[B, L]: 1 for the samples' tokens, 0 for the padding at their ends."""
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    return (torch.arange(int(lengths.max())) < lengths[:, None]).long()


def pad(samples: list[dict]) -> tuple[Tensor, Tensor]:
    """The tokens [B, L], padded at the end with zeros, and the places of the labels' predictions [N] in them, flat."""
    packed = collate(samples)
    rows = [torch.tensor(sample["input_ids"]) for sample in samples]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    starts = packed.cu_seqlens[:-1].long()
    row = torch.searchsorted(packed.cu_seqlens.long(), packed.positions, right=True) - 1
    return input_ids, row * input_ids.shape[1] + packed.positions - starts[row]
