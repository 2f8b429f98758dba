import math

import pytest
import torch

import oracle
from abkd_fast import parse
from oracle import ALPHA_BETA, FAMILIES, mild_logits
from row_kernels import ALL, FLOAT32, FLOAT64, by_reference, kernel

# Student rows and teacher rows. No pair is symmetric, so that AlphaNet's branches differ.
HUGE = (
    [[1e4, 0.0, -1e4], [0.0, 1e4, 5.0], [0.0, -1e4, 1.0], [1e4, 3.0, 9999.0]],
    [[1e4, 0.0, 1.0], [1e4, 0.0, 5.0], [-1e4, 0.0, 3.0], [9998.0, 1e4, 0.0]],
)


@pytest.mark.parametrize("divergence", [*FAMILIES, "ab:1,0", "ab:0,1", "ab:0.5,0.5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_gaps(divergence, dtype):
    same = {"ab:1,0": "fkl", "ab:0,1": "rkl", "ab:0.5,0.5": "hellinger"}
    for student, teacher in zip(*HUGE, strict=True):
        value, gradient = oracle.exact(student, teacher, parse(same.get(divergence, divergence)))
        got = kernel(*(torch.tensor([x], dtype=dtype) for x in (student, teacher)), divergence)
        # A gap of 1e4 has a rounding error of 1e4 eps. In float64 the log-normalizer has it too, and with it every
        # probability, which multiplies a gap. For float32 the log-normalizer has digits to spare.
        bound = (1e4 if dtype == torch.float32 else 1e8) * torch.finfo(dtype).eps
        assert got[0].item() == pytest.approx(value, abs=bound)
        assert got[1][0].tolist() == pytest.approx(gradient, abs=bound)


@pytest.mark.parametrize("divergence", [*ALPHA_BETA, "ab:0,0.7", "ab:-2,-1", "ab:3,2"])
def test_huge_gaps_of_alpha_beta(divergence):
    student, teacher = map(torch.tensor, HUGE)
    losses, gradient = kernel(student, teacher, divergence)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()
    kind = parse(divergence)
    if kind.alpha < 0 or kind.beta < 0 or kind.alpha + kind.beta == 0:
        return  # the terms saturate
    expected = by_reference(student.double(), teacher.double(), kind)[0]
    torch.testing.assert_close(losses.double(), expected, rtol=FLOAT32, atol=1e-30)
    by_oracle = oracle.row_losses(student, teacher, *kind.parameters, value=False)[1]
    assert ((gradient - by_oracle).norm(dim=1) <= FLOAT32 * by_oracle.norm(dim=1) + 1e-30).all()


@pytest.mark.parametrize("divergence", ["fkl", "rkl", "ab:1,0", "ab:0,1"])
def test_huge_gaps_in_closed_form(divergence):
    expected = torch.tensor([1e4, 5e3 - math.log(2)])
    student, teacher = torch.tensor([[1e4, 0.0], [0.0, 1e4]]), torch.tensor([[0.0, 1e4], [0.0, 0.0]])
    if divergence in ("rkl", "ab:0,1"):
        student, teacher = teacher, student
    losses, _ = kernel(student, teacher, divergence)
    torch.testing.assert_close(losses, expected, rtol=FLOAT32, atol=0)


@pytest.mark.parametrize("divergence", ALL)
def test_masked_logits_count_for_nothing(divergence):
    student, teacher = mild_logits(4, 60)
    kept = torch.arange(60) % 7 != 3
    options = {"labels": torch.zeros(4, dtype=torch.long), "hard_weight": 0.3, "temperature": 2.0}
    expected = kernel(student[:, kept], teacher[:, kept], divergence, **options)
    student[:, ~kept] = teacher[:, ~kept] = -torch.inf
    losses, gradient = kernel(student, teacher, divergence, **options)
    torch.testing.assert_close(losses, expected[0], rtol=FLOAT32, atol=0)
    torch.testing.assert_close(gradient[:, kept], expected[1], rtol=FLOAT32, atol=FLOAT32)
    assert gradient[:, ~kept].eq(0).all()


BOUNDED = [
    "jsd:0.1",
    "sfkl:0.1",
    "srkl:0.1",
    "tvd",
    "hellinger",
    "alpha:0.3",
    "alphanet:0.2,0.8,batch",
    "alphanet:0.2,0.8,token",
]
FULL, MASKED = [0.5, 1.0, -1.0], [0.3, -math.inf, 1.0]


@pytest.mark.parametrize("of", ["kernel", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("divergence", "student", "teacher"),
    [(x, *pair) for x in BOUNDED for pair in ((MASKED, FULL), (FULL, MASKED))]
    + [("fkl", FULL, MASKED), ("rkl", MASKED, FULL)],
)
def test_logits_masked_on_one_side(divergence, student, teacher, dtype, of):
    value, gradient = oracle.exact(student, teacher, parse(divergence))
    rows = [torch.tensor([x], dtype=dtype) for x in (student, teacher)]
    got = kernel(*rows, divergence) if of == "kernel" else by_reference(*rows, parse(divergence))
    bound = FLOAT32 if dtype == torch.float32 else FLOAT64
    assert got[0].item() == pytest.approx(value, rel=bound)
    assert got[1][0].tolist() == pytest.approx(gradient, abs=bound)


@pytest.mark.parametrize(
    ("divergence", "student", "teacher"),
    [(x, *pair) for x in ("wsd", "bdkd", "akl") for pair in ((MASKED, FULL), (FULL, MASKED))]
    + [("fkl", MASKED, FULL), ("rkl", FULL, MASKED)],
)
def test_infinite_divergences_are_huge_numbers(divergence, student, teacher):
    assert oracle.exact(student, teacher, parse(divergence))[0] == math.inf
    losses, gradient = kernel(torch.tensor([student]), torch.tensor([teacher]), divergence)
    assert losses.item() > 1e25
    assert gradient.isfinite().all()


@pytest.mark.parametrize("divergence", ALL)
def test_rows_of_minus_infinity_stay_finite(divergence):
    student, teacher = mild_logits(2, 10)
    student[0] = teacher[0] = -torch.inf
    for result in kernel(student, teacher, divergence):
        assert result.isfinite().all()


@pytest.mark.parametrize("divergence", [x for x in ALL if x != "alphanet:0.2,0.8,batch"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_logits_make_nan_losses(divergence, side):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        student, teacher = mild_logits(3, 33, dtype)
        (student if side == "student" else teacher)[1, 20] = torch.nan
        losses, _ = kernel(student, teacher, divergence)
        assert losses.isnan().tolist() == [False, True, False]
