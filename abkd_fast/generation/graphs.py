"""The decoder on a GPU: all slots are computed at once, as one CUDA graph. It is kept from call to call."""

import contextlib
import functools
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import distributed
from ..errors import first_line
from ..models.attention import Settings
from ..models.causal_lm import compute_dtype
from ..models.packed import PackedCausalLM
from .decoder import Decoder, one_query_written_out, projections, upload

KEPT_SHARE = 1 / 8  # of the GPU's memory: what all decoders together may keep between calls
BUCKET = 256  # capacities are multiples of this, so that calls with other prompts find a decoder that fits

kept_decoders: weakref.WeakKeyDictionary[PackedCausalLM, "GraphDecoder"] = weakref.WeakKeyDictionary()


def graph_decoder(model: PackedCausalLM, slots: int, capacity: int) -> "GraphDecoder":
    """The decoder that an earlier call has left for this model if it fits, or else a new one."""
    capacity = round_capacity(capacity)
    decoder = kept_decoders.pop(model, None)
    if decoder is not None and decoder.fits(model, slots, capacity):
        decoder.model = model
        return decoder
    del decoder  # its memory is needed
    return GraphDecoder(model, slots, capacity)


def round_capacity(tokens: int) -> int:
    """How many tokens a slot has room for, if a sequence may have so many."""
    return -(-tokens // BUCKET) * BUCKET


class GraphDecoder(Decoder):
    """Computes all slots, idle ones included: one shape, captured once as a CUDA graph, and then replayed.

    The graph reads 16-bit copies of the weights, which every call refreshes in place. (Autocast's copies are gone after
    each call.) Between calls it keeps copies, keys, values and graph, as long as the model lives, if all decoders take
    no more than an eighth of the GPU's memory.

    The graph does what the model did when it was captured. New values of weights are seen, and new tensors in their
    place lead to a new graph. Other changes are not: an adapter that is switched off or scaled, an activation replaced.
    Make a new PackedCausalLM after these.
    """

    def __init__(self, model: PackedCausalLM, slots: int, capacity: int) -> None:
        super().__init__(model, slots, capacity)
        # The communication around the layers of a sharded model can't be captured, and its weights come and go.
        self.use_graph = self.is_kept = not distributed.is_sharded(model)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.copies: list[tuple[Tensor, Tensor | None]] = []  # weight and bias of the projections in other types
        self.inputs = torch.zeros(3, slots, dtype=torch.long, device=self.device)  # slot, token, position of each row
        self.inputs[0] = torch.arange(slots, device=self.device)
        self.starts = torch.arange(slots + 1, dtype=torch.int32, device=self.device)  # of the queries; of keys below
        self.reads = _addresses(model) if self.is_kept else []

    def fits(self, model: PackedCausalLM, slots: int, capacity: int) -> bool:
        """Whether it serves for this call: the graph has the addresses of all weights in it."""
        return slots <= self.slots and capacity <= self.capacity and self.reads == _addresses(model)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        model, self.model = self.model, None  # what is kept must not keep the model
        held = sum(decoder.nbytes for decoder in (self, *kept_decoders.values()))
        room = KEPT_SHARE * torch.cuda.get_device_properties(self.device).total_memory
        if error[0] is None and self.is_kept and held <= room:
            kept_decoders[model] = self

    @property
    def nbytes(self) -> int:
        copies = (tensor for pair in self.copies for tensor in pair if tensor is not None)
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values, *copies))

    def decode(self, sequences: dict[int, list[int]]) -> Tensor:
        self.reads_prompts = False
        tokens, positions = [0] * self.slots, [0] * self.slots  # an idle slot reads a token 0 of its own
        for slot, sequence in sequences.items():
            tokens[slot], positions[slot] = sequence[-1], len(sequence) - 1
        uploaded = upload([*tokens, *positions, *sequences], self.device)
        self.inputs[1:] = uploaded[: 2 * self.slots].view(2, -1)
        hidden = self._replay() if self.use_graph else self._all_slots()
        return self._logits(hidden.index_select(0, uploaded[2 * self.slots :]))

    def _all_slots(self) -> Tensor:
        """The final hidden states [slots, H] after `inputs`."""
        self.lengths = self.inputs[2].int() + 1
        return self._hidden_states(self.inputs)

    def _replay(self) -> Tensor:
        """The same as `_all_slots`, from the graph if it can be captured."""
        if self.graph is None:
            try:
                self._capture()
            except RuntimeError as error:
                reason = first_line(error.__context__ or error)  # the end of the capture fails in turn
                warnings.warn(f"abkd_fast: generation goes on without CUDA graphs ({reason})", RuntimeWarning, 2)
                self.use_graph = False
                return self._all_slots()
        self.graph.replay()
        return self.hidden

    def _capture(self) -> None:
        """Records `_all_slots`. Raises RuntimeError if it does what can't be recorded.

        `torch.cuda.graph` would empty the allocator's cache, and leave its stream current after an error.
        """
        graph, pool, stream = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), _capture_stream(self.device)
        caller, is_autocast = torch.cuda.current_stream(self.device), torch.is_autocast_enabled("cuda")
        stream.wait_stream(caller)
        # Without autocast's cache, its copies of other weights than the projections' become a part of the graph.
        autocast = torch.autocast("cuda", torch.get_autocast_dtype("cuda"), is_autocast, cache_enabled=False)
        with torch.cuda.stream(stream), autocast:
            self._all_slots()  # outside the graph: kernels are loaded and chosen
            # Another thread may pin memory meanwhile (data.batches.prefetch). The default mode forbids that.
            graph.capture_begin(pool, "thread_local")
            try:
                self.hidden = self._all_slots()
            finally:
                self._end_capture(graph, pool)
        caller.wait_stream(stream)
        self.graph = graph

    def _end_capture(self, graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            # Older versions of PyTorch leave allocator and random numbers as if the capture went on.
            with contextlib.suppress(RuntimeError):  # newer ones have ended it
                torch._C._cuda_endAllocateToPool(self.device.index, pool)
            generator = torch.cuda.default_generators[self.device.index]
            generator.graphsafe_set_state(generator.clone_state())
            raise

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Decoder`, but [slots, capacity, key heads, dim], with one dim that the kernel supports for both."""
        if self.layer == len(self.keys):
            dim = -(-max(key.shape[3], value.shape[3]) // 8) * 8
            for kept in (self.keys, self.values):
                kept.append(value.new_zeros(self.slots, self.capacity, key.shape[1], dim))
        slots, positions = self.where
        for kept, x in ((self.keys, key), (self.values, value)):
            kept[self.layer][slots, positions, :, : x.shape[3]] = x[0].transpose(0, 1).to(value.dtype)
        self.layer += 1
        return self.keys[self.layer - 1], self.values[self.layer - 1]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, settings: Settings) -> Tensor:
        query, dim = query[0].transpose(0, 1).to(keys.dtype), query.shape[-1]  # [slots, heads, dim]
        query = F.pad(query, (0, keys.shape[-1] - dim))
        has_chunks = settings.chunk is not None and settings.chunk < self.capacity
        if has_chunks or settings.softcap is not None or settings.sinks is not None:
            return self._attend_written_out(query, keys, values, settings)[None]
        lengths, scale, window = self.lengths, settings.scale, settings.window
        return attend_slots(query, keys, values, self.starts, lengths, scale, window)[None]

    def _attend_written_out(self, query: Tensor, keys: Tensor, values: Tensor, settings: Settings) -> Tensor:
        """What the kernel can't do. It reads all keys and values that there is room for."""
        places, lengths = torch.arange(self.capacity, device=self.device), self.lengths[:, None]
        seen = places < lengths  # [slots, capacity]
        if settings.window is not None:
            seen &= places >= lengths - settings.window
        if settings.chunk is not None:
            seen &= places >= (lengths - 1) // settings.chunk * settings.chunk
        query = query.unflatten(1, (keys.shape[2], -1))  # [slots, key heads, heads / key heads, dim]
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        return one_query_written_out(query, keys, values, seen[:, None, None], settings).flatten(1, 2)

    def _fast_products(self) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
        """Layers whose weights are not in the type of products, and what computes them from copies that are."""
        layers = [x for x in projections(self.model) if self.is_kept and compute_dtype(x.weight) != x.weight.dtype]
        if not self.copies:
            for x in layers:
                bias = None if x.bias is None else torch.empty_like(x.bias, dtype=compute_dtype(x.bias))
                self.copies.append((torch.empty_like(x.weight, dtype=compute_dtype(x.weight)), bias))
        with torch.no_grad():
            for layer, (weight, bias) in zip(layers, self.copies, strict=True):
                weight.copy_(layer.weight)
                if bias is not None:
                    bias.copy_(layer.bias)
                weight = weight.T if isinstance(layer, Conv1D) else weight  # [out, in]
                yield layer, functools.partial(F.linear, weight=weight, bias=bias)


def _addresses(model: PackedCausalLM) -> list[object]:
    """What a graph depends on besides its inputs: the type of products, and where weights and buffers are."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return [compute_dtype(model.head.weight), *(tensor.data_ptr() for tensor in tensors)]


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace for every stream."""
    return torch.cuda.Stream(device)


def attend_slots(
    query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, lengths: Tensor, scale: float, window: int | None
) -> Tensor:
    """Attention of one query in each slot over the slot's tokens alone: [slots, heads, dim].

    Args:
        query: [slots, heads, dim].
        keys, values: [slots, capacity, key heads, dim].
        starts: 0, 1, …, slots, in int32.
        lengths: how many tokens each slot has, [slots], int32.
        window: how many of the last tokens are seen; None: all.
    """
    capacity = keys.shape[1]
    # PyTorch's public `varlen_attn` takes seqused_k from 2.12 on. The operator below it took it earlier.
    left, right = (-1, -1) if window is None else (window - 1, 0)
    return torch.ops.aten._flash_attention_forward(
        query,
        keys.flatten(0, 1),
        values.flatten(0, 1),
        starts,
        starts * capacity,
        1,
        capacity,
        0.0,
        False,
        False,
        scale=scale,
        window_size_left=left,
        window_size_right=right,
        seqused_k=lengths,
    )[0]
