"""Hugging Face causal language models: load, check, split into body and output projection, save."""

import dataclasses
import json
import pathlib
import warnings
from collections.abc import Iterable, Iterator

import safetensors
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.activations import NewGELUActivation

from ..config.schema import ModelConfig
from ..errors import ConfigError, first_line
from ..files import is_local_path
from . import attention, dropout, experts, forms, wrappers
from .causal_lm import CausalLM
from .forms import Form
from .identity import ADAPTER_SETTINGS

transformers.utils.logging.disable_progress_bar()  # the run shows its own
# Newer versions of transformers renamed what peft and this module still call by the old name.
warnings.filterwarnings("ignore", r".*gradient_checkpointing.* is deprecated", FutureWarning)

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
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    if not files:
        raise ConfigError(f"{key}: {folder} has no weights (*.safetensors or *.bin)")
    for file in files:
        try:
            if file.suffix == ".safetensors":
                safetensors.safe_open(file, "pt").__exit__(None, None, None)
        except (OSError, safetensors.SafetensorError) as error:
            raise ConfigError(f"{key}: {file} is damaged or incomplete ({error}): get it again") from None
    index = folder / "model.safetensors.index.json"
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.exists() else ()
        missing = sorted(name for name in set(names) if not (folder / name).exists())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise ConfigError(f"{key}: {index} is damaged: get it again") from None
    if missing:
        raise ConfigError(f"{key}: {folder} lacks {len(missing)} files of its index, the first: {missing[0]}")


def model_spec(path: str) -> ModelConfig:
    """The model at a path: a folder or Hub name, or the folder of a LoRA adapter, which is merged into its base."""
    settings = pathlib.Path(path, ADAPTER_SETTINGS)
    if not settings.exists():
        return ModelConfig(path=path)
    try:
        base = json.loads(settings.read_text(encoding="utf-8"))["base_model_name_or_path"]
        return ModelConfig(path=base, adapter=path)
    except (OSError, ValueError, LookupError, TypeError):
        raise ConfigError(f"model: {settings} names no base model: the adapter can't be used alone") from None


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


def read_meta_model(spec: ModelConfig, key: str) -> MetaModel:
    """Reads a model's configuration, and its adapter's, without weights.

    Raises ConfigError where there is none, where its numbers don't fit together, and where the adapter doesn't fit it.
    """
    what = f"{key}.config"
    if spec.path is not None:
        check_path(spec.path, f"{key}.path")
        what = f"{key}.path: {spec.path}"
    try:
        whole = AutoConfig.for_model(**spec.config) if spec.path is None else read_config(spec.path)
        config = wrappers.language_config(whole)
        model = wrappers.language_model(meta_model(whole))  # fails where its numbers don't fit together
    except Exception as error:  # transformers checks with many kinds of errors
        raise ConfigError(f"{what}{_hub_problem(error)} ({first_line(error)})") from None
    if spec.dropout is not None:
        dropout.set_rates(config, spec.dropout, key)
    form = forms.choose(config, key)
    try:
        wrappers.check(whole)
    except Exception as error:  # models have code of their own
        raise ConfigError(f"{what} ({first_line(error)})") from None
    adapter_size = None
    if spec.has_adapter:
        from . import lora

        adapter_size = lora.check_adapter(meta_model(whole), spec, key)
    router_loss_weight = experts.loss_weight(model, spec.router_aux_loss, key)
    return MetaModel(spec, config, model, form, adapter_size, whole, router_loss_weight)


def read_config(path: str) -> PretrainedConfig:
    """A model's configuration, from a folder or the Hub. A model's own code is not run.

    Raises ValueError for a model that needs it, and transformers' errors.
    """
    values, _ = PretrainedConfig.get_config_dict(path)
    if "auto_map" in values and values.get("model_type") not in CONFIG_MAPPING:
        kind = values.get("model_type")
        raise ValueError(f"it has code of its own (auto_map), which is not run, and transformers knows no {kind} model")
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


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The whole model on the meta device: shapes without memory for weights."""
    with torch.device("meta"):
        return wrappers.from_config(config)


def describe(model: PreTrainedModel, rank: int | None = None) -> str:
    """Size and kind of a model, and of its adapter: "3431.8M (llama), LoRA rank 16: 5.3M trained"."""

    def millions(parameters: Iterator[Tensor]) -> str:
        return f"{sum(p.numel() for p in parameters) / 1e6:.1f}M"

    text = f"{millions(model.parameters())} ({model.config.model_type})"
    if rank is None:
        return text
    return f"{text}, LoRA rank {rank}: {millions(p for p in model.parameters() if p.requires_grad)} trained"


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
) -> CausalLM:
    """Loads a model with its weights in `dtype`; without a path they are random. Its activations are fused.

    A student's adapter is attached, and it alone is trained. Other adapters are merged. Of a multimodal model the
    language model is returned; a student keeps the whole for saving.

    config: of the whole model.
    in_parts: the weights will be sharded over processes. They stay mapped from the disk in their files' type where
        possible, so that memory never holds more than a process's part.

    Raises ConfigError for weights that are missing, damaged or of another shape, for an adapter without a path, and for
    a sliding window where attention has none.
    """
    whole, config = config, wrappers.language_config(config)
    if spec.path is None and spec.has_adapter:
        raise ConfigError(f"{key}: an adapter needs the same weights every time, config gives random ones: use path")
    if key == "student" and not attention.supports_dropout(device):
        dropout.remove_from_attention(config, key, device)
    if getattr(config, "sliding_window", None) is not None and not attention.supports_windows(device):
        raise ConfigError(
            f"{key}: a {config.model_type} model whose attention has a sliding window needs torch 2.11 or flash-attn "
            f"on a GPU; this is torch {torch.__version__}, without flash-attn"
        )
    if spec.path is None:
        model = wrappers.from_config(whole, dtype=dtype)
        language = wrappers.language_model(model)
    else:
        if spec.has_adapter:
            from . import lora

        merges = key != "student" and spec.adapter is not None
        read_dtype = torch.promote_types(dtype, torch.float32) if merges else dtype
        if in_parts and not spec.has_adapter:
            read_dtype = _type_in_files(spec.path, dtype)
        try:
            model, found = wrappers.model_class(whole).from_pretrained(
                spec.path, config=whole, dtype=read_dtype, output_loading_info=True
            )
        except Exception as error:  # of many kinds: missing, truncated or foreign files
            raise ConfigError(f"{key}.path: {spec.path}: its weights can't be read ({first_line(error)})") from None
        if missing := sorted(found["missing_keys"]):  # transformers would use random weights for these
            names = f"{missing[0]} and {len(missing) - 1} others" if missing[1:] else missing[0]
            raise ConfigError(f"{key}.path: {spec.path}: its weights don't fit its config.json: no {names}")
        if merges:
            model = lora.merge_adapter(model, spec, key, dtype)
        language = wrappers.language_model(model)
        if not in_parts:
            # Copied out of the mapped file: each file has its own alignment, which may change a product's last bit.
            for parameter in language.parameters():
                parameter.data = parameter.data.clone()
        if key == "student" and spec.has_adapter:
            model = lora.attach_adapter(model, spec, key)
    trained = model if config is whole else language
    fuse_activations(trained)
    if spec.dropout is not None:
        dropout.set_modules(trained, spec.dropout)
    student = forms.choose(config, key, device).build(trained if in_parts else trained.to(device), key)
    if config is not whole and key == "student":
        student.wrapper = wrappers.Wrapper(model, language, spec.path)
    return student


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
