import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from abkd_fast import (
    AKL,
    BDKD,
    WSD,
    AlphaBeta,
    AlphaDivergence,
    AlphaNet,
    ForwardKL,
    Hellinger,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    parse,
)
from abkd_fast.losses.divergences import BY_NAME, CrossEntropy, Family
from oracle import mild_logits, relative_errors
from row_kernels import FLOAT64, kernel

SPELLINGS = [
    ("ab", AlphaBeta(0.2, 0.7)),
    ("ab:1,0", AlphaBeta(1.0, 0.0)),
    ("ab:0.5", AlphaBeta(0.5, 0.7)),
    ("ab:-.3,3e-1", AlphaBeta(-0.3, 0.3)),
    ("fkl", ForwardKL()),
    ("rkl", ReverseKL()),
    ("wsd", WSD(0.5)),
    ("wsd:0", WSD(0.0)),
    ("wsd:1", WSD(1.0)),
    ("bdkd", BDKD()),
    ("jsd", JensenShannon(0.1)),
    ("jsd:0.9", JensenShannon(0.9)),
    ("akl", AKL(0.5)),
    ("akl:1e-6", AKL(1e-6)),
    ("tvd", TotalVariation()),
    ("sfkl", SkewForwardKL(0.1)),
    ("srkl:0.25", SkewReverseKL(0.25)),
    ("alphanet", AlphaNet(0.2, 0.8, "token")),
    ("alphanet:0.3", AlphaNet(0.3, 0.8, "token")),
    ("alphanet:0.2,0.8,token", AlphaNet(0.2, 0.8, "token")),
    ("alphanet: 0.1, 2, batch", AlphaNet(0.1, 2.0, "batch")),
    ("hellinger", Hellinger()),
    ("alpha", AlphaDivergence(0.5)),
    ("alpha:-1", AlphaDivergence(-1.0)),
]


@pytest.mark.parametrize(("text", "expected"), SPELLINGS)
def test_parse(text, expected):
    assert parse(text) == expected
    assert parse(str(expected)) == expected


def test_every_name_is_spelled():
    assert {type(divergence) for _, divergence in SPELLINGS} == set(BY_NAME.values())
    assert all(parse(name) == divergence() for name, divergence in BY_NAME.items())


def test_spelling():
    spelled = [str(x) for x in (AlphaBeta(1.0, -0.25), ForwardKL(), AlphaNet(0.2, 0.8, "token"), AKL(1e-7))]
    assert spelled == ["ab:1,-0.25", "fkl", "alphanet:0.2,0.8,token", "akl:1e-07"]


ANY, INSIDE = st.floats(allow_nan=False, allow_infinity=False), st.floats(0, 1, exclude_min=True, exclude_max=True)


# The operators take a divergence as its spelling, so that no digit may get lost.
@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.one_of(
        st.builds(AlphaBeta, ANY, ANY),
        st.builds(AlphaDivergence, ANY),
        st.builds(AlphaNet, ANY, ANY, st.sampled_from(["batch", "token"])),
        st.builds(WSD, st.floats(0, 1)),
        *(st.builds(kind, INSIDE) for kind in (AKL, JensenShannon, SkewForwardKL, SkewReverseKL)),
    )
)
def test_spelling_keeps_every_digit(divergence):
    again = parse(str(divergence))
    assert again == divergence
    assert again.parameters == divergence.parameters


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("abc:1,0", 'loss "abc:1,0".*"abc".*did you mean "ab"'),
        ("", 'unknown divergence ""'),
        ("FKL", "known are ab, fkl"),
        ("helinger", 'did you mean "hellinger"'),
        ("cross_entropy", "unknown divergence"),
        ("ab:1,0,3", r"at most 2 values \(alpha, beta\) after the name, got 3"),
        ("fkl:1", "none after the name, got 1"),
        ("alphanet:1,2,token,4", "at most 3 values"),
        ("ab:one", 'expected numbers after the colon, as in "ab:0.2,0.7"'),
        ("ab:1,", "expected numbers"),
        ("ab:,1", "expected numbers"),
        ("alphanet:0.2,token", "expected numbers"),
        ("alphanet:0.2,0.8,row", 'per is "row", expected "batch" or "token"'),
        ("ab:nan,1", "alpha is nan"),
        ("ab:1,inf", "beta is inf"),
        ("alphanet:0.2,-inf", "alpha2 is -inf"),
        ("wsd:-0.1", "lam is -0.1"),
        ("wsd:1.1", "lam is 1.1"),
        ("wsd:nan", "lam is nan"),
        *((f"{name}:{value}", f"is {value}") for name in ("akl", "jsd", "sfkl", "srkl") for value in ("0.0", "1.0")),
    ],
)
def test_parse_errors(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize("kind", [x for x in BY_NAME.values() if dataclasses.fields(x)])
def test_only_finite_numbers(kind):
    with pytest.raises(ValueError, match="is nan, expected a finite number"):
        kind(math.nan)


@pytest.mark.parametrize("kind", [AKL, JensenShannon, SkewForwardKL, SkewReverseKL])
@pytest.mark.parametrize("value", [-0.5, 0.0, 1.0, 2.0])
def test_numbers_between_0_and_1(kind, value):
    with pytest.raises(ValueError, match=f"is {value}, expected a number between 0 and 1"):
        kind(value)


def test_parameters():
    assert AlphaBeta().parameters == [0.2, 0.7]
    assert AlphaDivergence(0.3).parameters == [0.3, 0.7]
    assert WSD(0.25).parameters == [0.75, 0.25]
    assert {x.family for x in (*BY_NAME.values(), CrossEntropy)} == set(Family)


# ---- the meaning of the parameters, as docstrings state it

STUDENT, TEACHER = mild_logits(4, 30, torch.float64)


def assert_same(divergence, other):
    for got, expected in zip(kernel(STUDENT, TEACHER, divergence), other, strict=True):
        assert relative_errors(got, expected).max() < FLOAT64


@pytest.mark.parametrize(
    ("divergence", "same"),
    [
        (ForwardKL(), AlphaBeta(1, 0)),
        (ReverseKL(), AlphaBeta(0, 1)),
        (WSD(0.0), ForwardKL()),
        (WSD(1.0), ReverseKL()),
        (Hellinger(), AlphaBeta(0.5, 0.5)),
        (AlphaDivergence(0.3), AlphaBeta(0.3, 0.7)),
        (AlphaDivergence(1.0), ForwardKL()),
        (AlphaDivergence(0.0), ReverseKL()),
        (AlphaNet(0.4, 0.4), AlphaDivergence(0.4)),
    ],
    ids=str,
)
def test_special_cases(divergence, same):
    assert_same(divergence, kernel(STUDENT, TEACHER, same))


def test_skew_divergences_approach_the_plain_ones():
    # KL(p, q) - KL(p, m) is about the teacher's share of m times the chi-squared distance, which is about 3 here.
    for skew, plain in ((SkewForwardKL(1e-6), ForwardKL()), (SkewReverseKL(1e-6), ReverseKL())):
        got, expected = kernel(STUDENT, TEACHER, skew)[0], kernel(STUDENT, TEACHER, plain)[0]
        assert relative_errors(got, expected).min() > 1e-7
        assert relative_errors(got, expected).max() < 1e-4


def test_jensen_shannon_is_the_weighted_sum_of_skew_divergences():
    forward, reverse = (kernel(STUDENT, TEACHER, x) for x in (SkewForwardKL(0.7), SkewReverseKL(0.3)))
    assert_same(JensenShannon(0.3), [0.7 * x + 0.3 * y for x, y in zip(forward, reverse, strict=True)])


def trl_generalized_jsd(student, teacher, beta):
    """TRL's GKDTrainer.generalized_jsd_loss, per token and without the temperature."""
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    if beta == 0:
        jsd = F.kl_div(student, teacher, reduction="none", log_target=True)
    elif beta == 1:
        jsd = F.kl_div(teacher, student, reduction="none", log_target=True)
    else:
        beta = torch.tensor(beta, dtype=student.dtype)
        mixture = torch.logsumexp(torch.stack([student + torch.log(1 - beta), teacher + torch.log(beta)]), dim=0)
        kl_teacher = F.kl_div(mixture, teacher, reduction="none", log_target=True)
        kl_student = F.kl_div(mixture, student, reduction="none", log_target=True)
        jsd = beta * kl_teacher + (1 - beta) * kl_student
    return jsd.sum(-1)


@pytest.mark.parametrize(
    ("divergence", "beta"), [(ForwardKL(), 0), (ReverseKL(), 1), (JensenShannon(0.1), 0.9), (JensenShannon(0.7), 0.3)]
)
def test_convention_of_trl(divergence, beta):
    z = STUDENT.clone().requires_grad_()
    losses = trl_generalized_jsd(z, TEACHER, beta)
    losses.sum().backward()
    assert_same(divergence, (losses, z.grad))
