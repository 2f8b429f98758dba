"""What the kernels are compared with: the published formulation, the compiler's best, and other projects' losses."""

from __future__ import annotations

import torch
from torch import Tensor

from abkd_fast import AlphaBeta
from abkd_fast.losses.divergences import JensenShannon

DIVERGENCE = AlphaBeta(0.2, 0.7)
PEER_DIVERGENCE = JensenShannon()  # what the peers know, too: both call the teacher's share of the mixture beta
PEER_BETA = 1 - PEER_DIVERGENCE.lam


def published_rows(student: Tensor, teacher: Tensor, alpha: float, beta: float) -> Tensor:
    """Equation 5 as it is usually written down, in eager PyTorch: powers of float32 softmaxes. [..., V] to [...]."""
    p, q = teacher.softmax(-1, dtype=torch.float32), student.softmax(-1, dtype=torch.float32)
    total = alpha + beta
    terms = p**alpha * q**beta - alpha / total * p**total - beta / total * q**total
    return -terms.sum(-1) / (alpha * beta)


def published(student: Tensor, teacher: Tensor) -> Tensor:
    return published_rows(student, teacher, DIVERGENCE.alpha, DIVERGENCE.beta).mean()


def published_linear(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    return published(hidden @ weight.T, teacher_hidden @ teacher_weight.T)


def log_space(student: Tensor, teacher: Tensor) -> Tensor:
    """The same as one would write it for a compiler: only exponentials, whose gradients need no powers."""
    alpha, beta = DIVERGENCE.alpha, DIVERGENCE.beta
    a, b = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    total = alpha + beta
    terms = alpha / total * (total * a).exp() + beta / total * (total * b).exp() - (alpha * a + beta * b).exp()
    return terms.sum(-1).mean() / (alpha * beta)


def liger(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """Liger-Kernel's fused linear JSD with its defaults: the projection's gradient is summed in the weights' type."""
    if not hidden.is_cuda:
        raise RuntimeError("it needs a GPU")
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    return liger_fused_linear_jsd(hidden, weight, teacher_hidden, teacher_weight, jsd_beta=PEER_BETA)


def trl(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """TRL's chunked JSD, which makes the logits again in backward, and the student's entropy besides."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss  # not public: it may move

    mask = torch.ones(1, len(hidden), device=hidden.device)
    return _chunked_divergence_loss(hidden[None], teacher_hidden[None], weight, teacher_weight, mask, PEER_BETA)[0]


PEERS = {"Liger-Kernel": liger, "TRL": trl}
