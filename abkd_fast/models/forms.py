"""Which form a model trains in, found out on a small random model of its configuration before any weights load."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..errors import ConfigError, first_line
from ..losses.arguments import LogitMap
from . import attention
from .causal_lm import CausalLM
from .packed import PackedCausalLM
from .padded import PaddedCausalLM

LENGTHS = (23, 19, 13, 9, 7)  # tokens of the rows that are compared: on both sides of SPAN, neighbors of similar length
SPAN = 8  # windows, chunks and blocks of attention are no longer than this in the small model
SMALL = 64  # vocabulary and inner widths of the small model
MOST_WEIGHTS = 2**28  # of the small model
MOST_KINDS = 8  # of layers; further ones are left out
TOLERANCE = 1e-4  # of the largest logit: rounding is below 2e-5, Gemma 2 without its attention's cap is 9e-4 off
LARGEST_LOGIT = 100.0  # of the small model: soft caps show
SPAN_NAMES = re.compile(
    r"(window|window_size|chunk_size|block_size|index_topk|compressed_attention|local_attention\w*|floor_scale"
    "|original_max_position_embeddings)$"
)
WIDTH_NAMES = re.compile("intermediate_size|ffn|inner|mlp_hidden")
CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")
LOGIT_NAMES = re.compile("^(?!attn).*(logit.*scal|logit.*cap|lm_head_multiplier|output_multiplier)")


@dataclasses.dataclass(frozen=True)
class Form:
    """How a model is trained, and why."""

    problem: str | None  # why it is not packed; None: it is
    logit_map: LogitMap
    needs: frozenset[str] = frozenset()  # what its attention was asked for: `attention.used`

    def build(self, model: nn.Module, key: str) -> CausalLM:
        """The model in this form. It may be wrapped by peft."""
        kind = PackedCausalLM if self.problem is None else PaddedCausalLM
        return kind(model, key, self.logit_map)


def choose(config: PretrainedConfig, key: str, device: torch.device | None = None) -> Form:
    """The form for a model: packed if that computes what the model itself computes, else padded.

    config: of the language model alone. device: where it will run, if that is known: its attention may lack something.

    Raises ConfigError, with the reason, for a model that is right in neither form.
    """
    values = config.to_dict()
    values.pop("quantization_config", None)  # the small model's weights are drawn, not read
    described = json.dumps(values, default=str, sort_keys=True)
    form, refusal = _tried(type(config), described)
    if refusal is not None:
        raise ConfigError(f"{key}: a {config.model_type} model can't be trained: {refusal}")
    missing = attention.missing(device, form.needs) if device is not None else None
    return dataclasses.replace(form, problem=missing) if missing and form.problem is None else form


@functools.cache
def _tried(kind: type[PretrainedConfig], described: str) -> tuple[Form | None, str | None]:
    """The form for a configuration, or the reason why there is none. Random numbers of others stay as they are."""
    without_autocast = torch.autocast("cpu", enabled=False)
    with torch.random.fork_rng(devices=[]), without_autocast, torch.no_grad(), quiet_transformers():
        config = kind.from_dict(json.loads(described))
        torch.manual_seed(0)
        try:
            model = small_model(config)
            logit_map = find_logit_map(model)
            packed = copy.deepcopy(model)
            attention.used.clear()
            problem = _other_attention(packed, _difference(PackedCausalLM, packed, logit_map))
            needs = frozenset(attention.used)
            refusal = None if problem is None else _difference(PaddedCausalLM, model, logit_map)
        except Exception as error:  # models have code of their own
            return None, first_line(error)
    return (Form(problem, logit_map, needs), None) if refusal is None else (None, refusal)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """A context without transformers' warnings: those about a small random model confuse."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _difference(kind: type[CausalLM], model: PreTrainedModel, logit_map: LogitMap) -> str | None:
    """Why a form computes something else than the model itself; None where it doesn't."""
    try:
        difference, _ = kind(model, "model", logit_map).difference(LENGTHS)
    except ConfigError as error:
        return str(error)
    except Exception as error:
        return first_line(error)
    if difference < TOLERANCE:
        return None
    if kind is PaddedCausalLM:
        return f"its logits depend on the tokens that follow, by {difference:.1e} relative: it is not causal"
    return f"its logits differ from its own by {difference:.1e} relative"


def _other_attention(model: PreTrainedModel, problem: str | None) -> str | None:
    """The problem, or that layers compute attention, or something else, in their own way.

    That may be right, too: transformers finds packed sequences by their positions. But it takes the time and memory of
    one long sequence, and such layers can't be decoded here.
    """
    layers = CausalLM(model, "model").layers
    if problem is None and any(isinstance(module, nn.Conv1d) for layer in layers for module in layer.modules()):
        return "its layers have convolutions, which read on from one sequence into the next"
    count = sum(any(module in attention.callers for module in layer.modules()) for layer in layers)
    if count == len(layers):
        return problem
    return "not all of its layers use transformers' attention interface"


@torch.no_grad()
def small_model(config: PretrainedConfig) -> PreTrainedModel:
    """A random model with one layer of each kind, two at least, whose logits and attention scores are large.

    Raises the error of the configuration's own model where that can't be built, or its forward pass fails.
    """
    attempts = (
        (_narrow, _enlarge),
        (_shrink, _enlarge),
        (_shrink_layers, _enlarge),
        (_shrink, None),
        (lambda config: None, None),
    )
    failure: Exception | None = None
    for change, enlarge in attempts:
        small = copy.deepcopy(config)
        try:
            change(small)
            with torch.device("meta"):
                shapes = AutoModelForCausalLM.from_config(small, trust_remote_code=False)
            weights = sum(p.numel() for p in shapes.parameters())
            if weights > MOST_WEIGHTS:  # what hinders a smaller one says more
                failure = failure or ValueError(f"its smallest model here has {weights / 1e6:.0f}M weights")
                continue
            options = {"dtype": torch.float32, "attn_implementation": "eager"}
            model = AutoModelForCausalLM.from_config(small, trust_remote_code=False, **options).eval()
            if enlarge:
                enlarge(model)
            products, _ = _products_and_logits(model)
            if products.isfinite().all():
                break
            failure = ValueError("the logits of a small random model of its configuration are not finite")
        except Exception as error:  # the model can't be that small; the last one is as it is
            failure = error
    else:
        raise failure
    model.get_output_embeddings().weight.mul_(LARGEST_LOGIT / products.abs().max().clamp(min=1e-3))
    return model


def _narrow(config: PretrainedConfig) -> None:
    """Keeps few heads, in groups as before, and few experts. Not every family can be changed that way."""
    _shrink(config)
    values = vars(config)
    name = "num_kv_heads" if values.get("num_kv_heads") else "num_key_value_heads"  # Falcon has the first
    heads, keys = config.num_attention_heads, values.get(name) or config.num_attention_heads
    kept = min(keys, 2) * (heads // keys)
    width = SMALL if values.get("head_dim") else config.hidden_size // heads * kept
    config.hidden_size = min(config.hidden_size, max(SMALL, width))
    config.num_attention_heads = kept
    if values.get(name):
        setattr(config, name, min(keys, 2))
    active = max(values.get(name) or 1 for name in CHOSEN_EXPERTS)
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if values.get(name):
            setattr(config, name, min(values[name], max(4, 2 * active)))


def _shrink(config: PretrainedConfig) -> None:
    _shrink_layers(config)
    config.vocab_size = min(config.vocab_size, SMALL)
    if getattr(config, "vocab_size_per_layer_input", None):  # Gemma 4's second embeddings
        config.vocab_size_per_layer_input = min(config.vocab_size_per_layer_input, SMALL)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, None)
    for name, value in list(vars(config).items()):
        if WIDTH_NAMES.search(name) and isinstance(value, int) and value > SMALL:
            setattr(config, name, SMALL)


def _shrink_layers(config: PretrainedConfig) -> None:
    """Keeps one layer of each kind, and shortens what a layer sees of the past, so that the rows are longer.

    All layers are kept where those don't make a model.
    """
    lists = [*_lists_by_layer(config)]  # in a smaller model further lists may be as long
    kinds = _layer_kinds(config, lists)
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:MOST_KINDS]
    chosen = first if len(first) > 1 else [*range(len(kinds))][:2]
    for indices in (chosen, [*range(max(chosen) + 1)]):
        small = copy.deepcopy(config)
        with contextlib.suppress(Exception):  # models have code of their own
            _keep_layers(small, indices)
            if _layer_kinds(small, lists) == [kinds[index] for index in indices]:
                _keep_layers(config, indices)
                break
    _shorten(vars(config))


def _keep_layers(config: PretrainedConfig, indices: list[int]) -> None:
    for name, value in _lists_by_layer(config).items():
        setattr(config, name, type(value)(value[index] for index in indices))
    if shared := getattr(config, "num_kv_shared_layers", None):  # the last ones
        first = config.num_hidden_layers - shared
        config.num_kv_shared_layers = sum(index >= first for index in indices)
    config.num_hidden_layers = len(indices)


def _shorten(values: dict) -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            _shorten(value)
        elif SPAN_NAMES.search(str(name)) and type(value) in (int, float) and value > SPAN:
            values[name] = type(value)(SPAN)


def _layer_kinds(config: PretrainedConfig, lists: list[str]) -> list[str]:
    """What distinguishes the layers of a model: their modules, the settings of these, and these lists by layer."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    described = [_describe_layer(layer) for layer in CausalLM(model, "model").layers]
    return [f"{text} {[getattr(config, name)[index] for name in lists]}" for index, text in enumerate(described)]


def _lists_by_layer(config: PretrainedConfig) -> dict[str, list | tuple]:
    """The configuration's lists with a value for each layer. A list of the layers' own numbers distinguishes none."""
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list | tuple)
        and len(value) == config.num_hidden_layers
        and list(value) != [*range(len(value))]
    }


def _describe_layer(layer: nn.Module) -> str:
    described = []
    for name, module in layer.named_modules():
        settings = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, bool | int | str) and not re.search("layer_(idx|id|number|index)|training", key)
        }
        shapes = [tuple(parameter.shape) for parameter in module.parameters(recurse=False)]
        described.append((name, type(module).__name__, sorted(settings.items()), shapes))
    return str(described)


def _enlarge(model: PreTrainedModel) -> None:
    """Draws weights whose products are larger than at a model's beginning, so that what caps or masks them shows."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                parameter.normal_()
            elif isinstance(module, nn.Linear | Conv1D) and parameter.dim() == 2:
                parameter.normal_(std=2 / module.weight.shape[1] ** 0.5)
            elif re.search("Experts|Router|Gate", type(module).__name__) and parameter.dim() > 1:
                parameter.normal_(std=2 / max(parameter.shape[1:]) ** 0.5)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def _products_and_logits(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """The products of the output projection's weight for a row of tokens, and the model's logits."""
    head, products = model.get_output_embeddings(), []
    if head is None:
        raise ValueError("it has no output projection (get_output_embeddings)")
    # Not the projection's own result: it may do more than the product, such as scale each token by a learned number.
    hook = head.register_forward_hook(lambda head, x, _: products.append(F.linear(x[0], head.weight, head.bias)))
    try:
        row = torch.arange(LENGTHS[0])[None] % model.config.vocab_size
        logits = model(input_ids=row, use_cache=False).logits
    finally:
        hook.remove()
    if len(products) != 1:
        raise ValueError(f"its forward pass calls its output projection {len(products)} times, expected once")
    return products[0].float(), logits.float()


@torch.no_grad()
def find_logit_map(model: PreTrainedModel) -> LogitMap:
    """What a model does to the products of its output projection, by the numbers of its configuration.

    The same name is a factor in one family and a divisor in another. So each meaning is tried. Raises ValueError where
    none gives the model's logits.
    """
    products, logits = _products_and_logits(model)
    named = {name: value for name, value in vars(model.config).items() if LOGIT_NAMES.search(name) and value}
    numbers = [float(value) for value in named.values() if type(value) in (int, float) and value > 0]
    scales = [1.0, *numbers, *(1 / number for number in numbers)]
    for scale, softcap in itertools.product(scales, [0.0, *numbers]):
        logit_map = LogitMap(scale, softcap)
        if (logit_map(products) - logits).abs().max() <= 1e-4 * logits.abs().max():
            return logit_map
    known = "".join(f"; {name} = {value}" for name, value in named.items())
    raise ValueError(f"its logits are not its output projection's products, scaled or softly capped{known}")
