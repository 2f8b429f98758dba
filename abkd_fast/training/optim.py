"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from ..config.schema import OptimConfig
from ..models.packed import PackedCausalLM


def build_optimizer(student: PackedCausalLM, optim: OptimConfig) -> AdamW:
    """AdamW over what is trained. Biases and norms don't decay; every weight of an adapter does."""
    trained = [p for p in student.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() > 1 or student.has_adapter]
    others = [p for p in trained if p.dim() <= 1 and not student.has_adapter]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def build_scheduler(optimizer: AdamW, optim: OptimConfig, steps: int) -> LRScheduler:
    """Warm-up, then a cosine down to min_lr, or a constant rate."""
    cosine = optim.schedule == "cosine"
    return get_scheduler(
        "cosine_with_min_lr" if cosine else "constant_with_warmup",
        optimizer,
        num_warmup_steps=optim.warmup_steps,
        num_training_steps=steps,
        scheduler_specific_kwargs={"min_lr": optim.min_lr} if cosine else None,
    )
