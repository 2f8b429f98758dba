"""The published way of a training step, written from its description: what timing.py compares with.

That of the code released with ABKD, and with DistiLLM and MiniLLM before it: every sample is padded to the full
length, student and teacher compute logits at every position, losses are eager PyTorch over the whole vocabulary, and
the teacher runs in every step. Left out, to its advantage: float16 with loss scaling, DeepSpeed, its guards against
infinite logits, and its two synchronisations and all-reduces a step.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rivals import published_rows
from torch import Tensor, nn

from abkd_fast.config import OptimConfig
from abkd_fast.divergences import AlphaBeta, AlphaNet

# Of student logits [B, S, V], teacher logits [B, S, V] and labels [B, S].
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class PaddedBatch:
    input_ids: Tensor  # [B, S]
    attention_mask: Tensor  # [B, S]
    labels: Tensor  # [B, S]: the next token where it is of the response, else -100


def pad(samples: list[dict], length: int, device: torch.device) -> PaddedBatch:
    """Samples of the trainer's data set, each padded on the right to `length` tokens."""
    input_ids = torch.zeros(len(samples), length, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for row, sample in enumerate(samples):
        ids, prompt = torch.tensor(sample["input_ids"]), sample["prompt_length"]
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        labels[row, prompt - 1 : len(ids) - 1] = ids[prompt:]
    return PaddedBatch(input_ids.to(device), attention_mask.to(device), labels.to(device))


def _mean(rows: Tensor, labels: Tensor) -> Tensor:
    """Of [B, S] over the positions that have a label."""
    kept = labels != -100
    return (rows * kept).sum() / kept.sum()


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(student.float().flatten(0, 1), labels.flatten())


def forward_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """As released: KL(p, q) and the entropy of p, that is, the cross-entropy of q under p."""
    p = teacher.softmax(-1, dtype=torch.float32)
    return _mean(-(p * student.log_softmax(-1, dtype=torch.float32)).sum(-1), labels)


def alpha_beta(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    divergence = AlphaBeta()
    return _mean(published_rows(student, teacher, divergence.alpha, divergence.beta), labels)


def alphanet(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The larger of two batch means, as released."""
    branches = [(branch.alpha, 1 - branch.alpha) for branch in AlphaNet().branches]
    return torch.maximum(*(_mean(published_rows(student, teacher, *branch), labels) for branch in branches))


class PublishedTrainer:
    """Steps on the very weights of two given models, with modules and an optimizer of its own."""

    def __init__(self, student: nn.Module, teacher: nn.Module, optim: OptimConfig) -> None:
        self.student, self.teacher = _with_default_attention(student), _with_default_attention(teacher)
        groups = [
            {"params": [p for p in student.parameters() if p.dim() > 1], "weight_decay": optim.weight_decay},
            {"params": [p for p in student.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
        self.clip_norm = optim.clip_norm

    def step(self, batch: PaddedBatch, loss: Loss | None) -> tuple[Tensor, Tensor]:
        """One optimizer step on a divergence, or on the cross-entropy alone; returns its loss and gradient norm.

        With a divergence the cross-entropy is computed all the same, and multiplied by 0: so does the released code,
        whose scripts set its share, 1 - kd_ratio, to 0.
        """
        student = _logits(self.student, batch)
        if loss is None:
            total = cross_entropy(student, batch.labels)
        else:
            with torch.no_grad():
                teacher = _logits(self.teacher, batch)
            total = 0.0 * cross_entropy(student, batch.labels) + loss(student, teacher, batch.labels)
            del teacher
        del student
        total.backward()
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total.detach(), norm

    @torch.no_grad()
    def teacher_entropy(self, batch: PaddedBatch) -> Tensor:
        """What the value of `forward_kl` has besides the divergence."""
        teacher = _logits(self.teacher, batch)
        return forward_kl(teacher, teacher, batch.labels)


def _with_default_attention(model: nn.Module) -> nn.Module:
    """A model of the very same parameters, with the attention that transformers gives by default."""
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    twin.set_attn_implementation("sdpa")
    return twin


def _logits(model: nn.Module, batch: PaddedBatch) -> Tensor:
    """[B, S, V]"""
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
