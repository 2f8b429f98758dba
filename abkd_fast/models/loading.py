"""Hugging Face causal language models: load, check, split into body and output projection, save."""

import copy
import dataclasses
import json
import pathlib
import warnings
from collections.abc import Iterable

import safetensors
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from ..config.models import IN_MEMORY, ModelConfig
from ..errors import OWN_CODE, TOO_DEEP, ConfigError, first_line, is_deep, reading
from ..files import check_path_length, entries, is_local_path
from ..losses.arguments import LogitMap
from . import attention, dropout, experts, forms, quantized, wrappers
from .causal_lm import CausalLM
from .forms import Form
from .identity import ADAPTER_SETTINGS
from .quantized import Quantization

transformers.utils.logging.disable_progress_bar()  # the run shows its own
# Newer versions of transformers renamed what peft and this module still call by the old name.
warnings.filterwarnings("ignore", r".*gradient_checkpointing.* is deprecated", FutureWarning)

MOST_LAYERS = 10_000  # each takes milliseconds, also without weights: of a damaged number more, it would never end
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")


def check_path(path: str, key: str) -> None:
    """Raises ConfigError for a local folder that holds no model."""
    folder = pathlib.Path(path)
    if folder.exists():
        if (folder / ADAPTER_SETTINGS).exists():
            role = key.partition(".")[0]
            raise ConfigError(f"{key}: {path} holds a LoRA adapter: give it as {role}.adapter, and its base as {key}")
        if not (folder / "config.json").exists():
            raise ConfigError(f"{key}: {path} has no config.json; expected a model folder in Hugging Face layout")
        _check_weights(folder, key)
    elif is_local_path(path):
        raise ConfigError(f"{key}: {path}: no such model folder")


def _check_weights(folder: pathlib.Path, key: str) -> None:
    """Raises ConfigError where files are missing, cut off, or Git's pointers to files. Reads their headers alone."""
    files = [*entries(folder, "*.safetensors"), *entries(folder, "*.bin")]
    if not files:
        raise ConfigError(f"{key}: {folder} has no weights (*.safetensors or *.bin)")
    for file in files:
        file.open("rb").close()  # safetensors says of what can't be read that it is not there
        if file.suffix == ".safetensors":
            with reading(f"{key}: {file} is damaged or incomplete", ": get it again"):
                safetensors.safe_open(file, "pt").__exit__(None, None, None)
    index = folder / "model.safetensors.index.json"
    with reading(f"{key}: {index} is damaged", ": get it again"):
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.exists() else ()
        missing = sorted(name for name in set(names) if not (folder / name).exists())
    if missing:
        raise ConfigError(f"{key}: {folder} lacks {len(missing)} files of its index, the first: {missing[0]}")


def model_spec(path: str) -> ModelConfig:
    """The model at a path: a folder or Hub name, or the folder of a LoRA adapter and its base. Raises ConfigError."""
    check_path_length("model", path)
    settings = pathlib.Path(path, ADAPTER_SETTINGS)
    if not settings.exists():
        return ModelConfig(path=path)
    with reading(f"model: {settings} names no base model", ": the adapter can't be used alone"):
        base = json.loads(settings.read_text(encoding="utf-8"))["base_model_name_or_path"]
        if not isinstance(base, str):
            raise TypeError(f"base_model_name_or_path is {json.dumps(base)[:60]}")
    return ModelConfig(path=base, adapter=path, quantize=quantized.saved_wish(settings.parent))


@dataclasses.dataclass(frozen=True)
class MetaModel:
    """A model before its weights load."""

    spec: ModelConfig
    config: PretrainedConfig
    model: PreTrainedModel  # on the meta device: shapes without memory
    form: Form  # how it is trained
    adapter_size: int | None  # weights of its LoRA adapter; None without one
    whole: PretrainedConfig  # as it is published; `config` is a part of it where the model is multimodal
    router_loss_weight: float = 0.0  # of the auxiliary loss of its routers in training
    quantization: Quantization | None = None


def read_meta_model(spec: ModelConfig, key: str) -> MetaModel:
    """Reads a model's configuration, and its adapter's, without weights.

    Raises ConfigError where there is none, where its numbers don't fit together, where the adapter doesn't fit it, and
    for quantized weights that can't be used.
    """
    what, folder = f"{key}.config", spec.path
    if spec.path is not None:
        check_path(spec.path, f"{key}.path")
        what = f"{key}.path: {spec.path}"
    elif spec.config is None:
        folder, what = spec.hidden_states, f"{key}.hidden_states: {spec.hidden_states}"
        if not pathlib.Path(folder, "config.json").is_file():
            raise ConfigError(f"{what} has no config.json; expected a folder that python -m abkd_fast.cache has built")
    try:
        known = {name: value for name, value in (spec.config or {}).items() if name != IN_MEMORY}
        whole = AutoConfig.for_model(**known) if folder is None else read_config(folder)
        config = wrappers.language_config(whole)
        if (layers := getattr(config, "num_hidden_layers", None) or 0) > MOST_LAYERS:
            raise ValueError(f"num_hidden_layers is {layers}, expected at most {MOST_LAYERS}")
        model = wrappers.language_model(meta_model(whole))  # fails where its numbers don't fit together
    except Exception as error:  # transformers checks with many kinds of errors
        raise ConfigError(f"{what}{_hub_problem(error)} ({first_line(error)})") from error
    if folder != spec.path:  # its states are there already, so it has no form to run in
        return MetaModel(spec, config, model, Form(None, LogitMap()), None, whole)
    if spec.dropout is not None:
        dropout.set_rates(config, spec.dropout, key)
    form = forms.choose(config, key)
    with reading(what):
        wrappers.check(whole)
    adapter_size = None
    if spec.has_adapter:
        from . import lora

        adapter_size = lora.check_adapter(meta_model(whole), spec, key)
    quantization = quantized.read(spec, whole, key)
    if quantization is not None:
        quantization = quantized.check(quantization, meta_model(whole), key)
    router_loss_weight = experts.loss_weight(model, spec.router_aux_loss, key)
    return MetaModel(spec, config, model, form, adapter_size, whole, router_loss_weight, quantization)


def read_config(path: str) -> PretrainedConfig:
    """A model's configuration, from a folder or the Hub. A model's own code is not run.

    Raises ValueError for a model that needs it, and for values that are nested too deeply, and transformers' errors.
    """
    values, _ = PretrainedConfig.get_config_dict(path)
    if is_deep(values):
        raise ValueError(f"config.json {TOO_DEEP}")
    if "auto_map" in values and values.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(f"{OWN_CODE}, and this {values.get('model_type')} model is none")
    return AutoConfig.from_pretrained(path, trust_remote_code=False)


def _hub_problem(error: BaseException | None) -> str:
    """What the Hub said, in words; nothing for an error that has another cause."""
    problems = {
        GatedRepoError: ": its owner lets only chosen accounts read it: accept its terms on the Hub, then log in",
        RepositoryNotFoundError: ": no such folder, and no such model on the Hub (a private one needs a login)",
        LocalEntryNotFoundError: ": no such folder, and no such model on the Hub can be asked for: it can't be reached",
    }
    while error is not None:
        for kind, text in problems.items():
            if isinstance(error, kind):
                return text
        error = error.__cause__ or error.__context__
    return ""


def meta_model(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The whole model on the meta device: shapes without memory for weights."""
    with torch.device("meta"):
        return wrappers.from_config(config, **({} if dtype is None else {"dtype": dtype}))


def describe(meta: MetaModel, rank: int | None = None) -> str:
    """Size and kind of a model, and of its adapter: "3431.8M (llama), LoRA rank 16: 5.3M trained".

    rank: of the adapter that is trained. Weights are counted before they load: quantized ones lie packed later.
    """
    size, kind = sum(p.numel() for p in meta.model.parameters()), meta.model.config.model_type
    if rank is None:
        return f"{size / 1e6:.1f}M ({kind})"
    added = meta.adapter_size
    return f"{(size + added) / 1e6:.1f}M ({kind}), LoRA rank {rank}: {added / 1e6:.1f}M trained"


def max_positions(config: PretrainedConfig) -> int | None:
    """How many tokens a sequence may have; None where attention has ALiBi, or nothing knows positions."""
    if getattr(config, "alibi", False):  # Falcon's, of any length
        return None
    return next((value for name in POSITIONS if (value := getattr(config, name, None)) is not None), None)


def check_length(config: PretrainedConfig, key: str, max_length: int) -> None:
    """Raises ConfigError where samples may be longer than the model has positions."""
    positions = max_positions(config)
    if positions is not None and max_length > positions:
        raise ConfigError(f"data.max_length is {max_length}, but the {key} has {positions} positions; lower it")


def check_prompts(config: PretrainedConfig, prompts: Iterable[tuple[str, list[int]]]) -> None:
    """Raises ConfigError where a prompt has a token that the model lacks, or leaves no room for a response.

    Each prompt is given with its place in the data.
    """
    positions, size = max_positions(config), config.vocab_size
    for where, prompt in prompts:
        if (highest := max(prompt, default=0)) >= size:
            raise ConfigError(
                f"{where}: the prompt has token id {highest}, and the model {size} vocabulary entries; drop the row, "
                "or give the model's own tokenizer"
            )
        if positions is not None and len(prompt) >= positions:
            raise ConfigError(
                f"{where}: the prompt has {len(prompt)} tokens, and the model {positions} positions: no room for an "
                "answer; drop the row, or lower max_prompt_length"
            )


def load(
    spec: ModelConfig,
    config: PretrainedConfig,
    key: str,
    dtype: torch.dtype,
    device: torch.device,
    in_parts: bool = False,
    given: PreTrainedModel | None = None,
) -> CausalLM:
    """Loads a model with its weights in `dtype`; without a path they are those of `given`, or random.

    Its activations are fused. A student's adapter is attached, and it alone is trained. Other adapters are merged,
    except into quantized weights: these would round the sum. Of a multimodal model the language model is returned; a
    student keeps the whole for saving.

    config: of the whole model.
    in_parts: the weights will be sharded over processes. They stay mapped from the disk in their files' type where
        possible, so that memory never holds more than a process's part.
    given: a whole model in memory. It is used, not copied, except for a teacher in another type. It gets the weights of
        the path, if there is one.

    Raises ConfigError for weights that are missing, damaged or of another shape, for an adapter without a path, and for
    a sliding window where attention has none.
    """
    whole, config = config, wrappers.language_config(config)
    if spec.path is None:
        check_weights(spec, key, given is not None)
    if key == "student" and not attention.supports_dropout(device):
        dropout.remove_from_attention(config, key, device)
    if getattr(config, "sliding_window", None) is not None and not attention.supports_windows(device):
        raise ConfigError(
            f"{key}: a {config.model_type} model whose attention has a sliding window needs torch 2.11 or flash-attn "
            f"on a GPU; this is torch {torch.__version__}, without flash-attn"
        )
    quantization = quantized.read(spec, whole, key, dtype)
    placed = _placement(spec, quantization, device)
    if spec.path is None:
        model = wrappers.from_config(whole, dtype=dtype) if given is None else _in_type(given, dtype, key)
        language = wrappers.language_model(model)
    else:
        if spec.has_adapter:
            from . import lora

        merges = key != "student" and spec.adapter is not None and quantization is None
        read_dtype = torch.promote_types(dtype, torch.float32) if merges else dtype
        if in_parts and not spec.has_adapter:
            read_dtype = _type_in_files(spec.path, dtype)
        with reading(f"{key}.path: {spec.path}: its weights can't be read"):
            model, found = wrappers.model_class(whole).from_pretrained(
                spec.path,
                config=whole,
                dtype=read_dtype,
                output_loading_info=True,
                trust_remote_code=False,
                **placed,
            )
        if missing := sorted(found["missing_keys"]):  # transformers would use random weights for these
            names = f"{missing[0]} and {len(missing) - 1} others" if missing[1:] else missing[0]
            raise ConfigError(f"{key}.path: {spec.path}: its weights don't fit its config.json: no {names}")
        if unread := _unread(model, found["unexpected_keys"]):
            problem = f"its weights have {unread}, which is not read: is it quantized, and config.json doesn't say how?"
            raise ConfigError(f"{key}.path: {spec.path}: {problem}")
        if merges:
            model = lora.merge_adapter(model, spec, key, dtype)
        if spec.device_map is not None:
            _place_head(model, device)
        if given is not None:
            model = _filled(_in_type(given, dtype, key), model, f"{key}: {spec.path}")
        language = wrappers.language_model(model)
        if not in_parts:
            # Copied out of the mapped file: each file has its own alignment, which may change a product's last bit.
            for parameter in language.parameters():
                if type(parameter) is nn.Parameter and not parameter.is_meta:
                    parameter.data = parameter.data.clone()
    is_quantized = getattr(model, "is_quantized", False)  # transformers dequantizes some that it can't compute with
    if spec.has_adapter and not merges:
        model = lora.attach_adapter(model, spec, key)
    trained = model if config is whole else language
    fuse_activations(trained)
    if spec.dropout is not None:
        dropout.set_modules(trained, spec.dropout)
    causal_lm = forms.choose(config, key, device).build(trained if in_parts or placed else trained.to(device), key)
    if config is not whole and key == "student":
        causal_lm.wrapper = wrappers.Wrapper(model, language, spec.path)
    if is_quantized:
        quantized.without_cpu_packing(trained)
        causal_lm.tolerance = quantized.TOLERANCE
        causal_lm.can_compile = quantization.quantizer().is_compileable
    causal_lm.can_compile &= spec.device_map is None
    return causal_lm


def check_weights(spec: ModelConfig, key: str, is_given: bool) -> None:
    """Raises ConfigError where a model without a path has no weights, or an adapter. is_given: it is in memory."""
    if is_given and spec.has_adapter:
        problem = f"a model in memory is trained as it is, but there is {key}.adapter or {key}.lora, too"
        way_out = f'leave that out, or give a folder: {key}={{"path": FOLDER, "lora": {{"rank": 8}}}}'
        raise ConfigError(f"{key}: {problem}; {way_out}", key)
    if spec.has_adapter:
        raise ConfigError(f"{key}: an adapter needs the same weights every time, config gives random ones: use path")
    if not is_given and IN_MEMORY in (spec.config or {}):
        problem = "config is of a model that a Python program had in memory: its weights are not there"
        raise ConfigError(f"{key}: {problem}; give it again, to abkd_fast.distill, or a path", key)


def _in_type(given: PreTrainedModel, dtype: torch.dtype, key: str) -> PreTrainedModel:
    """A model in memory, in `dtype`. A teacher keeps its own bits: nobody could restore them."""
    return (given if key == "student" or given.dtype == dtype else copy.deepcopy(given)).to(dtype)


def _filled(given: PreTrainedModel, loaded: PreTrainedModel, what: str) -> PreTrainedModel:
    """A model in memory, with the weights of the one that a path has."""
    with reading(f"{what}: its weights don't fit the model in memory", "; give a model that is what it was"):
        given.load_state_dict(loaded.state_dict())
    return given


def published_dtype(path: str, why: str) -> torch.dtype:
    """The type that transformers reads a model in by dtype="auto": its configuration's, or the first weight's.

    why: begins the message of the ConfigError for a type that no weights are trained or converted to.
    """
    with reading(f"{why}, but the type of {path} can't be read"):
        whole = read_config(path)
        dtype = wrappers.language_config(whole).dtype or whole.dtype or wrappers.first_dtype(path)
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ConfigError(f"{why}, but {path} has {dtype}; give float32, bfloat16 or float16")
    return dtype


def _unread(model: PreTrainedModel, names: Iterable[str]) -> str | None:
    """A tensor of a checkpoint that belongs to a projection and is not read: a bias, or the scale of its numbers."""
    projections = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    return next((name for name in sorted(names) if name.rpartition(".")[0] in projections), None)


def _placement(spec: ModelConfig, quantization: Quantization | None, device: torch.device) -> dict:
    """Arguments of `from_pretrained` for weights that it places itself; none where all go to `device` afterwards."""
    if quantization is None and spec.device_map is None:
        return {}
    settings = {} if quantization is None or quantization.is_stored else {"quantization_config": quantization.settings}
    one = {"": torch.cuda.current_device() if device.type == "cuda" else str(device)}
    return {"device_map": spec.device_map or one, **settings}


def _place_head(model: PreTrainedModel, device: torch.device) -> None:
    """Puts the output projection of a model that is spread over devices on `device`, where the losses read it.

    It gets weights of its own: those that accelerate has offloaded are gone between forward passes.
    """
    from accelerate.hooks import remove_hook_from_module
    from accelerate.utils import align_module_device

    head = model.get_output_embeddings()
    with align_module_device(head):
        tensors = {name: parameter.detach().to(device) for name, parameter in head.named_parameters()}
    remove_hook_from_module(head)
    for name, tensor in tensors.items():
        setattr(head, name, nn.Parameter(tensor, requires_grad=False))
    head.register_forward_pre_hook(lambda _, inputs: tuple(x.to(device) for x in inputs))


def _type_in_files(path: str, otherwise: torch.dtype) -> torch.dtype:
    """The type of a folder's weights if all have one; only weights that keep their type can stay mapped."""
    types = set()
    for file in pathlib.Path(path).glob("*.safetensors"):
        with safetensors.safe_open(file, "pt") as tensors:
            types |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - it is no dict
    known = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
    return known.get(types.pop(), otherwise) if len(types) == 1 else otherwise


def fuse_activations(model: nn.Module) -> None:
    """Replaces GPT-2's GELU by PyTorch's kernel, which may round differently.

    transformers writes the tanh approximation as eight operators and keeps most of their results for backward.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU("tanh"))
