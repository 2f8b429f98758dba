"""The way from hidden states to logits and from their gradients back, a chunk of tokens at a time.

Two matrix products make the logits of a chunk (`Chunks`). The loss turns them into their gradient in place. Two more
products turn that into the gradients of hidden states and projection (`HeadGradients`). Memory does not grow with the
number of tokens.
"""

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .arguments import LinearHead, LossSpec, Rows, check_label_range, loss_dtype
from .row_ops import new_large
from .vocab_parallel import Shard

CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}  # logits of a chunk, of both models, and their gradient
MOST_CHUNK_BYTES = 4 << 30  # on a GPU with much free memory
TILE = {"cpu": 16, "cuda": 128}  # a chunk has a multiple of this number of rows, as matrix products work in tiles
ROW_ALIGNMENT = 64  # columns: every row of a logits buffer starts on a 128-byte boundary at 2 bytes per element


def row_bytes(vocab: int, models: int, logits: torch.dtype, gradient: torch.dtype | None = None) -> int:
    """The bytes of one token's logits, and of their gradient if that is not in the same place."""
    bytes_of_gradient = 0 if gradient is None else gradient.itemsize
    return _round_up(vocab, ROW_ALIGNMENT) * (models * logits.itemsize + bytes_of_gradient)


def gradient_dtype(hidden: torch.dtype, logits: torch.dtype, device: torch.device) -> torch.dtype | None:
    """The type in which the row kernel writes the gradient of the logits; None: in their place.

    On a GPU it is the type of the products that read it: no cast, and half of the memory traffic.
    """
    is_separate = device.type == "cuda" and hidden.itemsize == 2 and hidden != logits
    return hidden if is_separate else None


def choose_chunk_tokens(tokens: int, bytes_of_row: int, device: torch.device, budget: int | None = None) -> int:
    """The number of rows of a chunk: one chunk if all rows fit into `budget` bytes, else few chunks of equal size.

    On a CPU a chunk of several has at most a power of two of rows, as most numbers of tokens are: memory is then the
    same for 512 tokens and for 8,192. On a GPU every chunk reads and writes the projection's gradient, so fewer are
    faster.
    """
    tile = TILE.get(device.type, 16)
    fitting = (budget or chunk_bytes(device)) // bytes_of_row
    if _round_up(tokens, tile) <= fitting:
        return max(tile, _round_up(tokens, tile))
    whole_tiles, power = fitting // tile * tile, 1 << max(0, fitting.bit_length() - 1)
    most = max(tile, whole_tiles if device.type == "cuda" else power)
    return min(most, _round_up(math.ceil(tokens / math.ceil(tokens / most)), tile))


def chunk_bytes(device: torch.device) -> int:
    """The memory budget of a chunk."""
    return _cuda_chunk_bytes(device) if device.type == "cuda" else CHUNK_BYTES["cpu"]


@functools.cache
def _cuda_chunk_bytes(device: torch.device) -> int:
    """An eighth of what is free when the first loss is computed, and at most 4 GiB.

    It is decided once, and rounded down to a power of two, so that a run and its continuation have the same chunks.
    """
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(MOST_CHUNK_BYTES, 1 << max(20, (free // 8).bit_length() - 1))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _operands(head: LinearHead, dtype: torch.dtype) -> LinearHead:
    """The head in one type: `dtype`, but 16 bits for hidden states of 16 bits on a GPU. Products of those are exact in
    float32."""
    hidden, weight, bias = head.tensors
    if not (hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16)):
        hidden = hidden.to(dtype)
    return LinearHead(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))


def _product(left: Tensor, right: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = left right, or out += left right. Sums are in the precision of `out`, and in float32 if that has less.

    If the operands have 16 bits and `out` has 32 (on a GPU only), the product writes its float32 sums unrounded.
    """
    left = left.to(right.dtype)  # on a CPU only, for logits of another type
    if right.dtype == out.dtype:
        out.addmm_(left, right, beta=1.0 if accumulate else 0.0)
    elif right.dtype.itemsize > out.dtype.itemsize:
        out.copy_(torch.mm(left, right))
    elif accumulate:
        torch.ops.aten.addmm.dtype_out(out, left, right, out.dtype, out=out)
    else:
        torch.ops.aten.mm.dtype_out(left, right, out.dtype, out=out)


class Chunks:
    """The logits of both models, a chunk of the rows that count at a time, in one buffer."""

    def __init__(
        self,
        student: LinearHead,
        teacher: LinearHead | None,
        labels: Tensor | None,
        spec: LossSpec,
        chunk_tokens: int,
        logits_dtype: torch.dtype,
        shard: Shard | None = None,
    ) -> None:
        """`chunk_tokens` 0 leaves the size to `choose_chunk_tokens`. `shard` says which part of the vocabulary the
        projections have; None is all of it."""
        self.spec, self.dtype = spec, loss_dtype(student.hidden)
        self.heads = [_operands(head, self.dtype) for head in (student, teacher) if head is not None]
        hidden, self.vocab = student.hidden, len(student.weight)
        self.kept = None  # indices of the rows that count, or None if all do
        if labels is not None:
            if shard is None:
                check_label_range(labels, spec, self.vocab)
            # Found on the labels' own device: labels that stayed on the CPU need no synchronization with the GPU.
            kept = (labels != -100).nonzero()[:, 0]
            self.kept = None if len(kept) == len(labels) else kept.to(hidden.device, non_blocking=True)
            labels = labels.to(hidden.device, non_blocking=True)
            labels = labels if shard is None else shard.local_labels(labels, self.vocab)
        self.labels = labels
        self.count = len(hidden) if self.kept is None else len(self.kept)
        of_gradient = gradient_dtype(self.heads[0].hidden.dtype, logits_dtype, hidden.device)
        widest = self.vocab if shard is None else shard.widest
        bytes_of_row = row_bytes(widest, len(self.heads), logits_dtype, of_gradient)
        # Free memory differs between ranks, but the chunks of a shard must not.
        budget = None if shard is None else CHUNK_BYTES.get(hidden.device.type)
        self.step = chunk_tokens or choose_chunk_tokens(self.count, bytes_of_row, hidden.device, budget)
        shape = min(self.step, self.count), _round_up(self.vocab, ROW_ALIGNMENT)
        self.buffer = new_large(hidden, len(self.heads), *shape, dtype=logits_dtype)
        self.gradient = self.buffer[0] if of_gradient is None else hidden.new_empty(shape, dtype=of_gradient)
        self.held = None  # the start of the chunk whose logits are in the buffer

    def gradient_of(self, rows: Rows) -> Tensor:
        """The place [n, V] for the gradient by the student's logits, which it may overwrite."""
        return self.gradient[: len(rows.student), : self.vocab]

    def __iter__(self) -> Iterator[tuple[slice | Tensor, Rows]]:
        """For each chunk an index of the hidden states, and their rows.

        The student's logits may be overwritten by `gradient_of` them; `held` must then become None.
        """
        for start in range(0, self.count, self.step):
            size = min(self.step, self.count - start)
            index = slice(start, start + size)
            index = index if self.kept is None else self.kept[index]
            logits = [buffer[:size, : self.vocab] for buffer in self.buffer]
            if self.held != start:
                for (hidden, weight, bias, _), out in zip(self.heads, logits, strict=True):
                    _product(hidden[index], weight.T, out)
                    if bias is not None:
                        out += bias
            self.held = start
            labels = None if self.labels is None else self.labels[index]
            yield index, Rows(logits[0], logits[1] if len(logits) > 1 else None, labels, self.spec)


class HeadGradients:
    """The gradients of the student's head, added up over the chunks: `hidden` [N, H], `weight` [V, H], `bias` [V].

    They are float32 (float64 for float64 hidden states). Those that are not needed have no elements.
    """

    def __init__(self, chunks: Chunks, need: list[bool]) -> None:
        hidden, weight, *_ = chunks.heads[0]
        self.chunks, self.need = chunks, need
        self.hidden = hidden.new_zeros(hidden.shape if need[0] else 0, dtype=chunks.dtype)
        self.weight = new_large(hidden, *(weight.shape if need[1] else (0,)), dtype=chunks.dtype)
        self.bias = hidden.new_zeros(len(weight) if need[2] else 0, dtype=chunks.dtype)
        self.accumulate = False  # whether `weight` has values: the first chunk overwrites it
        if chunks.count == 0:
            self.weight.zero_()

    def add(self, index: slice | Tensor, gradient: Tensor) -> None:
        """Adds the gradients of a chunk, from `gradient` by its logits [n, V], which has taken the place of these."""
        hidden, weight, *_ = self.chunks.heads[0]
        if self.need[0]:
            chunk_gradient = hidden.new_empty(len(gradient), hidden.shape[1], dtype=self.chunks.dtype)  # [n, H]
            _product(gradient, weight, chunk_gradient)
            self.hidden[index] = chunk_gradient
        if self.need[1]:
            _product(gradient.T, hidden[index], self.weight, self.accumulate)
            self.accumulate = True
        if self.need[2]:
            self.bias += gradient.sum(0, dtype=self.chunks.dtype)
        self.chunks.held = None

    def __iter__(self) -> Iterator[Tensor]:
        yield from (self.hidden, self.weight, self.bias)
