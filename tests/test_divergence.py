import math
import os
import subprocess
import sys
import warnings

import mpmath
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import abkd_fast
from abkd_fast import AlphaBeta, divergence_loss, divergences, ops, parse, reference

# A log-probability near -35 is rounded by 35 * 2^-24 = 2e-6 and slopes are proportional to differences of two of them,
# which are about 1 here: a few such roundings make 1e-5, and this leaves a factor of 3.
FLOAT32 = 3e-5
# float64 has 2^-29 times that rounding; the oracle's quadrature adds its own.
FLOAT64 = 1e-10
EXTREME = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.2, 0.7), (1.0, 1.0), (0.0, 0.7)]
COMPILED = pytest.mark.skipif(ops._C is None, reason="the extension is missing")


def kernel(student, teacher, alpha, beta, **options):
    """Losses of the rows and the gradient of their sum."""
    student = student.detach().clone().requires_grad_()
    losses = divergence_loss(student, teacher, AlphaBeta(alpha, beta), reduction="none", **options)
    losses.sum().backward()
    return losses.detach(), student.grad


def logits(rows, vocab, dtype=torch.float32, seed=0):
    """Mild ones: with few tokens a steep distribution leaves one probability near 1, and its logarithm no digits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, vocab, generator=generator, dtype=torch.float64).to(dtype).unbind()


def assert_close_to_oracle(student, teacher, alpha, beta, **options):
    expected_losses, expected_gradient = oracle.row_losses(student, teacher, alpha, beta, **options)
    losses, gradient = kernel(student, teacher, alpha, beta, **options)
    kept = slice(None) if options.get("labels") is None else options["labels"] != -100
    assert oracle.relative_errors(losses[kept], expected_losses[kept]).max() < FLOAT32
    assert oracle.relative_errors(gradient[kept], expected_gradient[kept]).max() < FLOAT32


# ---- the oracle itself


@pytest.mark.parametrize(("alpha", "beta"), [*oracle.GRID, (1e-5, 0.7), (0.7, -1e-4), (1e-6, -1e-6)])
@pytest.mark.parametrize(("a", "b"), [(-1.0, -1.2), (-0.1, -20.0), (-25.0, -0.5), (-30.0, -30.5)])
def test_oracle_agrees_with_mpmath(alpha, beta, a, b):
    with mpmath.workdps(60):
        alpha_, beta_, a_, b_ = map(mpmath.mpf, (alpha, beta, a, b))
        rate = (lambda t: mpmath.expm1(alpha_ * t) / alpha_) if alpha else (lambda t: t)
        scale = mpmath.exp((alpha_ + beta_) * a_)
        value = scale * mpmath.quad(
            lambda t: mpmath.exp(beta_ * t) * rate(t), mpmath.linspace(0, b_ - a_, 5), method="gauss-legendre"
        )
        slope = scale * mpmath.exp(beta_ * (b_ - a_)) * rate(b_ - a_)
    got = oracle.terms(*torch.tensor([[a], [b]], dtype=torch.float64), alpha, beta)
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
def test_oracle_agrees_with_closed_forms(alpha, beta, closed_form):
    student, teacher = oracle.gpt2_like_logits(4, 500)
    z = student.double().requires_grad_()
    expected = closed_form(teacher.double().softmax(1), z.softmax(1))
    expected.sum().backward()
    losses, gradient = oracle.row_losses(student, teacher, alpha, beta)
    assert oracle.relative_errors(losses, expected).max() < 1e-12
    assert oracle.relative_errors(gradient, z.grad).max() < 1e-11


def test_gpt2_like_logits_are_like_those_of_gpt2():
    student, teacher = oracle.gpt2_like_logits(4, 50257)
    log_p = teacher.log_softmax(1)
    assert -40 < log_p.min() < -28
    assert 0.1 < oracle.row_losses(student, teacher, 1.0, 0.0)[0].mean() < 1


# ---- values and gradients


@pytest.mark.parametrize(("alpha", "beta"), oracle.GRID)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 3), (7, 3), (64, 3), (7, 32000), (2, 50257), (1, 151936)])
def test_kernel_agrees_with_oracle(rows, vocab, alpha, beta):
    make = logits if vocab == 3 else oracle.gpt2_like_logits
    assert_close_to_oracle(*make(rows, vocab), alpha, beta)


@pytest.mark.parametrize("vocab", [32000, 50257, 151936])
@pytest.mark.parametrize("point", [(0.2, 0.7), (0.0, 0.0), (-0.3, 0.3)])
def test_kernel_agrees_on_many_long_rows(vocab, point):
    # Where alpha + beta = 0 all tokens count alike, and in some of 64 rows the slopes all but cancel in their sum: it
    # then shows the roundings that all tokens share. The quadrature takes minutes here, hence the reference.
    student, teacher = oracle.gpt2_like_logits(64, vocab, seed=5)
    expected_gradient = torch.empty(64, vocab, dtype=torch.float64)
    rows = student.double(), teacher.double(), None, AlphaBeta(*point), 1.0, 0.0
    expected_losses = reference.row_losses(*rows, gradient=expected_gradient)
    losses, gradient = kernel(student, teacher, *point)
    assert oracle.relative_errors(losses, expected_losses).max() < FLOAT32
    assert oracle.relative_errors(gradient, expected_gradient).max() < FLOAT32


@pytest.mark.parametrize("delta", [1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize(("rows", "vocab"), [(7, 3), (2, 50257)])
def test_kernel_agrees_with_oracle_near_every_limit(rows, vocab, delta):
    student, teacher = (logits if vocab == 3 else oracle.gpt2_like_logits)(rows, vocab, seed=1)
    for alpha, beta in oracle.neighbours(delta):
        assert_close_to_oracle(student, teacher, alpha, beta)


@pytest.mark.parametrize(("alpha", "beta"), oracle.GRID)
def test_tolerance_notices_small_errors(alpha, beta):
    student, teacher = oracle.gpt2_like_logits(2, 1000)
    for expected in oracle.row_losses(student, teacher, alpha, beta):
        assert oracle.relative_errors(torch.zeros_like(expected), expected).min() > FLOAT32
        assert oracle.relative_errors(expected * 1.001, expected).min() > FLOAT32
        assert oracle.relative_errors(expected.float() * (1 + 2e-4), expected).min() > FLOAT32


@pytest.mark.parametrize(("alpha", "beta"), [*oracle.GRID, *oracle.neighbours(1e-5)])
def test_float64_kernel_and_reference_agree_with_oracle(alpha, beta):
    student, teacher = (x.double() for x in oracle.gpt2_like_logits(2, 4001))
    expected = oracle.row_losses(student, teacher, alpha, beta)
    gradient = torch.empty_like(student)
    slow = reference.row_losses(student, teacher, None, AlphaBeta(alpha, beta), 1.0, 0.0, gradient), gradient
    for got in (kernel(student, teacher, alpha, beta), slow):
        assert oracle.relative_errors(got[0], expected[0]).max() < FLOAT64
        assert oracle.relative_errors(got[1], expected[1]).max() < FLOAT64


@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.7), (1.0, 0.0), (0.5, -0.5)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("hard_weight", [0.0, 0.3, 1.0])
def test_labels_temperature_and_hard_weight(alpha, beta, temperature, hard_weight):
    student, teacher = oracle.gpt2_like_logits(6, 1003)
    labels = torch.tensor([0, -100, 1002, 17, -100, 5])
    options = {"labels": labels, "temperature": temperature, "hard_weight": hard_weight}
    assert_close_to_oracle(student, teacher, alpha, beta, **options)
    losses, gradient = kernel(student, teacher, alpha, beta, **options)
    assert losses[[1, 4]].eq(0).all()
    assert gradient[[1, 4]].eq(0).all()
    mean = divergence_loss(student, teacher, AlphaBeta(alpha, beta), **options)
    assert mean.item() == pytest.approx(losses.double().sum().item() / 4, rel=FLOAT32)


def test_reductions_and_upstream_gradients():
    student, teacher = logits(5, 40, torch.float64)
    labels = torch.tensor([1, -100, 3, 4, 5])
    rows, gradient = kernel(student, teacher, 0.2, 0.7, labels=labels)
    weights = torch.randn(5, dtype=torch.float64)
    for reduction, weight, expected in (("sum", 3.0, 3.0), ("mean", -2.0, -0.5), ("none", weights, weights[:, None])):
        z = student.clone().requires_grad_()
        loss = divergence_loss(z, teacher, AlphaBeta(), labels, reduction=reduction)
        torch.testing.assert_close(loss.detach(), {"sum": rows.sum(), "mean": rows.sum() / 4, "none": rows}[reduction])
        (loss * weight).sum().backward()
        torch.testing.assert_close(z.grad, gradient * expected)


def test_everything_ignored():
    student, teacher = (x.requires_grad_() for x in logits(3, 9))
    for reduction in ("mean", "sum", "none"):
        labels = torch.full((3,), -100)
        loss = divergence_loss(student, teacher, AlphaBeta(), labels, hard_weight=0.5, reduction=reduction)
        assert loss.eq(0).all()
        assert torch.autograd.grad(loss.sum(), student)[0].eq(0).all()


def test_no_gradient_flows_to_the_teacher():
    student, teacher = (x.requires_grad_() for x in logits(3, 9))
    divergence_loss(student, teacher, AlphaBeta()).backward()
    assert teacher.grad is None


def test_no_rows():
    student = torch.zeros(0, 5, requires_grad=True)
    loss = divergence_loss(student, torch.zeros(0, 5), AlphaBeta())
    loss.backward()
    assert loss.item() == 0
    assert student.grad.shape == (0, 5)
    assert divergence_loss(student, torch.zeros(0, 5), AlphaBeta(), reduction="none").shape == (0,)


@pytest.mark.parametrize(("alpha", "beta"), oracle.GRID)
def test_one_token_vocabulary(alpha, beta):
    losses, gradient = kernel(*logits(3, 1), alpha, beta, labels=torch.zeros(3, dtype=torch.long), hard_weight=0.5)
    assert losses.eq(0).all()
    assert gradient.eq(0).all()


# ---- extreme logits


@pytest.mark.parametrize(("alpha", "beta"), EXTREME)
def test_huge_gaps(alpha, beta):
    student = torch.tensor([[1e4, 0.0, -1e4], [0.0, 1e4, 5.0], [0.0, -1e4, 1.0]])
    teacher = torch.tensor([[1e4, 0.0, 1.0], [1e4, 0.0, 5.0], [-1e4, 0.0, 1.0]])
    losses, gradient = kernel(student, teacher, alpha, beta)
    wide = student.double(), teacher.double(), None, AlphaBeta(alpha, beta), 1.0, 0.0, None
    torch.testing.assert_close(losses.double(), reference.row_losses(*wide), rtol=FLOAT32, atol=1e-30)
    by_oracle = oracle.row_losses(student, teacher, alpha, beta, value=False)[1]
    error = (gradient.double() - by_oracle).norm(dim=1)
    assert (error <= FLOAT32 * by_oracle.norm(dim=1) + 1e-30).all()


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0)])
def test_huge_gaps_in_closed_form(alpha, beta):
    expected = torch.tensor([1e4, 5e3 - math.log(2)])
    student, teacher = torch.tensor([[1e4, 0.0], [0.0, 1e4]]), torch.tensor([[0.0, 1e4], [0.0, 0.0]])
    if beta:
        student, teacher = teacher, student
    losses, _ = kernel(student, teacher, alpha, beta)
    torch.testing.assert_close(losses, expected, rtol=FLOAT32, atol=0)


@pytest.mark.parametrize(("alpha", "beta"), [*oracle.GRID, (-2.0, -1.0), (3.0, 2.0)])
def test_saturated_terms_stay_finite(alpha, beta):
    student = torch.tensor([[1e4, 0.0, -1e4], [0.0, 1e4, 5.0], [0.0, -1e4, 1.0]])
    for result in kernel(student, student.roll(1, dims=1), alpha, beta):
        assert result.isfinite().all()


@pytest.mark.parametrize(("alpha", "beta"), oracle.GRID)
def test_equal_distributions(alpha, beta):
    student, _ = oracle.gpt2_like_logits(3, 5000)
    losses, gradient = kernel(student, student, alpha, beta)
    assert losses.eq(0).all()
    assert gradient.eq(0).all()
    shifted, _ = kernel(student + 1.0, student, 0.2, 0.7)
    assert shifted.abs().max() < 1e-10


@pytest.mark.parametrize(("alpha", "beta"), oracle.GRID)
def test_masked_logits_count_for_nothing(alpha, beta):
    student, teacher = logits(4, 60)
    kept = torch.arange(60) % 7 != 3
    labels = torch.zeros(4, dtype=torch.long)
    expected = kernel(student[:, kept], teacher[:, kept], alpha, beta, labels=labels, hard_weight=0.3, temperature=2.0)
    student[:, ~kept] = teacher[:, ~kept] = -torch.inf
    losses, gradient = kernel(student, teacher, alpha, beta, labels=labels, hard_weight=0.3, temperature=2.0)
    torch.testing.assert_close(losses, expected[0], rtol=FLOAT32, atol=0)
    torch.testing.assert_close(gradient[:, kept], expected[1], rtol=FLOAT32, atol=FLOAT32)
    assert gradient[:, ~kept].eq(0).all()


@pytest.mark.parametrize(("alpha", "beta"), oracle.GRID)
def test_rows_of_minus_infinity_stay_finite(alpha, beta):
    student, teacher = logits(2, 10)
    student[0] = teacher[0] = -torch.inf
    for result in kernel(student, teacher, alpha, beta):
        assert result.isfinite().all()


@pytest.mark.parametrize(("alpha", "beta"), oracle.GRID)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_nan_logits_make_nan_losses(alpha, beta, side, dtype):
    student, teacher = logits(3, 33, dtype)
    (student if side == "student" else teacher)[1, 20] = torch.nan
    losses, _ = kernel(student, teacher, alpha, beta)
    assert losses.isnan().tolist() == [False, True, False]


# ---- types, layouts, sizes


@pytest.mark.parametrize(("alpha", "beta"), oracle.GRID)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits(alpha, beta, dtype):
    student, teacher = (x.to(dtype) for x in oracle.gpt2_like_logits(3, 2001))
    expected = kernel(student.float(), teacher.float(), alpha, beta)
    losses, gradient = kernel(student, teacher, alpha, beta)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, expected[0])
    assert torch.equal(gradient, expected[1].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_strided_logits(dtype):
    student, teacher = logits(6, 50, dtype)
    labels = torch.tensor([3, -100, 0, 49, 1, 2])
    expected = kernel(student, teacher, 0.2, 0.7, labels=labels, hard_weight=0.2)
    wide = torch.full((6, 77), 99.0, dtype=dtype)
    wide[:, :50] = student
    layouts = [wide[:, :50], student.T.contiguous().T, student.repeat_interleave(2, 0)[::2]]
    for student_view in layouts:
        for teacher_view in (teacher, teacher.T.contiguous().T):
            z = student_view.detach().requires_grad_()
            losses = divergence_loss(
                z, teacher_view, AlphaBeta(), labels.repeat_interleave(3)[::3], hard_weight=0.2, reduction="none"
            )
            losses.sum().backward()
            assert torch.equal(losses.detach(), expected[0])
            assert torch.equal(z.grad, expected[1])


def test_expanded_rows():
    student, teacher = logits(1, 50)
    expected, _ = kernel(student, teacher, 0.2, 0.7)
    losses, _ = kernel(student.repeat(4, 1), teacher.expand(4, 50), 0.2, 0.7)
    assert torch.equal(losses, expected.expand(4))


def test_gradient_may_overwrite_the_student():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        student, teacher = logits(5, 2050, dtype)
        labels = torch.tensor([3, -100, 0, 49, 1])
        rows = (teacher, labels, AlphaBeta(), 2.0, 0.3)
        gradient = torch.empty_like(student)
        expected = ops.row_losses(student, *rows, gradient=gradient)
        assert torch.equal(ops.row_losses(student, *rows, gradient=student), expected)
        assert torch.equal(student, gradient)


@pytest.mark.parametrize(("student_vocab", "teacher_vocab"), [(40, 64), (64, 40)])
def test_padded_vocabularies(student_vocab, teacher_vocab):
    student, teacher = logits(4, 64)
    expected = kernel(student[:, :40], teacher[:, :40], 0.2, 0.7)
    losses, gradient = kernel(student[:, :student_vocab], teacher[:, :teacher_vocab], 0.2, 0.7)
    assert torch.equal(losses, expected[0])
    assert torch.equal(gradient[:, :40], expected[1])
    assert gradient[:, 40:].eq(0).all()


def test_different_vocabularies_are_refused():
    with pytest.raises(ValueError, match=r"32000.*50257"):
        divergence_loss(torch.zeros(1, 32000), torch.zeros(1, 50257), AlphaBeta())


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        ((3, 5), (4, 5), {}, r"\[3, 5\] and \[4, 5\]"),
        ((5,), (5,), {}, r"\[5\]"),
        ((2, 3, 5), (2, 3, 5), {}, r"\[2, 3, 5\]"),
        ((3, 5), (3, 5), {"temperature": 0.0}, "temperature is 0.0"),
        ((3, 5), (3, 5), {"temperature": -1.0}, "temperature is -1.0"),
        ((3, 5), (3, 5), {"temperature": math.nan}, "temperature is nan"),
        ((3, 5), (3, 5), {"hard_weight": 0.5}, "needs labels"),
        ((3, 5), (3, 5), {"hard_weight": 1.5, "labels": torch.zeros(3).long()}, "hard_weight is 1.5"),
        ((3, 5), (3, 5), {"labels": torch.zeros(2).long()}, r"labels have shape \[2\]"),
        ((3, 5), (3, 5), {"reduction": "average"}, "average"),
    ],
)
def test_wrong_arguments(student, teacher, options, message):
    with pytest.raises(ValueError, match=message):
        divergence_loss(torch.zeros(student), torch.zeros(teacher), AlphaBeta(), **options)


@COMPILED
@pytest.mark.parametrize("label", [5, -1, -101])
def test_labels_out_of_range(label):
    with pytest.raises(RuntimeError, match=rf"labels\[1\] is {label}"):
        divergence_loss(*logits(3, 5), AlphaBeta(), torch.tensor([0, label, 2]), hard_weight=0.5)


# ---- properties

ROWS = st.integers(0, 2**31)
# Numbers that float32 holds without becoming subnormal; smaller ones have a test of their own.
COORDINATES = st.floats(-1, 1.5).map(lambda x: x if abs(x) > 1e-30 else 0.0)
POINTS = st.tuples(COORDINATES, COORDINATES)
few = settings(max_examples=40, deadline=None, derandomize=True)


@few
@given(seed=ROWS, point=POINTS, vocab=st.integers(2, 70))
def test_properties(seed, point, vocab):
    student, teacher = logits(3, vocab, torch.float64, seed)
    losses, gradient = kernel(student, teacher, *point)
    assert losses.gt(0).all()
    scale = gradient.abs().sum(1)
    assert (gradient.sum(1).abs() <= 1e-11 * scale).all()

    shifted = kernel(student + 3.0, teacher - 5.0, *point)
    torch.testing.assert_close(shifted[0], losses, rtol=1e-10, atol=0)
    assert oracle.relative_errors(shifted[1], gradient).max() < 1e-10

    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))
    permuted = kernel(student[:, order], teacher[:, order], *point)
    torch.testing.assert_close(permuted[0], losses, rtol=1e-10, atol=0)
    assert oracle.relative_errors(permuted[1], gradient[:, order]).max() < 1e-10

    dual, _ = kernel(teacher, student, *reversed(point))
    torch.testing.assert_close(dual, losses, rtol=1e-10, atol=0)


@few
@given(seed=ROWS, point=POINTS)
def test_float32_agrees_with_float64_everywhere(seed, point):
    student, teacher = logits(3, 50, torch.float32, seed)
    expected = kernel(student.double(), teacher.double(), *point)
    got = kernel(student, teacher, *point)
    for mine, exact in zip(got, expected, strict=True):
        assert oracle.relative_errors(mine, exact).max() < FLOAT32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_subnormal_parameters_are_like_0(dtype):
    student, teacher = logits(3, 50, dtype)
    for tiny in (1e-39, 1e-46, 1e-309):
        for point, limit in (((tiny, 1.0), (0.0, 1.0)), ((1.0, tiny), (1.0, 0.0)), ((tiny, tiny), (0.0, 0.0))):
            for got, expected in zip(kernel(student, teacher, *point), kernel(student, teacher, *limit), strict=True):
                assert oracle.relative_errors(got, expected).max() < FLOAT32


# ---- autograd, operators, compilation


@pytest.mark.parametrize(("alpha", "beta"), [*oracle.GRID, (1e-5, 0.7), (0.7, -1e-5)])
@pytest.mark.parametrize(("temperature", "hard_weight"), [(1.0, 0.0), (2.0, 0.3)])
def test_gradcheck(alpha, beta, temperature, hard_weight):
    student, teacher = logits(3, 6, torch.float64)
    labels = torch.tensor([1, -100, 4])

    def loss(z, reduction):
        options = {"temperature": temperature, "hard_weight": hard_weight, "reduction": reduction}
        return divergence_loss(z, teacher, AlphaBeta(alpha, beta), labels, **options)

    for reduction in ("none", "mean"):
        assert torch.autograd.gradcheck(lambda z, reduction=reduction: loss(z, reduction), student.requires_grad_())


@COMPILED
def test_opcheck_row_losses():
    student, teacher = logits(3, 9)
    labels = torch.tensor([1, -100, 4])
    for optional in ((teacher, labels, 1, [0.2, 0.7], 2.0, 0.3), (teacher, None, 1, [0.2, 0.7], 1.0, 0.0)):
        for gradient in (None, torch.empty_like(student)):
            torch.library.opcheck(torch.ops.abkd_fast.row_losses, (student, *optional, gradient))
    torch.library.opcheck(torch.ops.abkd_fast.row_losses, (student, None, labels, 0, [], 1.0, 1.0, None))


def test_opcheck_divergence():
    student, teacher = logits(3, 9)
    labels = torch.tensor([1, -100, 4])
    for need in (True, False):
        z = student.detach().requires_grad_(need)
        torch.library.opcheck(
            torch.ops.abkd_fast.divergence, (z, teacher, labels, 1, [0.2, 0.7], 2.0, 0.3, need), rtol=0, atol=0
        )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend, dynamic, monkeypatch, tmp_path):
    if backend == "inductor" and dynamic:
        pytest.skip("compiled once with inductor is enough, for time")
    # Inductor's cache on disk does not notice when an operator of ours changes.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()

    def loss(z, y, labels):
        return divergence_loss(z * 2, y, AlphaBeta(), labels, temperature=2.0, hard_weight=0.3)

    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows in (3, 5) if dynamic else (3,):
        student, teacher = logits(rows, 50)
        labels = torch.tensor([1, -100, 4, 0, 2])[:rows]
        results = []
        for run in (loss, compiled):
            z = student.clone().requires_grad_()
            value = run(z, teacher, labels)
            value.backward()
            results.append((value.detach(), z.grad))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


def test_double_backward_is_refused():
    student, teacher = logits(3, 9)
    loss = divergence_loss(student.requires_grad_(), teacher, AlphaBeta())
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_no_grad_needs_no_gradient():
    student, teacher = logits(3, 9)
    expected = divergence_loss(student, teacher, AlphaBeta())
    with torch.no_grad():
        loss = divergence_loss(student.requires_grad_(), teacher, AlphaBeta())
    assert not loss.requires_grad
    assert torch.equal(loss, expected)


def test_same_bits_twice():
    student, teacher = oracle.gpt2_like_logits(9, 5003)
    first, second = (kernel(student, teacher, 0.2, 0.7) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_rows_do_not_depend_on_their_neighbours():
    student, teacher = oracle.gpt2_like_logits(9, 5003)
    losses, gradient = kernel(student, teacher, 0.2, 0.7)
    alone = kernel(student[4:5], teacher[4:5], 0.2, 0.7)
    assert torch.equal(losses[4:5], alone[0])
    assert torch.equal(gradient[4:5], alone[1])


# ---- builds

VARIANT = """
import sys, torch, oracle, test_divergence, abkd_fast
results = {"simd": abkd_fast.build_info()["simd"]}
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    student, teacher = (x.to(dtype) for x in oracle.gpt2_like_logits(3, 5003))
    for point in oracle.GRID:
        results[str(dtype), point] = test_divergence.kernel(student, teacher, *point)
torch.save(results, sys.argv[1])
"""


@COMPILED
@pytest.mark.parametrize("simd", ["avx2", "baseline"])
def test_simd_variants(simd, tmp_path):
    capability = torch.backends.cpu.get_cpu_capability()
    if simd == "avx2" and capability not in ("AVX2", "AVX512"):
        pytest.skip(f"this processor has {capability}")
    environment = {**os.environ, "ABKD_SIMD": simd, "PYTHONPATH": os.path.dirname(__file__)}
    subprocess.run([sys.executable, "-c", VARIANT, tmp_path / "results.pt"], env=environment, check=True)
    results = torch.load(tmp_path / "results.pt")
    assert results.pop("simd") == simd
    bounds = {torch.float32: FLOAT32, torch.float64: FLOAT64, torch.bfloat16: 2**-8}
    for dtype, bound in bounds.items():
        student, teacher = (x.to(dtype) for x in oracle.gpt2_like_logits(3, 5003))
        for point in oracle.GRID:
            for got, expected in zip(results[str(dtype), point], kernel(student, teacher, *point), strict=True):
                assert oracle.relative_errors(got, expected).max() < bound


def test_reference_takes_over_where_the_extension_is_missing(monkeypatch):
    student, teacher = oracle.gpt2_like_logits(4, 1003)
    options = {"labels": torch.tensor([1, -100, 4, 1002]), "temperature": 2.0, "hard_weight": 0.3}
    expected = kernel(student, teacher, 0.2, 0.7, **options)
    monkeypatch.setattr(ops, "_C", None)
    monkeypatch.setattr(ops, "_MISSING", "no such file", raising=False)
    monkeypatch.setattr(ops, "_warned", set())
    with pytest.warns(RuntimeWarning, match="no such file") as caught:
        (losses, gradient), _ = (kernel(student, teacher, 0.2, 0.7, **options) for _ in range(2))
    assert len(caught) == 1
    assert abkd_fast.build_info()["missing"] == "no such file"
    torch.testing.assert_close(losses, expected[0], rtol=FLOAT32, atol=0)
    torch.testing.assert_close(gradient, expected[1], rtol=FLOAT32, atol=1e-6)
    in_place = student.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.row_losses(in_place, teacher, options["labels"], AlphaBeta(), 2.0, 0.3, gradient=in_place)
    assert torch.equal(in_place, gradient)


# ---- the catalogue


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ab", AlphaBeta(0.2, 0.7)),
        ("ab:1,0", AlphaBeta(1.0, 0.0)),
        ("ab:0.5", AlphaBeta(0.5, 0.7)),
        ("ab:-.3,3e-1", AlphaBeta(-0.3, 0.3)),
    ],
)
def test_parse(text, expected):
    assert parse(text) == expected
    assert parse(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("abc:1,0", '"abc".*did you mean "ab"'),
        ("", 'did you mean "ab"'),
        ("ab:1,0,3", "at most 2 numbers"),
        ("ab:one", "expected numbers"),
        ("ab:1,", "expected numbers"),
        ("ab:nan,1", "alpha is nan"),
        ("ab:1,inf", "beta is inf"),
    ],
)
def test_parse_errors(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_alpha_beta_is_finite():
    with pytest.raises(ValueError, match="alpha is nan"):
        AlphaBeta(math.nan, 0.0)
    assert divergences.AlphaBeta().parameters == [0.2, 0.7]
