"""Forward passes without values: they show what a model's attention costs, and what is kept for its backward pass."""

import collections
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig

from ..data.batches import Batch
from ..errors import ConfigError
from ..models import attention, forms, loading
from ..models.causal_lm import CausalLM
from ..models.padded import PaddedCausalLM, group_shapes

NAME = "abkd_shapes"  # the attention function that notes shapes


class AttentionCost(NamedTuple):
    """The sizes of one attention layer."""

    work: int  # query heads times the widths of a key and of a value
    stored: int  # numbers of a token's keys and values
    window: int | None = None  # the last tokens that are seen; None: all
    chunk: int | None = None  # tokens of a chunk that sees itself alone; None: no chunks

    def visible(self, length: int) -> int:
        """Twice the area of what a sequence's tokens see: the square of its length, where nothing limits that."""
        if self.chunk and length > self.chunk:
            whole, rest = divmod(length, self.chunk)
            return whole * self.chunk**2 + rest**2
        if self.window and length > self.window:
            return self.window * (2 * length - self.window)
        return length**2


def attention_costs(config: PretrainedConfig) -> list[AttentionCost]:
    """The attention layers of a model, in their order. Recurrent layers have none.

    A forward pass on the meta device calls a function that notes the shapes. Models whose attention is their own, or
    whose code reads values, are taken as their configuration describes them.
    """
    return _noted_attention(type(config), json.dumps(config.to_dict(), default=str, sort_keys=True))


@functools.cache
def _noted_attention(kind: type[PretrainedConfig], described: str) -> list[AttentionCost]:
    config = kind.from_dict(json.loads(described))
    for most_alike in (1, config.num_hidden_layers):  # a layer may read what an earlier one has left
        try:
            if found := _note_attention(config, most_alike):
                return found
        except Exception:  # models have code of their own
            continue
    return _described_attention(config)


def _note_attention(config: PretrainedConfig, most_alike: int) -> list[AttentionCost]:
    found: dict[int | None, list[AttentionCost]] = collections.defaultdict(list)
    kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers

    def note(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        settings = attention.read_settings(module, query, options)
        work = query.shape[1] * (query.shape[3] + value.shape[3])
        stored = key.shape[1] * (key.shape[3] + value.shape[3])
        found[layers.current].append(AttentionCost(work, stored, settings.window, settings.chunk))
        return value.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register(NAME, note)
    with forms.quiet_transformers(), torch.no_grad(), torch.device("meta"), WithoutValues():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        model.set_attn_implementation(NAME)
        attention.note_masks(model)
        layers = _LayersAlike(CausalLM(model, "model"), kinds, most_alike)
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    return [layer for number in (None, *layers.stands_for) for layer in found[number]]


class _LayersAlike:
    """Makes a model run few of the layers that are alike. The others return what the last of these has returned."""

    def __init__(self, model: CausalLM, kinds: Sequence, most: int) -> None:
        """kinds: by layer, what distinguishes layers with equal weights. most: so many layers alike are run."""
        self.current: int | None = None  # the number of the layer that is running
        self.stands_for: list[int] = []  # by layer: the one that is run in its place
        self.outputs: dict[int, Any] = {}
        alike: dict[tuple, list[int]] = collections.defaultdict(list)
        for number, layer in enumerate(model.layers):
            same = alike[
                (*kinds[number : number + 1], type(layer), *(parameter.shape for parameter in layer.parameters()))
            ]
            if len(same) < most:
                same.append(number)
                layer.forward = functools.partial(self._run, number, layer.forward)
            else:
                layer.forward = functools.partial(self._repeat, same[-1])
            self.stands_for.append(same[-1])

    def _run(self, number: int, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        self.current = number
        self.enter(number, args, kwargs)
        self.outputs[number] = forward(*args, **kwargs)
        self.current = None
        return self.outputs[number]

    def _repeat(self, number: int, *_: Any, **__: Any) -> Any:
        return self.outputs[number]

    def enter(self, number: int, args: tuple, kwargs: dict) -> None:
        """Called before a layer is run."""


def _described_attention(config: PretrainedConfig) -> list[AttentionCost]:
    """The attention layers as the configuration describes them, if it does: all alike."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return []
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    layer = AttentionCost(2 * heads * dim, 2 * key_heads * dim)
    return [layer for kind in kinds if kind.endswith("attention") and "linear" not in kind]


class WithoutValues(TorchFunctionMode):
    """Makes transformers' experts work on tensors without values: one expert's product has the shape of all."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch._grouped_mm:
            with torch.autocast("cpu", enabled=False):  # it computes in the type of the weights
                return args[0] @ args[1][0]
        return func(*args, **(kwargs or {}))


def activation_bytes(config: PretrainedConfig, batch: Batch, dtype: torch.dtype, recompute: bool) -> int:
    """The bytes that a forward pass of the body keeps for its backward pass, counted on fake tensors.

    recompute: layers keep their inputs alone; the one that is being recomputed keeps everything.

    Raises ConfigError where a model can't recompute, and the error of a model that can't run on fake tensors.
    """
    try:
        return _saved_bytes(config, batch, dtype, recompute, most_alike=2)
    except ConfigError:
        raise
    except Exception:  # a layer may read what an earlier one has left
        return _saved_bytes(config, batch, dtype, recompute, most_alike=config.num_hidden_layers)


def _saved_bytes(config: PretrainedConfig, batch: Batch, dtype: torch.dtype, recompute: bool, most_alike: int) -> int:
    form = forms.choose(config, "student")
    half = dtype in (torch.bfloat16, torch.float16)
    storage = torch.float32 if half else dtype
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", dtype, enabled=half), WithoutValues():
        model = AutoModelForCausalLM.from_config(config, dtype=storage, trust_remote_code=False)
        loading.fuse_activations(model)
        model = form.build(model, "student").train()
        if recompute:
            model.checkpoint_layers()  # raises where the model has none
            model.causal_lm.gradient_checkpointing_disable()
        layers = _LayerBytes(model, most_alike)
        with torch.autograd.graph.saved_tensors_hooks(layers.keep, lambda tensor: tensor):
            _run_body(model, batch)
        return layers.total(recompute)


class _LayerBytes(_LayersAlike):
    """The bytes that a model's layers keep in a forward pass."""

    def __init__(self, model: CausalLM, most: int) -> None:
        super().__init__(model, (), most)
        # By storage; kept alive, so that no address is used twice.
        self.kept = {parameter.untyped_storage()._cdata: parameter for parameter in model.parameters()}
        self.received: dict[int, Tensor] = {}
        self.saved: collections.Counter = collections.Counter()  # by layer; None: outside of the layers
        self.inputs: collections.Counter = collections.Counter()

    def enter(self, number: int, args: tuple, kwargs: dict) -> None:
        tensors = (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        self.inputs[number] += sum(_new_bytes(tensor, self.received) for tensor in tensors)

    def keep(self, tensor: Tensor) -> Tensor:
        """Called with every tensor that is saved for the backward pass."""
        self.saved[self.current] += _new_bytes(tensor, self.kept)
        return tensor

    def total(self, recompute: bool) -> int:
        saved = [self.saved[number] for number in self.stands_for]
        if recompute:
            return self.saved[None] + sum(self.inputs[number] for number in self.stands_for) + max(saved, default=0)
        return self.saved[None] + sum(saved)


def _new_bytes(tensor: Tensor, known: dict[int, Tensor]) -> int:
    """The bytes of a tensor's storage that is not yet known; it becomes so."""
    storage = tensor.untyped_storage()
    if storage._cdata in known:
        return 0
    known[storage._cdata] = tensor
    return storage.nbytes()


def _run_body(model: CausalLM, batch: Batch) -> None:
    if not isinstance(model, PaddedCausalLM):
        model.hidden_states(batch)
        return
    for rows, length in group_shapes(batch.lengths):
        model.run(input_ids=torch.zeros(rows, length, dtype=torch.int64))
