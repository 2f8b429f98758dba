"""The optimizer and its learning-rate schedule."""

from collections.abc import Callable

from torch.optim import LBFGS, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from ..config.training import OptimConfig
from ..errors import ConfigError
from ..models.causal_lm import CausalLM


def build_optimizer(
    student: CausalLM, optim: OptimConfig, make: Callable[[list[dict]], Optimizer] | None = None
) -> Optimizer:
    """AdamW, or what `make` gives, over what is trained. Biases and norms don't decay; an adapter's weights all do."""
    trained = [p for p in student.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() > 1 or student.has_adapter]
    others = [p for p in trained if p.dim() <= 1 and not student.has_adapter]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if make is not None:
        made = make(groups)
        if not isinstance(made, Optimizer) or isinstance(made, LBFGS):  # which needs several passes a step
            raise ConfigError(
                f"optimizer gave a {type(made).__name__}, expected one of torch.optim with a plain step()"
            )
        return made
    return AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def build_scheduler(optim: OptimConfig, optimizer: Optimizer, steps: int) -> LRScheduler:
    """Warm-up, then a cosine or a line down to min_lr, or a constant rate."""
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
