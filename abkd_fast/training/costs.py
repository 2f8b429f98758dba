"""The cost of a run, computed from shapes alone: floating-point operations of a step, and memory."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..config.training import OptimConfig, TrainConfig
from ..data.batches import Batch, StepBatch, count_labels, teacher_view
from ..errors import ConfigError
from ..generation import decoder, graphs
from ..losses.chunks import choose_chunk_tokens, gradient_dtype, row_bytes
from ..methods.base import Method
from ..models import forms, loading
from ..models.loading import MetaModel
from ..models.padded import padded_tokens
from .optim import state_bytes
from .shapes import activation_bytes, attention_costs

if TYPE_CHECKING:
    from .teachers import Teachers

# Operations a second of dense bfloat16 products with float32 sums, as the makers state them.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A6000": 155e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}

ADAMW = OptimConfig()
ESTIMATED_KEPT = 4 / 3  # bytes kept for each that products touch: the middle of what 100 families keep


def peak_flops(device: torch.device) -> float | None:
    """The most operations a second that the GPU can do; None for a CPU, and for a card that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for card, peak in PEAK_FLOPS.items() if card in name), None)


class ModelCost:
    """The sizes of one model that decide its work and memory.

    A mixture of experts works with the experts that a token takes, and holds all.
    """

    def __init__(self, model: PreTrainedModel, quantized_bytes: int | None = None) -> None:
        """model: on the meta device. quantized_bytes: of all its weights, if they are quantized."""
        self.quantized_bytes = quantized_bytes
        head = model.get_output_embeddings().weight
        skipped = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} | {id(head)}
        shares = _expert_shares(model)
        matrices = [
            (parameter, shares.get(id(parameter), 1.0))
            for parameter in model.parameters()
            if parameter.dim() > 1 and id(parameter) not in skipped
        ]
        self.parameters = sum(p.numel() for p in model.parameters())
        self.body = round(sum(parameter.numel() * share for parameter, share in matrices))
        # Numbers that the products of one token read and write.
        self.features = sum(w.numel() * (1 / w.shape[-1] + 1 / w.shape[-2]) * share for w, share in matrices)
        self.vocab, self.width = head.shape
        self.head = head.numel()
        self.projections = sum(module.weight.numel() for module in decoder.projections(model))
        self.layers = model.config.num_hidden_layers
        attention = attention_costs(model.config)
        self.attention = collections.Counter()
        for layer in attention:
            self.attention[layer._replace(work=0, stored=0)] += layer.work
        self.keys_and_values = sum(layer.stored for layer in attention)

    @classmethod
    def of(cls, meta: MetaModel, dtype: torch.dtype) -> ModelCost:
        """The cost of a model that loads with its weights in `dtype`."""
        if meta.quantization is None:
            return cls(meta.model)
        return cls(meta.model, meta.quantization.bytes(loading.meta_model(meta.whole, dtype), dtype))

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Of frozen weights, in `dtype` unless they are quantized."""
        return self.parameters * dtype.itemsize if self.quantized_bytes is None else self.quantized_bytes

    def body_flops(self, lengths: Iterable[int]) -> int:
        """Operations of a causal forward pass over sequences of these lengths."""
        lengths = [*lengths]
        return 2 * self.body * sum(lengths) + self.attention_flops(lengths)

    def attention_flops(self, lengths: Iterable[int]) -> int:
        """Those of its products of queries and keys, and of weights and values."""
        lengths = [*lengths]
        return sum(work * sum(map(span.visible, lengths)) for span, work in self.attention.items())

    def head_flops(self, labels: int) -> int:
        return 2 * self.head * labels


def _expert_shares(model: PreTrainedModel) -> dict[int, float]:
    """The share of experts that a token takes, by the id of each weight of the experts."""
    chosen = [vars(module).get("top_k") for module in model.modules()]
    chosen += [getattr(model.config, name, None) for name in ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k")]
    taken = next((number for number in chosen if isinstance(number, int)), None)
    shares = {}
    for name, module in model.named_modules():
        is_list = isinstance(module, nn.ModuleList) and name.endswith(".experts")
        if taken and (is_list or "Experts" in type(module).__name__):
            for parameter in module.parameters():
                experts = len(module) if is_list else getattr(module, "num_experts", parameter.shape[0])
                shares[id(parameter)] = min(1.0, taken / experts)
    return shares


@dataclasses.dataclass(frozen=True)
class StepCost:
    """The cost of training a student under a teacher."""

    student: ModelCost
    adapter: int | None  # weights of the student's adapter; None where the whole student is trained
    teacher: ModelCost | None
    cached: bool  # whether the teacher's hidden states come from the cache

    def flops(self, samples: list[dict], taught: bool = True, read: list[dict] | None = None) -> int:
        """Operations of one step that the algorithm needs. Recomputed layers and generation don't count.

        taught: whether the teacher takes part in the loss; on plain text it mostly doesn't.
        read: the samples that the teacher's body reads (default: all, or none with the cache).
        """
        lengths = _lengths(samples)
        labels = sum(map(count_labels, samples))
        passes = 3 if self.adapter is None else 2  # forward, gradients of the activations, and of the weights
        flops = passes * (self.student.body_flops(lengths) + self.student.head_flops(labels))
        if self.teacher and taught:
            flops += self.teacher.head_flops(labels)
            read = ([] if self.cached else samples) if read is None else read
            flops += self.teacher.body_flops(_lengths(map(teacher_view, read)))
        return flops


def step_flops(batch: StepBatch, costs: dict[str | None, StepCost], teachers: Teachers, method: Method) -> int:
    """The operations of this rank's part of a step. costs: by the keys of the teachers, or of None without one."""
    total = 0
    for part in batch.micro_batches:
        if part.is_pretrain:
            (cost, *_) = costs.values()
            total += cost.flops(part.samples, method.pretrain_needs_teacher)
            continue
        for key, samples in teachers.grouped(part.samples):
            read = teachers[key].uncached(samples) if teachers.is_on_policy else None
            total += costs[key].flops(samples, read=read)
    return total


def _lengths(samples: Iterable[dict]) -> list[int]:
    """The samples' lengths in tokens."""
    return [len(sample["input_ids"]) for sample in samples]


def _estimated_activation_bytes(
    cost: ModelCost, config: PretrainedConfig, batch: Batch, dtype: torch.dtype, recompute: bool
) -> int:
    """About what `activation_bytes` gives, for models that can't run on fake tensors: what their products touch."""
    is_packed = forms.choose(config, "student").problem is None
    tokens = batch.tokens if is_packed else padded_tokens(batch.lengths)
    features = cost.features
    if recompute:
        features = cost.layers * cost.width + features / max(1, cost.layers)
    return round(ESTIMATED_KEPT * tokens * features * dtype.itemsize)


def memory(
    cost: StepCost,
    config: PretrainedConfig,
    batch: Batch,
    train: TrainConfig,
    dtype: torch.dtype,
    device: torch.device,
    optim: OptimConfig = ADAMW,
) -> Iterator[tuple[str, int]]:
    """Yields about how many bytes training on such micro-batches needs, each with what it holds."""
    student, master = cost.student, 8 if dtype == torch.float64 else 4
    trained = student.parameters if cost.adapter is None else cost.adapter
    frozen = student.weight_bytes(dtype) if cost.adapter is not None else 0
    yield "student's weights", trained * master + frozen
    with_state = round(trained * (master + state_bytes(optim, master)))
    yield "gradients and optimizer", with_state
    if device.type == "cpu":
        yield "copies, while a checkpoint is written", with_state  # of the weights in place of the gradients
    if cost.teacher:
        yield "teacher", teacher_bytes(cost, dtype)
    yield _activations(student, config, batch, dtype, train.gradient_checkpointing)
    rows_of = 2 if cost.teacher else 1
    logits = torch.float64 if dtype == torch.float64 else torch.float32
    bytes_of_row = row_bytes(student.vocab, rows_of, logits, gradient_dtype(dtype, logits, device))
    rows = choose_chunk_tokens(len(batch.labels), bytes_of_row, device)
    gradient = student.head * master if cost.adapter is None else 0
    yield "logits of a chunk and the projection's gradient", rows * bytes_of_row + gradient


def teacher_bytes(cost: StepCost, dtype: torch.dtype) -> int:
    """What a teacher takes in memory: its output projection alone, if its states are cached."""
    return cost.teacher.head * dtype.itemsize if cost.cached else cost.teacher.weight_bytes(dtype)


def _activations(student: ModelCost, *arguments: Any) -> tuple[str, int]:
    try:
        return "activations", activation_bytes(*arguments)
    except ConfigError:
        raise
    except Exception:  # models have code of their own: it may read values, which fake tensors have not
        return "activations (estimated)", _estimated_activation_bytes(student, *arguments)


def generation_memory(
    generators: list[tuple[ModelCost, int | None]],
    sequences: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[tuple[str, int]]:
    """Yields how many bytes sampling takes besides its models, each with what it holds.

    Args:
        generators: the models that write, the student first, each with the size of its adapter (None: it has none, or
            it is merged).
        sequences: how many are in progress at a time.
        length: tokens of the longest prompt with its response.
    """
    if device.type == "cuda":
        length = graphs.round_capacity(length)
        student, adapter = generators[0]
        yield "16-bit copies of weights", (student.projections if adapter is None else adapter) * dtype.itemsize
    per_token = sum(cost.keys_and_values for cost, _ in generators)
    yield f"keys and values of {sequences} sequences", sequences * length * per_token * dtype.itemsize
    if decoder.rearranges(device, dtype):
        copied = sum(cost.projections + (adapter or 0) for cost, adapter in generators)
        yield "rearranged weights", copied * dtype.itemsize
