"""Shared by the tests of the row kernels."""

import pytest
import torch

from abkd_fast import divergence_loss, parse
from abkd_fast.losses import reference, row_ops
from abkd_fast.losses.arguments import LossSpec
from oracle import ALPHA_BETA, FAMILIES, relative_errors

ALL = [*ALPHA_BETA, *FAMILIES]

# A log-probability near -35 has a rounding error of 35 * 2^-24 = 2e-6. Slopes are proportional to differences of two
# log-probabilities, which are about 1 here. A few such errors make 1e-5, and the bound leaves a factor of 3.
FLOAT32 = 3e-5
# Rounding errors of float64 are 2^-29 times as large; the oracle's quadrature adds its own error.
FLOAT64 = 1e-10
COMPILED = pytest.mark.skipif(row_ops._C is None, reason="the extension is missing")


def kernel(student, teacher, divergence, **options):
    """The losses of the rows, and the gradient of their sum."""
    kind = parse(divergence) if isinstance(divergence, str) else divergence
    student = student.detach().clone().requires_grad_()
    losses = divergence_loss(student, teacher, kind, reduction="none", **options)
    losses.sum().backward()
    return losses.detach(), student.grad


def by_reference(student, teacher, divergence):
    gradient = torch.empty_like(student)
    return reference.row_losses(student, teacher, None, LossSpec(divergence), gradient), gradient


def assert_close(got, expected, bound):
    for mine, exact in zip(got, expected, strict=True):
        worst = relative_errors(mine, exact).max().item()
        assert worst < bound, f"relative error {worst:.1e}, expected less than {bound:.1e}"
