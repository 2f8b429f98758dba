"""What a run costs, from shapes alone: floating-point operations of a step, and memory."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from ..config.schema import TrainConfig
from ..data.batches import Batch
from ..generation import decoder
from ..losses.chunks import choose_chunk_tokens
from ..models import loading
from ..models.packed import PackedCausalLM

# Dense bfloat16 products with float32 sums, in operations a second, as the makers state them.
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


def peak_flops(device: torch.device) -> float | None:
    """Operations a second that the GPU could do at most; None for a processor, or a card not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for card, peak in PEAK_FLOPS.items() if card in name), None)


class ModelCost:
    """Sizes of one model that its work and memory depend on. Mixtures of experts count with all experts."""

    def __init__(self, config: PretrainedConfig) -> None:
        outline = loading.meta_model(config)
        head = outline.get_output_embeddings().weight
        body = outline.base_model
        embeddings = [m.weight for m in body.modules() if isinstance(m, nn.Embedding)]
        lookups = {id(weight) for weight in embeddings}
        self.parameters = sum(p.numel() for p in outline.parameters())
        self.body = sum(p.numel() for p in body.parameters() if p.dim() > 1 and id(p) not in lookups)
        self.vocab, self.width = head.shape
        self.head = head.numel()
        self.projections = sum(module.weight.numel() for module in decoder.projections(outline))
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        self.layers = layers
        head_dim = getattr(config, "head_dim", None) or self.width // heads
        self.attention = layers * heads * head_dim
        self.keys_and_values = 2 * layers * (getattr(config, "num_key_value_heads", None) or heads) * head_dim

    def body_flops(self, tokens: int, squares: int) -> int:
        """A forward pass over sequences of so many tokens, and so many squares of lengths, in all; causal attention."""
        return 2 * self.body * tokens + 2 * self.attention * squares

    def head_flops(self, responses: int) -> int:
        return 2 * self.head * responses


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Of training `student`, all of it or an adapter of so many weights, under a teacher that may be cached."""

    student: ModelCost
    adapter: int | None
    teacher: ModelCost | None
    cached: bool

    def flops(self, samples: list[dict], taught: bool = True, read: list[dict] | None = None) -> int:
        """Of one step, as algorithms need them: recomputed layers don't count, nor does generation.

        Args:
            taught: whether the teacher has a part in the loss; on plain text it mostly has none.
            read: the samples that its body reads (default: all, or none with the cache).
        """
        tokens, squares = _lengths(samples)
        responses = tokens - sum(sample["prompt_length"] for sample in samples)
        passes = 3 if self.adapter is None else 2  # forward, gradients of the activations, and of the weights
        flops = passes * (self.student.body_flops(tokens, squares) + self.student.head_flops(responses))
        if self.teacher and taught:
            flops += self.teacher.head_flops(responses)
            read = ([] if self.cached else samples) if read is None else read
            flops += self.teacher.body_flops(*_lengths(read))
        return flops


def _lengths(samples: list[dict]) -> tuple[int, int]:
    """The sums of the lengths of sequences, in tokens, and of their squares."""
    lengths = [len(sample["input_ids"]) for sample in samples]
    return sum(lengths), sum(length * length for length in lengths)


def activation_bytes(config: PretrainedConfig, batch: Batch, dtype: torch.dtype, recompute: bool) -> int:
    """What a forward pass of the model's body keeps for its backward pass, counted on tensors without memory.

    `recompute`: of the layers only the inputs, and all of the one that is computed again.
    """
    one, two = (_saved_bytes(config, layers, batch, dtype, False) for layers in (1, 2))
    layers = config.num_hidden_layers
    if not recompute:
        return one + (layers - 1) * (two - one)
    first, second = (_saved_bytes(config, count, batch, dtype, True) for count in (1, 2))
    return first + (layers - 1) * (second - first) + (two - one)


def _saved_bytes(config: PretrainedConfig, layers: int, batch: Batch, dtype: torch.dtype, recompute: bool) -> int:
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    kept: dict[int, Tensor] = {}  # by storage, alive so that none is counted under the address of another

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    half = dtype in (torch.bfloat16, torch.float16)
    storage = torch.float32 if half else dtype
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", dtype, enabled=half):
        model = AutoModelForCausalLM.from_config(config, dtype=storage)
        loading.fuse_activations(model)
        model = PackedCausalLM(model, "student").train()
        if recompute:
            model.checkpoint_layers()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.hidden_states(batch)
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights)


def memory(
    cost: StepCost, config: PretrainedConfig, batch: Batch, train: TrainConfig, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, int]]:
    """About how many bytes training on such micro-batches needs, by what they hold."""
    student, master = cost.student, 8 if dtype == torch.float64 else 4
    trained = student.parameters if cost.adapter is None else cost.adapter
    frozen = student.parameters if cost.adapter is not None else 0
    yield "student's weights", trained * master + frozen * dtype.itemsize
    yield "gradients and optimizer", 3 * trained * master
    if device.type == "cpu":
        yield "copies, while a checkpoint is written", 3 * trained * master
    if cost.teacher:
        yield "teacher", (cost.teacher.head if cost.cached else cost.teacher.parameters) * dtype.itemsize
    yield "activations", activation_bytes(config, batch, dtype, train.gradient_checkpointing)
    rows_of = 2 if cost.teacher else 1
    logits = torch.float64 if dtype == torch.float64 else torch.float32
    rows = choose_chunk_tokens(len(batch.labels), student.vocab, rows_of, logits, device)
    gradient = student.head * master if cost.adapter is None else 0
    yield "logits of a chunk and the projection's gradient", rows_of * rows * student.vocab * logits.itemsize + gradient


def generation_memory(
    writers: list[tuple[ModelCost, int | None]],
    sequences: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[tuple[str, int]]:
    """How many bytes sampling takes besides its models, by what they hold.

    Args:
        writers: the models, each with the number of its adapter's weights (None: it has none, or a merged one).
        sequences: in progress at a time.
        length: of the longest prompt with its response, in tokens.
    """
    per_token = sum(cost.keys_and_values for cost, _ in writers)
    yield f"keys and values of {sequences} sequences", sequences * length * per_token * dtype.itemsize
    if decoder.rearranges(device, dtype):
        copied = sum(cost.projections + (adapter or 0) for cost, adapter in writers)
        yield "rearranged weights", copied * dtype.itemsize
