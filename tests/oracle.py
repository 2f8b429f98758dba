"""A float64 oracle that shares no formula with the kernels: quadrature of the integral that defines the divergence."""

import numpy as np
import torch

# 96 Gauss points integrate e^(rate t) over [0, d] to rounding while |rate d| < 100: any logits of these tests.
NODES, WEIGHTS = (0.5 * x for x in np.polynomial.legendre.leggauss(96))
NODES = NODES + 0.5

LIMITS = [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.5, -0.5), (-0.3, 0.3)]
REGULAR = [(0.2, 0.7), (0.5, 0.5), (1.0, 1.0), (2.0, -1.0)]
GRID = LIMITS + REGULAR


def neighbours(delta):
    """Points at a distance of about delta from where alpha, beta, their sum, or all of them are 0."""
    near_alpha = [(delta, 0.7), (-delta, 0.7), (delta, 1.0)]
    near_beta = [(0.7, delta), (0.7, -delta), (1.0, delta)]
    near_sum = [(0.5, -0.5 + delta), (-0.3, 0.3 - delta)]
    return near_alpha + near_beta + near_sum + [(delta, delta), (delta, -delta), (-delta, delta / 3)]


def integrand(a, t, alpha, beta):
    """p^(alpha + beta) e^(beta t) (e^(alpha t) - 1) / alpha with every growing factor in one exponent."""
    exponent = (alpha + beta) * a + beta * t + (alpha * t).clamp(min=0)
    bounded = -torch.expm1(-abs(alpha) * t.abs()) / abs(alpha) if alpha else t.abs()
    return torch.exp(exponent) * bounded * t.sign()


def terms(a, b, alpha, beta):
    """Each token's divergence and its derivative by log q, from float64 log-probabilities a (teacher), b (student)."""
    d = b - a
    value = torch.zeros_like(d)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # hundreds of short operations: on a busy machine each would wait 8 ms for a second thread
    for node, weight in zip(NODES.tolist(), WEIGHTS.tolist(), strict=True):
        value += weight * integrand(a, node * d, alpha, beta)
    torch.set_num_threads(threads)
    return value * d, integrand(a, d, alpha, beta)


def row_losses(student, teacher, alpha, beta, labels=None, temperature=1.0, hard_weight=0.0, value=True):
    """Losses [N] and the gradient [N, V] of their sum, as `abkd_fast.divergence_loss` documents them.

    value=False spares the quadrature, and so allows log-ratios of any size.
    """
    z, y = student.detach().double(), teacher.detach().double()
    a, b = torch.log_softmax(y / temperature, 1), torch.log_softmax(z / temperature, 1)
    share, u = terms(a, b, alpha, beta) if value else (torch.full_like(a, torch.nan), integrand(a, b - a, alpha, beta))
    losses = (1 - hard_weight) * share.sum(1)
    gradient = (1 - hard_weight) / temperature * (u - b.exp() * u.sum(1, keepdim=True))
    if labels is not None:
        kept = labels != -100
        if hard_weight:
            target = torch.nn.functional.one_hot(labels.clamp(min=0), z.shape[1]).double()
            losses -= hard_weight * (target * torch.log_softmax(z, 1)).sum(1)
            gradient += hard_weight * (torch.softmax(z, 1) - target)
        losses, gradient = losses * kept, gradient * kept[:, None]
    return losses, gradient


def gpt2_like_logits(rows, vocab, seed=0):
    """Student and teacher logits, float32: Zipf's law under noise. At V=50257 log p reaches -35 and KL is about .5."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(rows)]) if rows else torch.zeros(0, 1)
    noise = torch.randn(2, rows, vocab, generator=generator)
    teacher = -2.0 * torch.log1p(rank) + 2.0 * noise[0]
    return teacher + noise[1], teacher


def relative_errors(got, expected):
    """L2 error of each row of `got` over the L2 norm of the same row of `expected`."""
    got, expected = got.detach().double(), expected.double()
    if got.dim() == 1:
        got, expected = got[:, None], expected[:, None]
    return (got - expected).norm(dim=1) / expected.norm(dim=1)
