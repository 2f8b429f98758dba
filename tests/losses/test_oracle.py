import mpmath
import pytest
import torch

import oracle
from abkd_fast import ForwardKL, parse
from oracle import FAMILIES, gpt2_like_logits, mild_logits
from row_kernels import assert_close


@pytest.mark.parametrize(("alpha", "beta"), [*oracle.GRID, (1e-5, 0.7), (0.7, -1e-4), (1e-6, -1e-6)])
@pytest.mark.parametrize(("a", "b"), [(-1.0, -1.2), (-0.1, -20.0), (-25.0, -0.5), (-30.0, -30.5)])
def test_quadrature_agrees_with_mpmath(alpha, beta, a, b):
    with mpmath.workdps(60):
        alpha_, beta_, a_, b_ = map(mpmath.mpf, (alpha, beta, a, b))
        rate = (lambda t: mpmath.expm1(alpha_ * t) / alpha_) if alpha else (lambda t: t)
        scale = mpmath.exp((alpha_ + beta_) * a_)
        value = scale * mpmath.quad(
            lambda t: mpmath.exp(beta_ * t) * rate(t), mpmath.linspace(0, b_ - a_, 5), method="gauss-legendre"
        )
        slope = scale * mpmath.exp(beta_ * (b_ - a_)) * rate(b_ - a_)
    got = oracle.terms(*torch.tensor([[a], [b]], dtype=torch.float64), alpha, beta)
    # A few roundings of 2^-53 for each of 96 nodes.
    assert got[0].item() == pytest.approx(float(value), rel=1e-12)
    assert got[1].item() == pytest.approx(float(slope), rel=1e-12)


@pytest.mark.parametrize(
    ("alpha", "beta", "closed_form"),
    [
        (1.0, 0.0, lambda p, q: (p * (p / q).log()).sum(1)),
        (0.0, 1.0, lambda p, q: (q * (q / p).log()).sum(1)),
        (0.5, 0.5, lambda p, q: 2 * ((p.sqrt() - q.sqrt()) ** 2).sum(1)),
        (1.0, 1.0, lambda p, q: 0.5 * ((p - q) ** 2).sum(1)),
        (2.0, -1.0, lambda p, q: 0.5 * ((p - q) ** 2 / q).sum(1)),
        (0.2, 0.7, lambda p, q: -((p**0.2 * q**0.7 - 2 / 9 * p**0.9 - 7 / 9 * q**0.9) / 0.14).sum(1)),
    ],
)
def test_quadrature_agrees_with_closed_forms(alpha, beta, closed_form):
    student, teacher = gpt2_like_logits(4, 500)
    z = student.double().requires_grad_()
    expected = closed_form(teacher.double().softmax(1), z.softmax(1))
    expected.sum().backward()
    assert_close(oracle.row_losses(student, teacher, alpha, beta), (expected, z.grad), 1e-11)


@pytest.mark.parametrize("divergence", FAMILIES)
def test_definitions_agree_with_mpmath(divergence):
    student, teacher = mild_logits(1, 7, torch.float64, seed=2)
    value, gradient = oracle.exact(student[0].tolist(), teacher[0].tolist(), parse(divergence))
    losses, by_autograd = oracle.evaluate(student, teacher, parse(divergence))
    # 2^-53 on sums of terms up to 1, against a divergence of about .1 or more.
    assert losses.item() == pytest.approx(value, rel=1e-13)
    assert by_autograd[0].tolist() == pytest.approx(gradient, abs=1e-14)


def test_gpt2_like_logits_are_like_those_of_gpt2():
    student, teacher = gpt2_like_logits(4, 50257)
    assert -40 < teacher.log_softmax(1).min() < -28
    assert 0.1 < oracle.evaluate(student, teacher, ForwardKL())[0].mean() < 1
