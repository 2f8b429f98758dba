"""Whether the numbers of a run are finite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from .. import distributed

if TYPE_CHECKING:
    from .trainer import Trainer


def is_finite(loss: Tensor, norm: Tensor) -> Tensor:
    return torch.isfinite(loss) & torch.isfinite(norm)


def check(trainer: Trainer) -> None:
    """Reads what the device has noted of the steps, and the weights, and so waits for it. Collective.

    Raises FloatingPointError for a step that was not finite (unless train.on_nonfinite is skip), and for weights that
    are not: finite gradients may overflow in the optimizer.
    """
    window, step = trainer.window, trainer.state.step
    if window.first_nonfinite[0].item() and trainer.config.train.on_nonfinite == "stop":
        account = window.describe_nonfinite(step, trainer.data.where)
        way_out = "resume with train.on_nonfinite=skip, or begin again with a lower optim.lr"
    elif not _largest_weight(trainer.student).isfinite():
        account = f"after step {step} weights are not finite: the optimizer's step has overflowed"
        way_out = "begin again with a lower optim.lr"
    else:
        return
    trainer.saves.conclude()
    saved = trainer.saves.saved
    kept = f"last good checkpoint: {saved}" if saved else "there is no checkpoint yet"
    raise FloatingPointError(f"{account}; {kept}; {way_out}")


def _largest_weight(model: torch.nn.Module) -> Tensor:
    """The largest absolute value of what is trained. Collective."""
    trained = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    return distributed.full_tensor(get_total_norm(trained, math.inf))
