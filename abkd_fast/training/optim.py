"""The optimizer and its learning-rate schedule."""

import json
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from transformers import get_scheduler

from .. import distributed
from ..config.schema import Config
from ..config.training import OPTIMIZER_KEYS, OptimConfig
from ..device import choose_device, choose_dtype
from ..errors import ConfigError, first_line
from ..models.causal_lm import CausalLM
from .given import Given
from .prepare import is_sharded

REPLACED = {  # keys of `optim` that a function of the caller replaces
    "optimizer": ("name", "lr", "betas", "eps", "momentum"),
    "scheduler": ("schedule", "min_lr", "warmup_steps", "warmup_ratio"),
}
CLASSES = {"adamw": AdamW, "adam": Adam, "adagrad": Adagrad, "sgd": SGD}


def check_optimizer(config: Config, given: Given) -> None:
    """Raises ConfigError where the optimizer can't be used, and for values that a given function replaces."""
    for function in (function for function in REPLACED if getattr(given, function) is not None):
        for key in REPLACED[function]:
            if (value := getattr(config.optim, key)) != getattr(OptimConfig, key):
                problem = f"optim.{key} is {json.dumps(value)}, but there is a function {function}, which replaces it"
                way_out = f'leave one out (optim={{"{key}": None}} takes back a recipe\'s)'
                raise ConfigError(f"{problem}: {way_out}", f"optim.{key}")
    if config.optim.name != "adamw8bit":
        return
    device, way_out = choose_device(config.train.device, "train."), "take optim.name=adamw"
    if is_sharded(config):
        problem = "can't update weights of which each process holds a part"
        raise ConfigError(f"optim.name: adamw8bit {problem}; {way_out}, or train.parallel=ddp", "optim.name")
    if choose_dtype(config.train.dtype, device, "train.") == torch.float64:
        raise ConfigError(f"optim.name: adamw8bit has no float64, which train.dtype is; {way_out}", "optim.name")
    try:
        weights = torch.zeros(4096, device=device, requires_grad=True)  # fewer would have moments of 32 bits
        weights.grad = torch.zeros_like(weights)
        _adamw8bit([weights]).step()
    except Exception as error:  # of many kinds: it is missing, too old, or has no kernels for the device
        problem = f"adamw8bit needs bitsandbytes, which can't be used here ({first_line(error)})"
        raise ConfigError(f"optim.name: {problem}: pip install bitsandbytes, or {way_out}", "optim.name") from None


def build_optimizer(
    student: CausalLM, optim: OptimConfig, make: Callable[[list[dict]], Optimizer] | None = None
) -> Optimizer:
    """The optimizer, or what `make` gives, over what is trained.

    Biases and norms don't decay; an adapter's weights all do.
    """
    trained = [p for p in student.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() > 1 or student.has_adapter]
    others = [p for p in trained if p.dim() <= 1 and not student.has_adapter]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    options = {"lr": optim.lr} | {key: getattr(optim, key) for key in OPTIMIZER_KEYS[optim.name]}
    if make is not None:
        made = make(groups)
        if not isinstance(made, Optimizer) or isinstance(made, LBFGS):  # which needs several passes a step
            raise ConfigError(
                f"optimizer gave a {type(made).__name__}, expected one of torch.optim with a plain step()"
            )
        _check_weights(made, {*trained})
        _check_state_once(made)
    elif optim.name == "adamw8bit":
        made = _adamw8bit(groups, **options)
    else:  # of the fused kernels, only those of the Adams know weights that are sharded
        fused = optim.name in ("adamw", "adam") or not distributed.is_sharded(student)
        made = CLASSES[optim.name](groups, **options, fused=fused)
    if isinstance(made, SGD):
        _fill_momentum(made)
    return made


def _check_weights(optimizer: Optimizer, trained: set[Tensor]) -> None:
    """Raises ConfigError for an optimizer over other weights than those that it was given, which may be a part."""
    weights = {p for group in optimizer.param_groups for p in group["params"]}
    way_out = "give it the groups that the function gets, or some of them"
    if others := sum(p.numel() for p in weights - trained):
        raise ConfigError(f"optimizer has {others} weights that are none of the student's trained ones: {way_out}")
    if not weights:
        raise ConfigError(f"optimizer has no weights: {way_out}")


def untrained(student: CausalLM, optimizer: Optimizer) -> int:
    """How many weights require a gradient, but are not the optimizer's."""
    own = {p for group in optimizer.param_groups for p in group["params"]}
    return sum(p.numel() for p in student.parameters() if p.requires_grad and p not in own)


def _adamw8bit(groups: list, **options: object) -> Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, **options)


def _fill_momentum(optimizer: SGD) -> None:
    """Gives fused SGD its buffers. Otherwise it makes them in its first step, and leaves them as they are if that step
    is skipped: with any numbers."""
    for group in optimizer.param_groups:
        if group["fused"] and group["momentum"] and not group["dampening"]:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _check_state_once(optimizer: Optimizer) -> None:
    """Lets the first step raise ConfigError where a checkpoint could not keep the optimizer's state."""

    def check(*_: object) -> None:
        handle.remove()
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                is_part = isinstance(parameter, DTensor) and not isinstance(value, DTensor)
                if isinstance(value, Tensor) and is_part and value.dim():
                    raise ConfigError(f'optimizer: "{key}" of its state is not sharded, as the weights are')
                if not isinstance(value, Tensor | int | float | str | None):
                    problem = f'"{key}" of its state is a {type(value).__name__}, which a checkpoint can\'t keep'
                    raise ConfigError(f"optimizer: {problem}; expected tensors, numbers and text")

    handle = optimizer.register_step_post_hook(check)


def state_bytes(optim: OptimConfig, weight_bytes: int) -> float:
    """Bytes of the optimizer's state for each trained weight. weight_bytes: those of the weight itself."""
    if optim.name == "adamw8bit":
        return 2 * (1 + 4 / 256)  # a block of 256 numbers shares a scale of 4 bytes
    return weight_bytes * {"adamw": 2, "adam": 2, "adagrad": 1, "sgd": int(optim.momentum > 0)}[optim.name]


def reserved_bytes(student: CausalLM, optim: OptimConfig) -> int:
    """Bytes on this rank of the gradients and of the optimizer's state, both in float32."""
    numel = sum(distributed.local_part(p).numel() for p in student.parameters() if p.requires_grad)
    return round((4 + state_bytes(optim, 4)) * numel)


def build_scheduler(
    optim: OptimConfig,
    optimizer: Optimizer,
    steps: int,
    make: Callable[[Optimizer, int], LRScheduler] | None = None,
) -> LRScheduler:
    """Warm-up, then a cosine or a line down to min_lr, or a constant rate; or what `make` gives."""
    if make is not None:
        made = make(optimizer, steps)
        if not isinstance(made, LRScheduler) or isinstance(made, ReduceLROnPlateau):  # whose step() takes a loss
            kind = type(made).__name__
            raise ConfigError(f"scheduler gave a {kind}, expected one of torch.optim.lr_scheduler with a plain step()")
        if made.optimizer is not optimizer:
            raise ConfigError("scheduler has another optimizer than the one that the function gets: give it that one")
        return made
    warmup = optim.warmup_steps if optim.warmup_ratio is None else round(optim.warmup_ratio * steps)
    peak = min(group["lr"] for group in optimizer.param_groups)  # of an optimizer of one's own, not optim.lr
    lowest = min(optim.min_lr, peak)
    never_falls = lowest == peak or warmup >= steps
    name, options = {
        "cosine": ("cosine_with_min_lr", {"min_lr": lowest}),
        "linear": ("polynomial", {"lr_end": lowest, "power": 1.0}),
        "constant": ("constant_with_warmup", None),
    }["constant" if never_falls and optim.schedule == "linear" else optim.schedule]
    return get_scheduler(name, optimizer, warmup, steps, scheduler_specific_kwargs=options)
