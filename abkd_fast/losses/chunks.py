"""The way from hidden states to logits and from their gradients back, a chunk of tokens at a time.

Two matrix products make the logits of a chunk (`Chunks`). The loss turns them into their gradient in place. Two more
products turn that into the gradients of hidden states and projection (`HeadGradients`). Memory does not grow with the
number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .arguments import LinearHead, loss_dtype
from .row_ops import new_large

if TYPE_CHECKING:
    from .vocab_parallel import Shard

CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}  # logits of one chunk, student's and teacher's together
TILE = {"cpu": 16, "cuda": 128}  # a chunk has a multiple of this number of rows, as matrix products work in tiles
ROW_ALIGNMENT = 64  # columns: every row of a logits buffer starts on a 128-byte boundary at 2 bytes per element


def choose_chunk_tokens(tokens: int, vocab: int, models: int, dtype: torch.dtype, device: torch.device) -> int:
    """The number of rows of a chunk: one chunk if all rows fit into the memory budget, else few chunks of equal size.

    If not all rows fit, a chunk has at most a power of two of rows, as most numbers of tokens are. Memory is then the
    same for 512 tokens and for 8,192.
    """
    row_bytes = _round_up(vocab, ROW_ALIGNMENT) * dtype.itemsize * models
    tile = TILE.get(device.type, 16)
    fitting = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // row_bytes
    if _round_up(tokens, tile) <= fitting:
        return max(tile, _round_up(tokens, tile))
    most = max(tile, 1 << max(0, fitting.bit_length() - 1))
    return min(most, _round_up(math.ceil(tokens / math.ceil(tokens / most)), tile))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _operands(head: LinearHead, dtype: torch.dtype) -> LinearHead:
    """The head in one type: `dtype`, but 16 bits for hidden states of 16 bits on a GPU. Products of those are exact in
    float32."""
    hidden, weight, bias = head
    if not (hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16)):
        hidden = hidden.to(dtype)
    return LinearHead(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))


def _product(left: Tensor, right: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = left right, or out += left right. Sums are in the precision of `out`, and in float32 if that has less.

    If the operands have 16 bits and `out` has 32 (on a GPU only), the product writes its float32 sums unrounded.
    """
    left = left.to(right.dtype)
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
        chunk_tokens: int,
        logits_dtype: torch.dtype,
        shard: Shard | None = None,
    ) -> None:
        """`chunk_tokens` 0 leaves the size to `choose_chunk_tokens`. `shard` says which part of the vocabulary the
        projections have; None is all of it."""
        self.dtype = loss_dtype(student.hidden)
        self.heads = [_operands(head, self.dtype) for head in (student, teacher) if head is not None]
        hidden, self.vocab = student.hidden, len(student.weight)
        self.tokens = len(hidden)
        self.kept = None  # indices of the rows that count, or None if all do
        if labels is not None:
            # Found on the labels' own device: labels that stayed on the CPU need no synchronization with the GPU.
            kept = (labels != -100).nonzero()[:, 0]
            self.kept = None if len(kept) == len(labels) else kept.to(hidden.device, non_blocking=True)
            labels = labels.to(hidden.device, non_blocking=True)
            labels = labels if shard is None else shard.local_labels(labels, self.vocab)
        self.labels = labels
        self.count = self.tokens if self.kept is None else len(self.kept)
        sizes = self.count, self.vocab if shard is None else shard.widest, len(self.heads)
        self.step = chunk_tokens or choose_chunk_tokens(*sizes, logits_dtype, hidden.device)
        shape = len(self.heads), min(self.step, self.count), _round_up(self.vocab, ROW_ALIGNMENT)
        self.buffer = new_large(hidden, *shape, dtype=logits_dtype)
        self.held = None  # the start of the chunk whose logits are in the buffer

    def __iter__(self) -> Iterator[tuple[slice | Tensor, Tensor, Tensor | None, Tensor | None]]:
        """Rows, student logits and teacher logits [n, V] and labels [n] of each chunk.

        Rows are an index of the hidden states. The student's logits may be overwritten; `held` must then become None.
        """
        for start in range(0, self.count, self.step):
            size = min(self.step, self.count - start)
            rows = slice(start, start + size)
            rows = rows if self.kept is None else self.kept[rows]
            logits = [buffer[:size, : self.vocab] for buffer in self.buffer]
            if self.held != start:
                for (hidden, weight, bias), out in zip(self.heads, logits, strict=True):
                    _product(hidden[rows], weight.T, out)
                    if bias is not None:
                        out += bias
            self.held = start
            labels = None if self.labels is None else self.labels[rows]
            yield rows, logits[0], logits[1] if len(logits) > 1 else None, labels

    def new_losses(self) -> Tensor:
        """Zeros [N] in the type of the losses."""
        return self.heads[0].hidden.new_zeros(self.tokens, dtype=self.dtype)


class HeadGradients:
    """The gradients of the student's head, added up over the chunks: `hidden` [N, H], `weight` [V, H], `bias` [V].

    They are float32 (float64 for float64 hidden states). Those that are not needed have no elements.
    """

    def __init__(self, chunks: Chunks, need: list[bool]) -> None:
        hidden, weight, _ = chunks.heads[0]
        self.chunks, self.need = chunks, need
        self.hidden = hidden.new_zeros(hidden.shape if need[0] else 0, dtype=chunks.dtype)
        self.weight = new_large(hidden, *(weight.shape if need[1] else (0,)), dtype=chunks.dtype)
        self.bias = hidden.new_zeros(len(weight) if need[2] else 0, dtype=chunks.dtype)
        self.accumulate = False  # whether `weight` has values: the first chunk overwrites it
        if chunks.count == 0:
            self.weight.zero_()

    def add(self, rows: slice | Tensor, gradient: Tensor) -> None:
        """Adds the gradients of a chunk, from `gradient` by its logits [n, V], which has taken the place of these."""
        hidden, weight, _ = self.chunks.heads[0]
        if self.need[0]:
            chunk_gradient = hidden.new_empty(len(gradient), hidden.shape[1], dtype=self.chunks.dtype)  # [n, H]
            _product(gradient, weight, chunk_gradient)
            self.hidden[rows] = chunk_gradient
        if self.need[1]:
            _product(gradient.T, hidden[rows], self.weight, self.accumulate)
            self.accumulate = True
        if self.need[2]:
            self.bias += gradient.sum(0, dtype=self.chunks.dtype)
        self.chunks.held = None

    def __iter__(self) -> Iterator[Tensor]:
        yield from (self.hidden, self.weight, self.bias)
