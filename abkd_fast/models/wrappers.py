"""Multimodal models: the causal language model within one is trained alone, and the whole is kept for saving."""

import functools
import json
import pathlib
from collections.abc import Iterator

import safetensors
import torch
import transformers
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.utils import cached_file

from ..errors import first_line
from . import forms

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # or their indices; the order is transformers'


def language_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the language model within a multimodal model; any other is returned itself.

    Raises ValueError where transformers can't build that language model alone.
    """
    text = config.get_text_config(decoder=True)
    if type(text) is type(config):  # encoder-decoders give a copy
        return config
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"a {config.model_type} model can't be trained: transformers has no causal language model for its text "
            f"part ({text.model_type}) alone"
        )
    return text


def model_class(config: PretrainedConfig) -> type:
    """What loads a model with its weights: AutoModelForCausalLM, or the class of a multimodal model.

    Raises ValueError where transformers has none.
    """
    if language_config(config) is config:
        return AutoModelForCausalLM
    mappings = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    for kind in (*named, *(mapping.get(type(config), None) for mapping in mappings)):
        if isinstance(kind, type) and getattr(kind, "config_class", None) is type(config):
            return kind
    raise ValueError(f"a {config.model_type} model can't be trained: transformers has no model that writes text for it")


def from_config(config: PretrainedConfig, **options: torch.dtype) -> PreTrainedModel:
    """A whole model with random weights. Raises ValueError where transformers has none."""
    kind = model_class(config)
    if kind is AutoModelForCausalLM:
        return kind.from_config(config, trust_remote_code=False, **options)
    return kind._from_config(config, **options)


def language_model(whole: PreTrainedModel) -> PreTrainedModel:
    """The causal language model made of a multimodal model's own modules; any other model is returned itself.

    Raises ValueError where the whole has other modules than that language model.
    """
    config = language_config(whole.config)
    if config is whole.config:
        return whole
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = _first(whole, kind)
    if model is None:
        with torch.device("meta"):
            model = kind(config)
        body, head = _first(whole, type(model.base_model)), whole.get_output_embeddings()
        if body is not None and head is not None:
            setattr(model, model.base_model_prefix, body)
            model.set_output_embeddings(head)
    known = {id(parameter) for parameter in whole.parameters()}
    if foreign := [name for name, parameter in model.named_parameters() if id(parameter) not in known]:
        raise ValueError(
            f"a {whole.config.model_type} model can't be trained: it has no {foreign[0]} of {kind.__name__}"
        )
    model.generation_config = whole.generation_config
    return model


def language_place(whole: PreTrainedModel) -> str | None:
    """The name of the language model's body among a multimodal model's modules; None for any other model."""
    language = language_model(whole)
    if language is whole:
        return None
    return next(name for name, module in whole.named_modules() if module is language.base_model)


def check(config: PretrainedConfig) -> None:
    """Compares a multimodal model's logits for text with those of its language model, on small random ones.

    Raises ValueError where they differ, or can't be compared.
    """
    text = language_config(config)
    if text is not config:
        if getattr(text, "use_bidirectional_attention", None) is True:
            raise ValueError(f"a {config.model_type} model can't be trained: its attention is bidirectional")
        described = json.dumps(config.to_dict(), default=str, sort_keys=True)
        if problem := _problem(type(config), described):
            raise ValueError(f"a {config.model_type} model can't be trained: {problem}")


@functools.cache
def _problem(kind: type[PretrainedConfig], described: str) -> str | None:
    """How the whole's logits differ, in words; None where they don't. Random numbers of others stay as they are."""
    without_autocast = torch.autocast("cpu", enabled=False)
    with torch.random.fork_rng(devices=[]), without_autocast, torch.no_grad(), forms.quiet_transformers():
        config = kind.from_dict(json.loads(described))
        text = language_config(config)
        torch.manual_seed(0)
        small = forms.small_model(text)
        small.config.pad_token_id = 0  # the whole may put it in the place of images
        for name in config.sub_configs:
            if getattr(config, name) is text:
                setattr(config, name, small.config)
        with torch.device("meta"):
            whole = from_config(config, dtype=torch.float32).eval()
        if _first(whole, type(small)):
            return None  # it calls the language model itself
        whole.to_empty(device="cpu")  # memory that is never touched
        places = {module: name for name, module in whole.named_modules()}
        whole.set_submodule(places[_first(whole, type(small.base_model))], small.base_model)
        whole.set_submodule(places[whole.get_output_embeddings()], small.get_output_embeddings())
        row = torch.arange(forms.LENGTHS[0])[None] % small.config.vocab_size
        try:
            theirs, ours = (model(input_ids=row, use_cache=False).logits for model in (whole, small))
        except Exception as error:  # models have code of their own
            return f"it doesn't take text alone: {first_line(error)}"
    difference = ((theirs - ours).abs().max() / ours.abs().max()).item()
    same = difference < forms.TOLERANCE
    return None if same else f"its logits differ from those of its language model by {difference:.1e} relative"


def _first(whole: nn.Module, kind: type) -> nn.Module | None:
    return next((module for module in whole.modules() if type(module) is kind), None)


class Wrapper:
    """A multimodal model around the language model that is trained: saves it as what it was."""

    def __init__(self, model: nn.Module, language: PreTrainedModel, path: str | None) -> None:
        """Parts outside of the language model keep no weights in memory if these are on the disk.

        Args:
            model: the whole, or peft's wrapper around it.
            language: its `language_model`.
            path: where its weights come from; None: they are random.
        """
        self.model = model
        places = {id(module): name for name, module in model.named_modules()}
        self.names = {}  # of the language model's tensors in the whole
        tensors = {**dict(language.named_parameters(remove_duplicate=False)), **dict(language.named_buffers())}
        for name in language.state_dict():
            if name not in tensors:
                continue  # quantized layers add names that are no module's
            module, _, own = name.rpartition(".")
            self.names[name] = f"{places[id(language.get_submodule(module))]}.{own}"
        self.files: dict[str, bytes] = {}  # of processors
        self.others: dict[str, Tensor] = {}  # all other tensors, by their names on the disk
        if not isinstance(model, PreTrainedModel):
            return  # an adapter is saved alone
        if path is None:
            known = {*self.names.values()}
            others = {name: tensor for name, tensor in model.state_dict().items() if name not in known}
            self.others = revert_weight_conversion(model, others)
        else:
            self.files = {name: file.read_bytes() for name in PROCESSOR_FILES if (file := _find(path, name))}
            self.others = self._read_others(path)
            _release(model, language)

    def _read_others(self, path: str) -> dict[str, Tensor]:
        """The tensors in a model's files that are not the language model's. They stay mapped from the disk."""
        conversions, shapes = self.model._weight_conversions, self.model.state_dict()
        renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
        converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
        prefix, known, others = self.model.base_model_prefix, {*self.names.values()}, {}
        for name, tensor in _tensors(path):
            place, _ = rename_source_key(name, renamings, converters, prefix, shapes)
            if place not in shapes and name in shapes:
                place = name
            if place not in known:
                others[name] = tensor
        return others

    def save(self, folder: pathlib.Path, weights: dict[str, Tensor]) -> None:
        """Writes the whole in Hugging Face layout. weights: the language model's, by their names in the whole."""
        config, dtype = self.model.config, next(iter(weights.values())).dtype
        config.architectures = [type(self.model).__name__.removeprefix("FSDP")]
        for part in (getattr(config, name) for name in config.sub_configs):
            if part is not None:
                part.dtype = next((tensor.dtype for tensor in self.others.values()), dtype)
        config.dtype = language_config(config).dtype = dtype
        config.save_pretrained(folder)
        self.model.generation_config.save_pretrained(folder)
        saved = revert_weight_conversion(self.model, weights)
        # A part of a larger tensor, such as one expert of all, would count as shared with it.
        tensors = {
            name: tensor.clone() if _is_part(tensor) else tensor for name, tensor in (saved | self.others).items()
        }
        save_torch_state_dict(tensors, folder, filename_pattern="model{suffix}.safetensors")
        for name, content in self.files.items():
            (folder / name).write_bytes(content)


def _is_part(tensor: Tensor) -> bool:
    return not tensor.is_contiguous() or tensor.untyped_storage().nbytes() > tensor.nbytes


def _release(whole: PreTrainedModel, language: PreTrainedModel) -> None:
    """Frees the memory of all weights outside of the language model."""
    kept = {id(module) for module in language.modules()}
    for module in whole.modules():
        if id(module) not in kept:
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def _tensors(path: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a model's files, mapped from the disk, in the files' types."""
    for file in _weight_files(path):
        if file.suffix == ".safetensors":
            with safetensors.safe_open(file, "pt") as tensors:
                yield from ((name, tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118 - it is no dict
        else:
            yield from torch.load(file, map_location="cpu", mmap=True, weights_only=True).items()


def first_dtype(path: str) -> torch.dtype | None:
    """The type of the first weights in a model's files that have fractions."""
    return next((tensor.dtype for _, tensor in _tensors(path) if tensor.is_floating_point()), None)


def _weight_files(path: str) -> list[pathlib.Path]:
    for name in WEIGHT_FILES:
        if file := _find(path, name):
            return [file]
        if index := _find(path, f"{name}.index.json"):
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [index.with_name(name) for name in sorted({*names})]
    raise ValueError(f"no {' or '.join(WEIGHT_FILES)}")


def _find(path: str, name: str) -> pathlib.Path | None:
    """A file of a model's folder, or of a model from the Hub, which is downloaded; None where there is none."""
    missing = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    file = cached_file(path, name, **missing)
    return file and pathlib.Path(file)
