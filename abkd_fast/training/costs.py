"""The cost of a run, computed from shapes alone: floating-point operations of a step, and memory."""

import copy
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..config.schema import TrainConfig
from ..data.batches import Batch, count_labels
from ..generation import decoder, graphs
from ..losses.chunks import choose_chunk_tokens, gradient_dtype, row_bytes
from ..models import forms, loading

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


def peak_flops(device: torch.device) -> float | None:
    """The most operations a second that the GPU can do; None for a CPU, and for a card that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for card, peak in PEAK_FLOPS.items() if card in name), None)


class ModelCost:
    """The sizes of one model that decide its work and memory. A mixture of experts counts with all experts."""

    def __init__(self, model: PreTrainedModel, quantized_bytes: int | None = None) -> None:
        """model: on the meta device. quantized_bytes: of all its weights, if they are quantized."""
        self.quantized_bytes = quantized_bytes
        config, head, body = model.config, model.get_output_embeddings().weight, model.base_model
        embeddings = [m.weight for m in body.modules() if isinstance(m, nn.Embedding)]
        lookups = {id(weight) for weight in embeddings}
        self.parameters = sum(p.numel() for p in model.parameters())
        self.body = sum(p.numel() for p in body.parameters() if p.dim() > 1 and id(p) not in lookups)
        self.vocab, self.width = head.shape
        self.head = head.numel()
        self.projections = sum(module.weight.numel() for module in decoder.projections(model))
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        self.layers = layers
        head_dim = getattr(config, "head_dim", None) or self.width // heads
        self.attention = layers * heads * head_dim
        self.keys_and_values = 2 * layers * (getattr(config, "num_key_value_heads", None) or heads) * head_dim

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Of frozen weights, in `dtype` unless they are quantized."""
        return self.parameters * dtype.itemsize if self.quantized_bytes is None else self.quantized_bytes

    def body_flops(self, tokens: int, squares: int) -> int:
        """Operations of a causal forward pass, by the sum of the sequences' lengths and the sum of their squares."""
        return 2 * self.body * tokens + 2 * self.attention * squares

    def head_flops(self, labels: int) -> int:
        return 2 * self.head * labels


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
        tokens, squares = _lengths(samples)
        labels = sum(map(count_labels, samples))
        passes = 3 if self.adapter is None else 2  # forward, gradients of the activations, and of the weights
        flops = passes * (self.student.body_flops(tokens, squares) + self.student.head_flops(labels))
        if self.teacher and taught:
            flops += self.teacher.head_flops(labels)
            read = ([] if self.cached else samples) if read is None else read
            flops += self.teacher.body_flops(*_lengths(read))
        return flops


def _lengths(samples: list[dict]) -> tuple[int, int]:
    """The sum of the samples' lengths in tokens, and the sum of their squares."""
    lengths = [len(sample["input_ids"]) for sample in samples]
    return sum(lengths), sum(length * length for length in lengths)


def activation_bytes(config: PretrainedConfig, batch: Batch, dtype: torch.dtype, recompute: bool) -> int:
    """The bytes that a forward pass of the body keeps for its backward pass, counted on fake tensors.

    recompute: layers keep their inputs alone; the one that is being recomputed keeps everything.
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
    kept: dict[int, Tensor] = {}  # by storage; kept alive, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    form = forms.choose(config, "student")
    half = dtype in (torch.bfloat16, torch.float16)
    storage = torch.float32 if half else dtype
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", dtype, enabled=half):
        model = AutoModelForCausalLM.from_config(config, dtype=storage)
        loading.fuse_activations(model)
        model = form.build(model, "student").train()
        if recompute:
            model.checkpoint_layers()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.hidden_states(batch)
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights)


def memory(
    cost: StepCost, config: PretrainedConfig, batch: Batch, train: TrainConfig, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, int]]:
    """Yields about how many bytes training on such micro-batches needs, each with what it holds."""
    student, master = cost.student, 8 if dtype == torch.float64 else 4
    trained = student.parameters if cost.adapter is None else cost.adapter
    frozen = student.weight_bytes(dtype) if cost.adapter is not None else 0
    yield "student's weights", trained * master + frozen
    yield "gradients and optimizer", 3 * trained * master
    if device.type == "cpu":
        yield "copies, while a checkpoint is written", 3 * trained * master
    if cost.teacher:
        yield "teacher", cost.teacher.head * dtype.itemsize if cost.cached else cost.teacher.weight_bytes(dtype)
    yield "activations", activation_bytes(config, batch, dtype, train.gradient_checkpointing)
    rows_of = 2 if cost.teacher else 1
    logits = torch.float64 if dtype == torch.float64 else torch.float32
    bytes_of_row = row_bytes(student.vocab, rows_of, logits, gradient_dtype(dtype, logits, device))
    rows = choose_chunk_tokens(len(batch.labels), bytes_of_row, device)
    gradient = student.head * master if cost.adapter is None else 0
    yield "logits of a chunk and the projection's gradient", rows * bytes_of_row + gradient


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
