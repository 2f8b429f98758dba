"""Mixtures of experts: the auxiliary loss of a student's routers, and how many tokens each of its experts gets."""

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigError

WEIGHT_NAMES = ("router_aux_loss_coef", "aux_loss_coef")  # the factor of the auxiliary loss, in transformers' models

_is_token: Tensor | None = None  # [tokens]: 0 for padding, else 1. None: nothing is counted


def is_mixture(model: nn.Module) -> bool:
    return any(re.search("Experts|MoE$", type(module).__name__) for module in model.modules())


def own_loss_weight(model: PreTrainedModel) -> float | None:
    """The factor that a model's configuration gives the auxiliary loss; None where transformers computes none."""
    if not is_mixture(model) or "output_router_logits" not in inspect.signature(model.forward).parameters:
        return None
    return next((getattr(model, name) or 0.0 for name in WEIGHT_NAMES if hasattr(model, name)), None)


def loss_weight(model: PreTrainedModel, wanted: float | None, key: str) -> float:
    """The factor of the auxiliary loss in training; 0: there is none.

    wanted: the recipe's factor; None: the configuration's, if that asks for the loss (output_router_logits).

    Raises ConfigError for a factor above 0 where transformers computes no such loss.
    """
    own = own_loss_weight(model)
    if wanted and own is None:
        problem = f"transformers computes no auxiliary loss of routers for a {model.config.model_type} model"
        raise ConfigError(f"{key}.router_aux_loss is {wanted}, but {problem}; leave it out")
    if wanted is None:
        return own or 0.0 if getattr(model.config, "output_router_logits", False) else 0.0
    return wanted


class Experts:
    """The experts of a student in its training passes: the tokens that each one gets, and the loss of their routers."""

    def __init__(self, model: PreTrainedModel, loss_weight: float) -> None:
        """Makes the model count its tokens. loss_weight: 0 means that no auxiliary loss is computed."""
        self.loss_weight, self._loss = loss_weight, None
        modules = [module for module in model.modules() if _is_given_choices(module)]
        self.sizes = [module.num_experts for module in modules]  # experts of each layer
        self.tokens = torch.zeros(sum(self.sizes), dtype=torch.int64, device=model.device)
        for module, tokens in zip(modules, self.tokens.split(self.sizes), strict=True):
            # Compiled layers share one code. So the hook is the same for all, and a buffer has what differs.
            module.register_buffer("abkd_tokens", tokens, persistent=False)
            module.register_forward_pre_hook(_count)

    def run(self, model: Callable[..., Any], is_token: Tensor | None, inputs: dict[str, Any]) -> None:
        """The model's own forward pass. Notes tokens and loss. is_token: [B, L], 0 at padding; None: there is none."""
        global _is_token
        if self.loss_weight:
            mask = {} if is_token is None else {"attention_mask": is_token}
            inputs = {"output_router_logits": True, **inputs, **mask}
        real = torch.ones_like(inputs["input_ids"]) if is_token is None else is_token
        _is_token = real.flatten()
        try:
            output = model(use_cache=False, **inputs)
        finally:
            _is_token = None
        if self.loss_weight:
            loss = output.aux_loss * real.sum()
            self._loss = loss if self._loss is None else self._loss + loss

    def take_loss(self) -> Tensor | None:
        """The auxiliary losses since the last call, times their tokens, before the factor; None where there is none."""
        loss, self._loss = self._loss, None
        return loss

    def load(self, tokens: Tensor) -> dict[str, float]:
        """The load of the experts as numbers for the log.

        tokens: [experts of all layers] that each expert got, as `tokens` has them. Waits for the device.
        """
        layers = [layer.double() for layer in tokens.split(self.sizes) if layer.any()]
        if not layers:
            return {}
        most = sum(layer.max() / layer.mean() for layer in layers) / len(layers)
        idle = sum((layer == 0).double().mean() for layer in layers) / len(layers)
        return {"router_load_max": most.item(), "router_idle_experts": idle.item()}


def _is_given_choices(module: nn.Module) -> bool:
    """Whether a module is called with hidden states, chosen experts and their weights, as most families do."""
    named = "Experts" in type(module).__name__ and isinstance(getattr(module, "num_experts", None), int)
    return named and len(inspect.signature(module.forward).parameters) == 3


def _count(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    """Adds the tokens of a call to the experts that they go to. No layer that is computed again counts twice."""
    if _is_token is None:
        return
    chosen = arguments[1].reshape(-1)
    # Some routers have further choices, which are no experts.
    counted = _is_token.repeat_interleave(chosen.numel() // _is_token.numel()) * (chosen < module.num_experts)
    module.abkd_tokens.scatter_add_(0, chosen.clamp(max=module.num_experts - 1), counted)


def describe(model: PreTrainedModel, weight: float, wanted: float | None) -> Iterator[str]:
    """Lines about the routers of a student. weight: the factor of the auxiliary loss in this run."""
    own = own_loss_weight(model)
    if weight:
        yield f"auxiliary loss times {weight:g}, over all tokens of a step; loss is without it, loss_router it alone"
    elif own is None:
        yield f"no auxiliary loss: transformers has none for a {model.config.model_type} model"
    elif wanted is None:
        way = f"student.router_aux_loss={own or 0.001:g} adds it with this factor"
        yield f"no auxiliary loss: the student's configuration doesn't ask for it (output_router_logits); {way}"
    else:
        yield f"no auxiliary loss: student.router_aux_loss is {wanted:g}"
    noise = {name: value for module in model.modules() for name, value in vars(module).items() if "jitter" in name}
    if named := ", ".join(f"{name} is {value:g}" for name, value in noise.items() if value):
        yield f"random in training, by the seed: {named} in the student's configuration"
