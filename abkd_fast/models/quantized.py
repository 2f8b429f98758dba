"""Quantized models: checkpoints as transformers reads them, and others that bitsandbytes quantizes on loading."""

import copy
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import logging
import pathlib

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..config.models import ModelConfig
from ..errors import ConfigError, reading

# bitsandbytes says at every product of 8-bit weights that it casts to float16. On CPUs with AVX512-BF16 it asks, as
# soon as peft imports it, for a package whose kernel loses gradients.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

TOLERANCE = 0.25  # of the largest logit. The rounding of 8-bit products depends on the rest of the batch, by 8e-2
SETTINGS = "quantization_config.json"  # beside an adapter: how its base was quantized
# The packages that compute with weights of a method.
PACKAGES = {
    "bitsandbytes": "bitsandbytes",
    "awq": "gptqmodel",
    "gptq": "gptqmodel",
    "compressed-tensors": "compressed-tensors",
    "torchao": "torchao",
    "fp8": "kernels",
    "mxfp4": "kernels",
}
OPTIONAL = ("kernels",)  # without it transformers dequantizes the weights


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How the weights of a model are quantized."""

    settings: QuantizationConfigMixin
    is_stored: bool  # in the checkpoint; else the weights are quantized while they load

    @property
    def method(self) -> str:
        return _method(self.settings.to_dict())

    @property
    def name(self) -> str:
        """The method, and what decides its bits, for people: "bitsandbytes 4-bit (nf4)"."""
        values = self.settings.to_dict()
        if self.method == "bitsandbytes":
            bits = f"4-bit ({values['bnb_4bit_quant_type']})" if values["load_in_4bit"] else "8-bit"
            return f"bitsandbytes {bits}"
        return f"{self.method} {values['bits']}-bit" if values.get("bits") else self.method

    @property
    def note(self) -> str:
        """What a run says about it in its first lines."""
        if getattr(self.settings, "dequantize", False):
            return f"{self.name}, dequantized while it loads: transformers can't compute with it here"
        check = f"the check at the start allows {TOLERANCE} of the largest logit"
        return f"{self.name}; rounding may depend on the batch, so {check}"

    def quantizer(self) -> HfQuantizer:
        """What transformers loads the weights with. It may change its settings, so every caller gets its own."""
        return AutoHfQuantizer.from_config(copy.deepcopy(self.settings), pre_quantized=self.is_stored)

    def identity(self) -> str:
        """What decides the bits of the weights in use: the settings, and the version of the package that reads them."""
        package = PACKAGES.get(self.method)
        version = f" {package} {importlib.metadata.version(package)}" if package and _has(package) else ""
        return json.dumps(self.settings.to_dict(), sort_keys=True, default=str) + version

    def bytes(self, model: PreTrainedModel, dtype: torch.dtype) -> int:
        """About how many bytes all weights take, with those that are not quantized in `dtype`.

        model: on the meta device, in `dtype`. It gets quantized layers.
        """
        quantizer = self.quantizer()
        _replace_layers(model, dtype, quantizer)
        sizes = (p.numel() * quantizer.param_element_size(model, name, p) for name, p in model.named_parameters())
        return int(sum(sizes)) + sum(buffer.nbytes for buffer in model.buffers())


def read(
    spec: ModelConfig, config: PretrainedConfig, key: str, dtype: torch.dtype = torch.float32
) -> Quantization | None:
    """How a model's weights are or will be quantized; None if they are not. dtype: to compute in.

    Raises ConfigError for a checkpoint that is quantized already and should be again, and where a package is missing.
    """
    stored = _stored(config)
    if stored is None and spec.quantize is None:
        return None
    where = f"{key}.quantize" if stored is None else f"{key}.path: {spec.path}"
    if stored is not None and spec.quantize is not None:
        problem = f"{spec.path} is quantized already, by {_method(stored)}"
        raise ConfigError(f"{key}.quantize: {problem}; leave {key}.quantize out", f"{key}.quantize")
    if dtype == torch.float64:
        raise ConfigError(f"{where}: quantized weights compute in float32 or bfloat16, but the run in float64")
    method = "bitsandbytes" if stored is None else _method(stored)
    package = PACKAGES.get(method)
    if package and package not in OPTIONAL and not _has(package):
        raise ConfigError(f"{where}: {method} weights need the package {package}: pip install {package}")
    with reading(f"{where}: {method} weights can't be used here"):  # the method may be missing, or the GPU too old
        settings = _settings(spec.quantize, dtype) if stored is None else AutoQuantizationConfig.from_dict(dict(stored))
        quantizer = Quantization(settings, stored is not None).quantizer()
        quantizer.validate_environment(device_map=_device_map())
    return Quantization(quantizer.quantization_config, stored is not None)


def _settings(wish: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if wish == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(load_in_4bit=True, **kind)


def _stored(config: PretrainedConfig) -> dict | None:
    for part in (config, config.get_text_config(decoder=True)):
        if (values := getattr(part, "quantization_config", None)) is not None:
            return values if isinstance(values, dict) else values.to_dict()
    return None


def _method(values: dict) -> str:
    """The name of a method. Old checkpoints of bitsandbytes have none."""
    is_bitsandbytes = values.get("load_in_4bit") or values.get("load_in_8bit")
    method = "bitsandbytes" if is_bitsandbytes else values.get("quant_method", "unknown")
    return str(getattr(method, "value", method))


@functools.cache
def _has(package: str) -> bool:
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def _device_map() -> dict[str, str]:
    return {"": "cuda" if torch.cuda.is_available() else "cpu"}


def _replace_layers(model: PreTrainedModel, dtype: torch.dtype, quantizer: HfQuantizer) -> None:
    """Gives a model on the meta device the layers that it has before its weights load in `dtype`."""
    with torch.device("meta"):
        quantizer.preprocess_model(model, dtype=dtype, device_map=_device_map(), use_kernels=False)


def check(quantization: Quantization, model: PreTrainedModel, key: str) -> Quantization:
    """Gives a model on the meta device its quantized layers. Returns what transformers then does with the weights.

    Raises ConfigError where they can't be built, and for a quantized output projection: the losses read it as a matrix.
    """
    quantizer = quantization.quantizer()
    with reading(f"{key}: its {quantization.name} layers can't be built"):
        _replace_layers(model, torch.float32, quantizer)
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    if type(head) is not nn.Linear or quantizer.param_needs_quantization(model, f"{name}.weight"):
        raise ConfigError(
            f"{key}: its output projection is quantized ({quantization.name}), which the losses read as a matrix; "
            "use a checkpoint that leaves it as it is"
        )
    return Quantization(quantizer.quantization_config, quantization.is_stored)


def without_cpu_packing(model: nn.Module) -> None:
    """Keeps bitsandbytes from packing 4-bit weights anew in eval mode, on a CPU with bfloat16.

    Packed weights compute in bfloat16 whatever the type of the run, and give no gradient, without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_student(quantization: Quantization | None, spec: ModelConfig) -> None:
    """Raises ConfigError for a student whose weights are quantized, and that has no adapter or can't train one."""
    if quantization is None:
        return
    if not spec.has_adapter:
        problem = f"its weights are quantized ({quantization.name}), and only an adapter can be trained on these"
        raise ConfigError(f"student: {problem}; give student.lora, or weights that are not quantized")
    if not quantization.quantizer().is_trainable:
        problem = f"no adapter can be trained on {quantization.name} weights"
        raise ConfigError(f"student.path: {spec.path}: {problem}; give others, and student.quantize for 4 or 8 bits")


def check_gradients(model: nn.Module, name: str) -> None:
    """Raises ConfigError for a student whose quantized projections lose the gradient of what they read.

    Kernels that are made for inference do, and say nothing. A projection is linear, so for the gradient g of its
    products with random numbers v, its product with g gives |g|^2 with the same v.
    """
    for module in model.modules():
        is_projection = hasattr(module, "in_features") and not hasattr(module, "base_layer")
        if not is_projection or any(p.requires_grad for p in module.parameters()):
            continue
        device = next(iter([*module.parameters(), *module.buffers()])).device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
        zeros = torch.zeros(8, module.in_features, device=device, dtype=dtype, requires_grad=True)
        products = module(zeros)
        v = torch.randn(products.shape, generator=torch.Generator().manual_seed(0)).to(products)
        has_gradient = products.requires_grad
        gradient = torch.autograd.grad((products * v).sum(), zeros, allow_unused=True)[0] if has_gradient else None
        expected = gradient is not None and gradient.float().square().sum()
        with torch.no_grad():
            found = gradient is not None and ((module(gradient) - products) * v).float().sum()
        if gradient is None or not (found - expected).abs() < TOLERANCE * expected:
            raise ConfigError(
                f"student: gradients don't pass through its {type(module).__name__} layers ({name}), so an adapter "
                "can't be trained; use other weights, and student.quantize for 4 or 8 bits"
            )


def save_settings(model: PreTrainedModel, folder: pathlib.Path) -> None:
    """Notes beside an adapter that its base was quantized while it loaded. A checkpoint says so itself."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.pre_quantized:
        quantizer.quantization_config.to_json_file(folder / SETTINGS)


def saved_wish(folder: pathlib.Path) -> str | None:
    """The value of `quantize` that an adapter's base had when it was trained. Raises ConfigError for a broken file."""
    if not (folder / SETTINGS).exists():
        return None
    with reading(f"{folder / SETTINGS} can't be read"):
        values = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        return "4bit" if values["load_in_4bit"] else "8bit"
