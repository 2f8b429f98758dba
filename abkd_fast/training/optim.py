"""The optimizer and its learning-rate schedule."""

from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from ..config.schema import OptimConfig
from ..models.causal_lm import CausalLM


def build_optimizer(student: CausalLM, optim: OptimConfig) -> AdamW:
    """AdamW over what is trained. Biases and norms don't decay; every weight of an adapter does."""
    trained = [p for p in student.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() > 1 or student.has_adapter]
    others = [p for p in trained if p.dim() <= 1 and not student.has_adapter]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def build_scheduler(optimizer: AdamW, optim: OptimConfig, steps: int) -> LRScheduler:
    """Warm-up, then a cosine down to min_lr, or a constant rate."""
    name, options = "constant_with_warmup", None
    if optim.schedule == "cosine":
        name, options = "cosine_with_min_lr", {"min_lr": optim.min_lr}
    return get_scheduler(name, optimizer, optim.warmup_steps, steps, scheduler_specific_kwargs=options)
