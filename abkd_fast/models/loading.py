"""Hugging Face causal language models: load, check, split into body and output projection, save."""

import copy
import dataclasses
import json
import logging
import math
import pathlib
import warnings
from collections.abc import Iterable, Iterator

import safetensors
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import NewGELUActivation
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from ..config.schema import ModelConfig
from ..data import quickstart
from ..data.chat import PromptFormat, chat_template, end_of_turn
from ..data.encode import begin_token
from ..errors import ConfigError, first_line
from ..files import is_local_path
from ..losses.arguments import shared_vocabulary
from . import attention
from .identity import ADAPTER_SETTINGS
from .packed import PackedCausalLM

transformers.utils.logging.disable_progress_bar()  # the run shows its own
# Newer versions of transformers renamed what peft and this module still call by the old name.
warnings.filterwarnings("ignore", r".*gradient_checkpointing.* is deprecated", FutureWarning)

ATTENTION_DROPOUT = ("attn_pdrop", "attention_dropout")
DROPOUT = (*ATTENTION_DROPOUT, "resid_pdrop", "embd_pdrop", "dropout", "hidden_dropout", "activation_dropout")


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
    adapter_size: int | None  # weights of its LoRA adapter; None without one


def read_meta_model(spec: ModelConfig, key: str) -> MetaModel:
    """Reads a model's configuration, and its adapter's, without weights.

    Raises ConfigError where there is none, where its numbers don't fit together, and where the adapter doesn't fit it.
    """
    what = f"{key}.config"
    if spec.path is not None:
        check_path(spec.path, f"{key}.path")
        what = f"{key}.path: {spec.path}: no such folder, and no such model on the Hub"
    try:
        config = AutoConfig.for_model(**spec.config) if spec.path is None else AutoConfig.from_pretrained(spec.path)
        model = meta_model(config)  # fails where the configuration's numbers don't fit together
    except Exception as error:  # transformers checks with many kinds of errors
        raise ConfigError(f"{what} ({first_line(error)})") from None
    if spec.dropout is not None:
        config.update({name: spec.dropout for name in DROPOUT if hasattr(config, name)})
    adapter_size = None
    if spec.has_adapter:
        from . import lora

        adapter_size = lora.check_adapter(meta_model(config), spec, key)
    return MetaModel(spec, config, model, adapter_size)


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model on the meta device: shapes without memory for weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def describe(model: nn.Module) -> str:
    """Size and kind of a model, and of its adapter: "3431.8M (llama), LoRA rank 16: 5.3M trained"."""

    def millions(parameters: Iterator[Tensor]) -> str:
        return f"{sum(p.numel() for p in parameters) / 1e6:.1f}M"

    text = f"{millions(model.parameters())} ({model.config.model_type})"
    if isinstance(model, PreTrainedModel):
        return text
    trained = millions(p for p in model.parameters() if p.requires_grad)
    return f"{text}, LoRA rank {model.peft_config['default'].r}: {trained} trained"


def read_tokenizer(path: str, key: str) -> PreTrainedTokenizerBase:
    """A tokenizer; "quickstart" is that of the generated tasks. Raises ConfigError where there is none."""
    if path == "quickstart":
        return copy.deepcopy(quickstart.tokenizer())  # runs may change theirs
    folder = pathlib.Path(path)
    if folder.is_dir() and not any([*folder.glob(f"{kind}*")] for kind in ("tokenizer", "vocab", "spiece")):
        raise ConfigError(f"{key}: {path} is a folder without a tokenizer; name another as tokenizer")
    try:
        if not folder.exists() and is_local_path(path):
            raise OSError("no such folder")
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except Exception as error:  # of many kinds: a broken file, no network, a missing package
        raise ConfigError(f"{key}: {path}: no tokenizer there ({first_line(error)})") from None
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{key}: {path}: has no end token (eos_token), which every response needs")
    return tokenizer


def tokenizer_path(spec: ModelConfig) -> str:
    """Where a model's tokenizer is: in the folder of its adapter if that has one, or with the model."""
    settings = pathlib.Path(spec.adapter or "", "tokenizer_config.json")
    return spec.adapter if spec.adapter and settings.exists() else spec.path


def use_chat_template(tokenizer: PreTrainedTokenizerBase, path: str | None, key: str, style: PromptFormat) -> None:
    """Takes the chat template in a file in place of the tokenizer's. Raises ConfigError for a file that has none."""
    if path is None:
        return
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{key}: {path}: can't be read ({reason}); expected a file with a chat template") from None
    if not text.strip():
        raise ConfigError(f"{key}: {path}: is empty, expected a chat template")
    tokenizer.chat_template = text
    try:
        chat_template(tokenizer, style)
    except ConfigError as error:
        raise ConfigError(f"{key}: {path}: {error}") from None


def keep_chat_format(tokenizer: PreTrainedTokenizerBase, style: PromptFormat) -> None:
    """Writes the values of a chat template, and a begin token that it lacks, into the template itself.

    The tokenizer is saved with the model, so later commands and other tools render prompts as in training. They may
    still give other values. A template that can't be used stays as it is: rows without messages don't need it.
    """
    try:
        template = chat_template(tokenizer, style)
    except ConfigError:
        return
    if template is None:
        return
    values = [
        f"{{% if {key} is not defined %}}{{% set {key} = {value!r} %}}{{% endif %}}"
        for key, value in (style.chat_template_kwargs or {}).items()
    ]
    added = "".join(values) + ("{{ '' }}" if values else "")  # else a line end that follows a block would vanish
    question = template.render([{"role": "user", "content": "question"}], True)
    if style.begin_token is True and not question.startswith(tokenizer.bos_token or ""):
        added += "{{ bos_token }}"

    def kept(text: str) -> str:
        return text if text.startswith(added) else added + text

    texts = tokenizer.chat_template
    if isinstance(texts, dict):  # several by name, as Command R has
        tokenizer.chat_template = {name: kept(text) for name, text in texts.items()}
    else:
        tokenizer.chat_template = kept(texts)


def keep_begin_token(tokenizer: PreTrainedTokenizerBase, style: PromptFormat) -> bool:
    """Makes a tokenizer add a begin token to plain text, or none, as the style says. Returns whether it does now.

    The tokenizer is saved with the model, and later commands and other tools ask it.
    """
    if style.begin_token == "auto":
        return True
    auto, wanted = PromptFormat(), begin_token(tokenizer, style, is_chat=False)
    if begin_token(tokenizer, auto, is_chat=False) != wanted:
        tokenizer.add_bos_token = bool(wanted)
    return begin_token(tokenizer, auto, is_chat=False) == wanted


def end_tokens(path: str | None, tokenizer: PreTrainedTokenizerBase, style: PromptFormat) -> tuple[int, ...]:
    """The tokens that end what a model writes, from three sources; each is one of the tokenizer's:

    - the tokenizer's end token;
    - `eos_token_id` of the model's generation_config.json, a number or a list;
    - the token with which the chat template ends a turn of the assistant.

    Args:
        path: the model's folder or Hub name; None for random weights.

    Raises ConfigError for a damaged generation_config.json, and for a chat template that can't be used.
    """
    ends = {tokenizer.eos_token_id, end_of_turn(tokenizer, style), *(_generation_ends(path) if path else ())}
    return tuple(sorted(token for token in ends - {None} if 0 <= token < len(tokenizer)))


def _generation_ends(path: str) -> list[int]:
    try:
        file = cached_file(path, GENERATION_CONFIG_NAME)
    except OSError:  # there is none, or the Hub can't be asked; transformers goes on without it, too
        return []
    try:
        values = json.loads(pathlib.Path(file).read_text(encoding="utf-8"))
        ends, is_derived = values.get("eos_token_id"), values.get("_from_model_config", False)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{file} can't be read ({first_line(error)}): get it again") from None
    several = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(token) is int for token in several):
        shown = json.dumps(ends)[:60]
        raise ConfigError(f"{file}: eos_token_id is {shown}, expected the number of a token, or a list of such")
    if is_derived and ends is not None and ends == getattr(_default_config(path), "eos_token_id", None):
        return []  # the default of the configuration's class; with this tokenizer it may be another token
    return several


def _default_config(path: str) -> PretrainedConfig:
    return type(AutoConfig.from_pretrained(path))()


def set_end_tokens(model: PreTrainedModel, ends: tuple[int, ...]) -> None:
    """Makes the generation_config.json that is saved with a model name these tokens."""
    settings = model.generation_config
    settings.eos_token_id, settings._from_model_config = ends[0] if len(ends) == 1 else list(ends), False


def check_vocabularies(
    tokenizer: PreTrainedTokenizerBase,
    student: PretrainedConfig,
    teacher: PretrainedConfig | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Raises ConfigError unless student and teacher read the same tokens and have room for all of them."""
    needed = len(tokenizer)
    if teacher_tokenizer is not None:
        vocabularies = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
        ours, theirs = ({index: token for token, index in vocabulary.items()} for vocabulary in vocabularies)
        different = next((index for index in sorted({*ours, *theirs}) if ours.get(index) != theirs.get(index)), None)
        if different is not None:
            raise ConfigError(
                f"tokenizers of student ({len(tokenizer)} tokens) and teacher ({len(teacher_tokenizer)}) differ at id "
                f"{different} ({ours.get(different)!r} / {theirs.get(different)!r}): distillation needs one vocabulary"
            )
    sizes = {"student": student.vocab_size} | ({} if teacher is None else {"teacher": teacher.vocab_size})
    for role, size in sizes.items():
        if size < needed:
            text = ", ".join(f"{name} has {number}" for name, number in sizes.items())
            raise ConfigError(f"vocabulary: the tokenizer has {needed} tokens, but the {role} fewer ({text})")
    if teacher is not None:
        try:
            shared_vocabulary(student.vocab_size, teacher.vocab_size)
        except ValueError as error:
            raise ConfigError(f"vocabulary: {error}") from None


def check_length(config: PretrainedConfig, key: str, max_length: int) -> None:
    """Raises ConfigError where samples may be longer than the model has positions."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ConfigError(f"data.max_length is {max_length}, but the {key} has {positions} positions; lower it")


def check_prompts(config: PretrainedConfig, prompts: Iterable[tuple[str, list[int]]]) -> None:
    """Raises ConfigError where a prompt leaves no room for a response. Each is given with its place in the data."""
    positions = getattr(config, "max_position_embeddings", math.inf)
    for where, prompt in prompts:
        if len(prompt) >= positions:
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
) -> PackedCausalLM:
    """Loads a model with its weights in `dtype`; without a path they are random. Its activations are fused.

    A student's adapter is attached, and it alone is trained. Other adapters are merged.

    in_parts: the weights will be sharded over processes. They stay mapped from the disk in their files' type where
        possible, so that memory never holds more than a process's part.

    Raises ConfigError for weights that are missing, damaged or of another shape, for an adapter without a path, and for
    a sliding window where attention has none.
    """
    if spec.path is None and spec.has_adapter:
        raise ConfigError(f"{key}: an adapter needs the same weights every time, config gives random ones: use path")
    for name in ATTENTION_DROPOUT:
        if key == "student" and getattr(config, name, 0) and not attention.supports_dropout(device):
            logging.getLogger("abkd_fast").warning(
                f"{key}: {name} is {getattr(config, name)}, but PyTorch's attention has no dropout on a GPU; it is set "
                "to 0 (install flash-attn to keep it)"
            )
            setattr(config, name, 0.0)
    if getattr(config, "sliding_window", None) is not None and not attention.supports_windows(device):
        raise ConfigError(
            f"{key}: a {config.model_type} model whose attention has a sliding window needs torch 2.11 or flash-attn "
            f"on a GPU; this is torch {torch.__version__}, without flash-attn"
        )
    if spec.path is None:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        if spec.has_adapter:
            from . import lora

        merges = key != "student" and spec.adapter is not None
        read_dtype = torch.promote_types(dtype, torch.float32) if merges else dtype
        if in_parts and not spec.has_adapter:
            read_dtype = _type_in_files(spec.path, dtype)
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                spec.path, config=config, dtype=read_dtype, output_loading_info=True
            )
        except Exception as error:  # of many kinds: missing, truncated or foreign files
            raise ConfigError(f"{key}.path: {spec.path}: its weights can't be read ({first_line(error)})") from None
        if missing := sorted(found["missing_keys"]):  # transformers would use random weights for these
            names = f"{missing[0]} and {len(missing) - 1} others" if missing[1:] else missing[0]
            raise ConfigError(f"{key}.path: {spec.path}: its weights don't fit its config.json: no {names}")
        if merges:
            model = lora.merge_adapter(model, spec, key, dtype)
        if not in_parts:
            # Copied out of the mapped file: each file has its own alignment, which may change a product's last bit.
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        if key == "student" and spec.has_adapter:
            model = lora.attach_adapter(model, spec, key)
    fuse_activations(model)
    return PackedCausalLM(model if in_parts else model.to(device), key)


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
