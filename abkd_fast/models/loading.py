"""Hugging Face causal language models: load, check, split into body and output projection, save."""

from __future__ import annotations

import contextlib
import json
import logging
import pathlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import NewGELUActivation
from transformers.utils import logging as transformers_logging

from ..config.schema import ConfigError, ModelConfig, first_line, looks_local
from ..data import quickstart
from ..data.rows import Batch, pack
from ..losses.row_ops import shared_vocabulary
from . import attention, lora

transformers_logging.disable_progress_bar()  # one bar on the terminal: the run's own
# Newer versions of transformers rename what older ones, peft and this module know by these names.
warnings.filterwarnings("ignore", r".*gradient_checkpointing.* is deprecated", FutureWarning)

ATTENTION_DROPOUT = ("attn_pdrop", "attention_dropout")
DROPOUT = (*ATTENTION_DROPOUT, "resid_pdrop", "embd_pdrop", "dropout", "hidden_dropout", "activation_dropout")


def check_path(path: str, key: str) -> None:
    """Raises ConfigError for a local folder that holds no model."""
    folder = pathlib.Path(path)
    if folder.exists():
        if (folder / lora.SETTINGS).exists():
            role = key.partition(".")[0]
            raise ConfigError(f"{key}: {path} holds a LoRA adapter: give it as {role}.adapter, and its base as {key}")
        if not (folder / "config.json").exists():
            raise ConfigError(f"{key}: {path} has no config.json; expected a model folder in Hugging Face layout")
        _check_weights(folder, key)
    elif looks_local(path):
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


def spec_of(path: str) -> ModelConfig:
    """A model to read from: a folder or Hub name, or the folder of a LoRA adapter, merged into its own base."""
    settings = pathlib.Path(path, lora.SETTINGS)
    if not settings.exists():
        return ModelConfig(path=path)
    try:
        base = json.loads(settings.read_text(encoding="utf-8"))["base_model_name_or_path"]
        return ModelConfig(path=base, adapter=path)
    except (OSError, ValueError, LookupError, TypeError):
        raise ConfigError(f"model: {settings} names no base model: the adapter can't be used alone") from None


def read_config(spec: ModelConfig, key: str) -> PretrainedConfig:
    """A model's configuration, without its weights.

    Raises ConfigError where there is none, and where the model's adapter doesn't fit it.
    """
    try:
        if spec.path is not None:
            check_path(spec.path, f"{key}.path")
            config = AutoConfig.from_pretrained(spec.path)
        else:
            config = AutoConfig.for_model(**spec.config)
        model = outline(config)  # whether its numbers fit together
    except ConfigError:
        raise
    except Exception as error:  # transformers checks with many kinds of errors
        what = (
            f"{key}.path: {spec.path}: no such folder, and no such model on the Hub" if spec.path else f"{key}.config"
        )
        raise ConfigError(f"{what} ({first_line(error)})") from None
    if spec.dropout is not None:
        for name in DROPOUT:
            if hasattr(config, name):
                setattr(config, name, spec.dropout)
    if spec.has_adapter:
        lora.check(model, spec, key)
    return config


def outline(config: PretrainedConfig) -> PreTrainedModel:
    """The model without memory for its weights: shapes alone."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def adapter_size(spec: ModelConfig, config: PretrainedConfig, key: str) -> int | None:
    """How many weights a model's adapter has; None where it has no adapter."""
    if not spec.has_adapter:
        return None
    return sum(tensor.numel() for tensor in lora.outline(outline(config), spec, key).values())


def describe(model: nn.Module) -> str:
    """Size and kind, and what is trained where that is an adapter: "3431.8M (llama), LoRA rank 16: 5.3M trained"."""

    def millions(parameters: Iterator[Tensor]) -> str:
        return f"{sum(p.numel() for p in parameters) / 1e6:.1f}M"

    text = f"{millions(model.parameters())} ({model.config.model_type})"
    if isinstance(model, PreTrainedModel):
        return text
    trained = millions(p for p in model.parameters() if p.requires_grad)
    return f"{text}, LoRA rank {model.peft_config['default'].r}: {trained} trained"


def read_tokenizer(path: str, key: str) -> PreTrainedTokenizerBase:
    """A tokenizer; "quickstart" is the one made for the generated tasks. Raises ConfigError where there is none."""
    if path == "quickstart":
        return quickstart.tokenizer()
    folder = pathlib.Path(path)
    if folder.is_dir() and not any([*folder.glob(f"{kind}*")] for kind in ("tokenizer", "vocab", "spiece")):
        raise ConfigError(f"{key}: {path} is a folder without a tokenizer; name another as tokenizer")
    try:
        if not folder.exists() and (folder.is_absolute() or path.startswith(".") or path.count("/") > 1):
            raise OSError("no such folder")
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # of many kinds: a broken file, no network, a missing package
        raise ConfigError(f"{key}: {path}: no tokenizer there ({first_line(error)})") from None
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{key}: {path}: has no end token (eos_token), which every response needs")
    return tokenizer


def check_vocabularies(
    tokenizer: PreTrainedTokenizerBase,
    student: PretrainedConfig,
    teacher: PretrainedConfig | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Raises ConfigError unless student and teacher read the same tokens and have room for all of them."""
    needed = len(tokenizer)
    if teacher_tokenizer is not None:
        ours, theirs = (
            {index: token for token, index in t.get_vocab().items()} for t in (tokenizer, teacher_tokenizer)
        )
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


def load(
    spec: ModelConfig,
    config: PretrainedConfig,
    key: str,
    dtype: torch.dtype,
    device: torch.device,
    in_parts: bool = False,
) -> PackedCausalLM:
    """The model with its weights in `dtype` (random ones from `config` where spec has no path), its activations fused.

    A student's adapter is attached, and it alone is trained; others are merged. What is to be in parts stays on the
    disk, mapped, in the type of its files, where that is possible: memory gets no more than a process's part.
    """
    for name in ATTENTION_DROPOUT:
        if key == "student" and getattr(config, name, 0) and not attention.supports_dropout(device):
            logging.getLogger("abkd_fast").warning(
                f"{key}: {name} is {getattr(config, name)}, but PyTorch's attention has no dropout on a GPU; it is set "
                "to 0 (install flash-attn to keep it)"
            )
            setattr(config, name, 0.0)
    if spec.path is None:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
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
        if missing := sorted(found["missing_keys"]):  # transformers would go on with random ones
            names = f"{missing[0]} and {len(missing) - 1} others" if missing[1:] else missing[0]
            raise ConfigError(f"{key}.path: {spec.path}: its weights don't fit its config.json: no {names}")
        if merges:
            model = lora.merge(model, spec, key, dtype)
        if not in_parts:
            # Out of the mapped file: its alignment, other in every file, may change the last bit of a matrix product.
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        if key == "student" and spec.has_adapter:
            model = lora.attach(model, spec, key)
    fuse_activations(model)
    return PackedCausalLM(model if in_parts else model.to(device), key)


def _type_in_files(path: str, otherwise: torch.dtype) -> torch.dtype:
    """Of a folder's weights, where all have the same: only what keeps its type can stay mapped."""
    types = set()
    for file in pathlib.Path(path).glob("*.safetensors"):
        with safetensors.safe_open(file, "pt") as tensors:
            types |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - it is no dict
    known = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
    return known.get(types.pop(), otherwise) if len(types) == 1 else otherwise


def fuse_activations(model: nn.Module) -> None:
    """GPT-2's GELU by PyTorch's kernel, which may round differently.

    transformers writes its tanh approximation out: eight operators, most of whose results are kept for backward.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU("tanh"))


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The type that a matrix product of `x` computes in here."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class PackedCausalLM(nn.Module):
    """A causal language model on packed batches, cut between its body and its output projection.

    Calling it computes a loss within its own forward pass, so that wrappers which gather or hook parameters
    there see the output projection too.
    """

    def __init__(self, model: nn.Module, key: str) -> None:
        """Takes a transformers model, or peft's around one, and switches its attention.

        Raises ConfigError, with the reason, for models whose attention or output can't be reproduced this way.
        """
        super().__init__()
        self.model = model
        self.key = key
        with self._explained():
            self.causal_lm.set_attn_implementation(attention.NAME)

    @property
    def has_adapter(self) -> bool:
        return not isinstance(self.model, PreTrainedModel)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model. Where an adapter is attached, it is within the projections of this one."""
        return self.model.get_base_model() if self.has_adapter else self.model

    @property
    def head(self) -> nn.Linear:
        return self.causal_lm.get_output_embeddings()

    def checkpoint_layers(self) -> None:
        """From now on layers keep their inputs alone, and are computed again in backward, with the same dropout."""
        if not self.causal_lm.supports_gradient_checkpointing:
            kind = self.causal_lm.config.model_type
            raise ConfigError(f"train.gradient_checkpointing: a {kind} model has none; set it to false")
        self.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        # It also made the embeddings ask for a gradient, which only the reentrant kind needs.
        self.causal_lm.disable_input_require_grads()

    def hidden_states(self, batch: Batch) -> Tensor:
        """Final hidden states [N, H] at batch.positions."""
        states = self.causal_lm.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            cu_seq_lens_q=batch.cu_seqlens,
            cu_seq_lens_k=batch.cu_seqlens,
            max_length_q=batch.max_seqlen,
            max_length_k=batch.max_seqlen,
        ).last_hidden_state  # [1, T, H]
        return states[0, batch.positions]

    @property
    def layers(self) -> nn.ModuleList:
        count = self.causal_lm.config.num_hidden_layers
        stacks = (module for module in self.causal_lm.base_model.modules() if isinstance(module, nn.ModuleList))
        return next(stack for stack in stacks if len(stack) == count)

    def compile(self, **options: Any) -> None:
        """Compiles the layers, for any number of tokens; all of them share one piece of code.

        Args:
            options: of torch.compile.
        """
        for layer in self.layers:
            layer.compile(dynamic=True, **options)

    def forward(self, batch: Batch, loss: Callable[..., Tensor]) -> Tensor:
        hidden = self.hidden_states(batch)
        dtype = _compute_dtype(hidden)
        weight, bias = self.head.weight.to(dtype), self.head.bias
        return loss(hidden.to(dtype), weight, None if bias is None else bias.to(dtype))

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            kind = self.causal_lm.config.model_type
            raise ConfigError(f"{self.key}: a {kind} model can't be trained packed: {first_line(error)}") from None

    @torch.no_grad()
    def check(self) -> None:
        """Compares two short packed rows with the model's own padded forward pass.

        Raises ConfigError where the logits differ, or attention was not called once a layer: a model with soft-capped
        or scaled logits, recurrent state, or attention of its own is refused, never silently wrong.
        """
        config = self.causal_lm.config
        device = next(self.model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(config.vocab_size, (length,), generator=generator) for length in (9, 5)]
        samples = [{"input_ids": row.tolist(), "prompt_length": 1} for row in rows]
        (batch,) = pack(samples, max_tokens=14)
        batch = batch.to(device)
        training = self.model.training
        self.model.eval()
        with self._explained():
            before = attention.calls
            hidden = self(batch, lambda hidden, *projection: hidden)
            calls = attention.calls - before
            packed = self.head(hidden.to(self.head.weight.dtype)).float()  # [12, V]
            padded = self._padded_logits(rows, device)
        self.model.train(training)
        layers = config.num_hidden_layers
        reason = None
        if calls != layers:
            reason = (
                f"{calls} of its {layers} layers use transformers' attention interface (recurrent or custom layers)"
            )
        elif packed.shape != padded.shape:
            reason = f"its output projection gives {packed.shape[1]} logits, the model {padded.shape[1]}"
        else:
            worst = ((packed - padded).abs().max() / padded.abs().max().clamp(min=1e-3)).item()
            tolerance = 2e-3 if _compute_dtype(hidden) in (torch.float32, torch.float64) else 5e-2
            if not worst < tolerance:
                traits = ("final_logit_softcapping", "logit_scale", "logits_scaling", "attn_logit_softcapping")
                named = [f"{name} = {value}" for name in traits if (value := getattr(config, name, None)) is not None]
                reason = f"its logits differ from hidden states times output projection by {worst:.1e} relative" + (
                    f" ({', '.join(named)})" if named else ""
                )
        if reason:
            raise ConfigError(f"{self.key}: a {config.model_type} model can't be trained packed: {reason}")

    def _padded_logits(self, rows: list[Tensor], device: torch.device) -> Tensor:
        """The model's own logits at the positions that `pack` keeps, from a right-padded batch with a mask."""
        longest = max(map(len, rows))
        input_ids = torch.stack([nn.functional.pad(row, (0, longest - len(row))) for row in rows]).to(device)
        mask = torch.stack([torch.arange(longest) < len(row) for row in rows]).long().to(device)
        self.causal_lm.set_attn_implementation("sdpa")
        try:
            logits = self.model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits  # [2, longest, V]
        finally:
            self.causal_lm.set_attn_implementation(attention.NAME)
        return torch.cat([logits[i, : len(row) - 1] for i, row in enumerate(rows)]).float()

    def weights(self) -> dict[str, Tensor]:
        """All that is saved, by the model's own names: without what is tied or, beside an adapter, frozen."""
        parameters = dict(self.model.named_parameters())
        tied = {name for name, _ in self.model.named_parameters(remove_duplicate=False)} - parameters.keys()
        frozen = {name for name, parameter in parameters.items() if self.has_adapter and not parameter.requires_grad}
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in tied | frozen}

    def save(self, folder: pathlib.Path, tokenizer: PreTrainedTokenizerBase, weights: dict[str, Tensor]) -> None:
        """Writes weights, configuration and tokenizer in Hugging Face layout; of a LoRA model, those of the adapter.

        weights: what `weights` gave, or a copy.
        """
        # Left to choose whether embeddings belong to an adapter, peft asks the Hub every time.
        options = {"save_embedding_layers": False} if self.has_adapter else {}
        self.model.save_pretrained(folder, state_dict=weights, **options)
        tokenizer.save_pretrained(folder)
