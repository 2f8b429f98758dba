import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from abkd_fast import (
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
    divergence_loss,
    parse,
)
from abkd_fast.losses import reference, row_ops
from abkd_fast.losses.arguments import LossSpec, Rows
from abkd_fast.losses.reference import STATE
from oracle import ALPHA_BETA, FAMILIES, gpt2_like_logits, mild_logits, relative_errors
from row_kernels import ALL, FLOAT32, FLOAT64, assert_close, by_reference, kernel

ONE_OF_EACH_KERNEL = [
    "ab:0.2,0.7",
    "hellinger",
    "ab:0.5,-0.5",
    "wsd:0.3",
    "jsd:0.1",
    "bdkd",
    "akl",
    "alphanet:0.2,0.8,batch",
    "tvd",
]


def assert_close_to_oracle(student, teacher, divergence, **options):
    kind = parse(divergence) if isinstance(divergence, str) else divergence
    kept = slice(None) if options.get("labels") is None else options["labels"] != -100
    expected = [x[kept] for x in oracle.evaluate(student, teacher, kind, **options)]
    assert_close([x[kept] for x in kernel(student, teacher, kind, **options)], expected, FLOAT32)


# ---- values and gradients


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 3), (64, 3), (7, 32000), (2, 50257), (1, 151936)])
def test_kernel_agrees_with_oracle(rows, vocab, divergence):
    make = mild_logits if vocab == 3 else gpt2_like_logits
    assert_close_to_oracle(*make(rows, vocab), divergence)


@pytest.mark.parametrize(
    ("divergence", "vocab"),
    [*itertools.product(["ab:0.2,0.7", "ab:0,0", "ab:-0.3,0.3"], [32000, 50257]), ("ab:0,0", 151936)],
)
def test_kernel_agrees_on_many_long_rows(vocab, divergence):
    # If alpha + beta = 0 all tokens count the same, and in some of 64 rows the slopes nearly cancel in their sum. It
    # then shows the rounding errors that all tokens share. The reference stands in for the oracle, which would take
    # minutes.
    student, teacher = gpt2_like_logits(64, vocab, seed=5)
    expected = by_reference(student.double(), teacher.double(), parse(divergence))
    assert_close(kernel(student, teacher, divergence), expected, FLOAT32)


@pytest.mark.parametrize("delta", [1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize(("rows", "vocab"), [(7, 3), (2, 32000)])
def test_kernel_agrees_with_oracle_near_every_limit(rows, vocab, delta):
    student, teacher = (mild_logits if vocab == 3 else gpt2_like_logits)(rows, vocab, seed=1)
    for point in oracle.neighbors(delta):
        assert_close_to_oracle(student, teacher, AlphaBeta(*point))


MIXTURES = [f"{name}:{weight}" for name in ("jsd", "sfkl", "srkl") for weight in (0.01, 0.1, 0.5, 0.9, 0.99)]
# AlphaNet per batch is left out: it measures both branches in one pass, with slopes that are not centered.
ALPHAS = ["hellinger", "alpha:0.3", "alpha:0.8", "ab:0.4,0.6", "alphanet:0.2,0.8,token"]


@pytest.mark.parametrize("divergence", [*MIXTURES, *ALPHAS, "tvd", "fkl", "rkl", "wsd:0.3", "bdkd", "akl"])
def test_kernel_agrees_where_distributions_hardly_overlap(divergence):
    # The slopes of bounded divergences are nearly a multiple of q there, which cancels in the gradient.
    assert_close_to_oracle(*oracle.independent_logits(4, 50257), divergence)


SOME_CENTERED = ["jsd:0.01", "jsd:0.1", "jsd:0.5", "jsd:0.9", "sfkl:0.1", "srkl:0.1", "tvd", "hellinger", "alpha:0.3"]


@pytest.mark.parametrize("divergence", [*SOME_CENTERED, "alpha:0.8", "alphanet:0.2,0.8,token"])
def test_centered_slopes_are_those_of_some_rows_only(divergence):
    # Rows of both kinds in one call, and rows between: the likeliest token has more and more in common.
    student, teacher = oracle.independent_logits(16, 4001)
    teacher = torch.lerp(teacher, student, torch.linspace(0, 1.1, 16)[:, None])
    assert_close_to_oracle(student, teacher, divergence)
    if row_ops._C is not None:
        statistics = row_ops.measure_rows(Rows(student, teacher, None, LossSpec(parse(divergence))))[1]
        assert 0 < statistics[..., STATE].mean() < 1


@pytest.mark.parametrize("temperature", [0.7, 1.7, 3.0])
def test_akl_has_its_likeliest_token_in_the_head_at_any_temperature(temperature):
    student, teacher = gpt2_like_logits(64, 5003)
    teacher[:, 0] += 16 * temperature
    student[:, 0] += 12 * temperature
    rows = Rows(student, teacher, None, LossSpec(parse("akl"), temperature))
    expected = reference.row_losses(Rows(student.double(), teacher.double(), None, rows.spec))
    assert relative_errors(row_ops.row_losses(rows), expected).max() < 1e-3  # without that token 0.5 and more


@pytest.mark.parametrize("divergence", ALL)
def test_tolerance_notices_small_errors(divergence):
    student, teacher = gpt2_like_logits(2, 1000)
    for expected in oracle.evaluate(student, teacher, parse(divergence)):
        for wrong in (torch.zeros_like(expected), expected * 1.001, expected.float() * (1 + 2e-4)):
            assert relative_errors(wrong, expected).min() > FLOAT32


@pytest.mark.parametrize("divergence", [*ALL, *(AlphaBeta(*point) for point in oracle.neighbors(1e-5))], ids=str)
def test_float64_kernel_and_reference_agree_with_oracle(divergence):
    kind = parse(divergence) if isinstance(divergence, str) else divergence
    student, teacher = (x.double() for x in gpt2_like_logits(2, 4001, seed=3))
    if kind == AlphaNet(per="batch"):
        kind = AlphaNet(per="token")  # the reference decides row by row
    expected = oracle.evaluate(student, teacher, kind)
    assert_close(kernel(student, teacher, kind), expected, FLOAT64)
    assert_close(by_reference(student, teacher, kind), expected, FLOAT64)


@pytest.mark.parametrize("divergence", [x for x in ALL if x != "alphanet:0.2,0.8,batch"])
@pytest.mark.parametrize(("make", "rows", "vocab"), [(mild_logits, 64, 3), (gpt2_like_logits, 3, 4001)])
def test_float32_reference_agrees_with_oracle(make, rows, vocab, divergence):
    student, teacher = make(rows, vocab)
    expected = oracle.evaluate(student, teacher, parse(divergence))
    assert_close(by_reference(student, teacher, parse(divergence)), expected, FLOAT32)


@pytest.mark.parametrize("divergence", ONE_OF_EACH_KERNEL)
@pytest.mark.parametrize(("temperature", "hard_weight"), [(0.5, 0.3), (2.0, 0.0), (1.0, 0.3), (2.0, 1.0)])
def test_labels_temperature_and_hard_weight(divergence, temperature, hard_weight):
    student, teacher = gpt2_like_logits(6, 1003)
    labels = torch.tensor([0, -100, 1002, 17, -100, 5])
    options = {"labels": labels, "temperature": temperature, "hard_weight": hard_weight}
    assert_close_to_oracle(student, teacher, divergence, **options)
    losses, gradient = kernel(student, teacher, divergence, **options)
    assert losses[[1, 4]].eq(0).all()
    assert gradient[[1, 4]].eq(0).all()
    mean = divergence_loss(student, teacher, parse(divergence), **options)
    assert mean.item() == pytest.approx(losses.double().sum().item() / 4, rel=FLOAT32)


@pytest.mark.parametrize("divergence", FAMILIES)
def test_equal_distributions(divergence):
    student, _ = gpt2_like_logits(3, 5000)
    for result in kernel(student, student, divergence):
        assert result.eq(0).all()
    # The shift leaves a rounding error of 2^-24 * 35 per token. It enters |p - q| once, and other divergences squared.
    shifted, _ = kernel(student + 1.0, student, divergence)
    assert 0 <= shifted.min() <= shifted.max() < (5e-6 if divergence == "tvd" else 1e-10)


@pytest.mark.parametrize("divergence", ALPHA_BETA)
def test_equal_distributions_of_alpha_beta(divergence):
    student, _ = gpt2_like_logits(3, 5000)
    for result in kernel(student, student, divergence):
        assert result.eq(0).all()


@pytest.mark.parametrize("divergence", ALL)
def test_one_token_vocabulary(divergence):
    for result in kernel(*mild_logits(3, 1), divergence, labels=torch.zeros(3, dtype=torch.long), hard_weight=0.5):
        assert result.eq(0).all()


# ---- types, layouts, sizes


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits(divergence, dtype):
    student, teacher = (x.to(dtype) for x in gpt2_like_logits(3, 2001))
    expected = kernel(student.float(), teacher.float(), divergence)
    losses, gradient = kernel(student, teacher, divergence)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, expected[0])
    assert torch.equal(gradient, expected[1].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("divergence", ["ab:0.2,0.7", "akl", "alphanet:0.2,0.8,batch"])
def test_strided_logits(divergence, dtype):
    student, teacher = mild_logits(6, 50, dtype)
    labels = torch.tensor([3, -100, 0, 49, 1, 2])
    expected = kernel(student, teacher, divergence, labels=labels, hard_weight=0.2)
    wide = torch.full((6, 77), 99.0, dtype=dtype)
    wide[:, :50] = student
    layouts = [wide[:, :50], student.T.contiguous().T, student.repeat_interleave(2, 0)[::2]]
    labels = labels.repeat_interleave(3)[::3]
    for student_view in layouts:
        for teacher_view in (teacher, teacher.T.contiguous().T):
            z = student_view.detach().requires_grad_()
            options = {"hard_weight": 0.2, "reduction": "none"}
            losses = divergence_loss(z, teacher_view, parse(divergence), labels, **options)
            losses.sum().backward()
            assert torch.equal(losses.detach(), expected[0])
            assert torch.equal(z.grad, expected[1])


def test_expanded_rows():
    student, teacher = mild_logits(1, 50)
    expected, _ = kernel(student, teacher, "ab")
    losses, _ = kernel(student.repeat(4, 1), teacher.expand(4, 50), "ab")
    assert torch.equal(losses, expected.expand(4))


@pytest.mark.parametrize(("student_vocab", "teacher_vocab"), [(40, 64), (64, 40)])
def test_padded_vocabularies(student_vocab, teacher_vocab):
    student, teacher = mild_logits(4, 64)
    expected = kernel(student[:, :40], teacher[:, :40], "akl")
    losses, gradient = kernel(student[:, :student_vocab], teacher[:, :teacher_vocab], "akl")
    assert torch.equal(losses, expected[0])
    assert torch.equal(gradient[:, :40], expected[1])
    assert gradient[:, 40:].eq(0).all()


@pytest.mark.parametrize("divergence", ALL)
def test_rows_do_not_depend_on_their_neighbors(divergence):
    student, teacher = gpt2_like_logits(9, 2503)
    if divergence == "alphanet:0.2,0.8,batch":
        pytest.skip("its rows decide together")
    for together, alone in zip(
        kernel(student, teacher, divergence), kernel(student[4:5], teacher[4:5], divergence), strict=True
    ):
        assert torch.equal(together[4:5], alone)


# ---- AKL's head and AlphaNet's branch


def share_of_the_head(student, teacher, mu):
    """The weight of KL(p, q) that the kernel has decided for each row."""
    statistics = torch.zeros(len(student), row_ops.STATISTICS, dtype=torch.float64)
    row_ops.row_losses(Rows(student, teacher, None, LossSpec(parse(f"akl:{mu}"))), statistics=statistics)
    return statistics[:, 4]


def shares(student, teacher, head):
    gap = (teacher.double().softmax(1) - student.double().softmax(1)).abs()
    return (gap * head).sum(1) / gap.sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("p", "mu", "head"),
    [
        ([0.3, 0.2, 0.2, 0.2, 0.1], 0.6, [1, 0, 0, 0, 0]),  # the second of three that tie no longer fits
        ([0.3, 0.2, 0.2, 0.2, 0.1], 0.95, [1, 1, 1, 1, 0]),
        ([0.4, 0.4, 0.1, 0.05, 0.05], 0.5, [1, 1, 0, 0, 0]),  # the two likeliest do not fit, but one must be in
        ([0.2, 0.2, 0.2, 0.2, 0.2], 0.3, [1, 1, 1, 1, 1]),
        ([0.9, 0.04, 0.03, 0.02, 0.01], 0.5, [1, 0, 0, 0, 0]),  # beyond mu, but one token must be in
        ([0.5, 0.25, 0.15, 0.05, 0.05], 1e-6, [1, 0, 0, 0, 0]),
        ([0.5, 0.25, 0.15, 0.06, 0.04], 1 - 1e-6, [1, 1, 1, 1, 0]),
    ],
)
def test_head_of_akl(p, mu, head, dtype):
    teacher = torch.tensor([p, p[::-1]], dtype=torch.float64).log().to(dtype)  # equal numbers have equal logarithms
    student = mild_logits(1, 5, dtype)[0].repeat(2, 1)
    expected = shares(student, teacher, torch.tensor([head, head[::-1]]))
    bound = FLOAT32 if dtype == torch.float32 else FLOAT64
    torch.testing.assert_close(share_of_the_head(student, teacher, mu), expected, rtol=bound, atol=0)


def test_head_of_akl_among_many_ties():
    # 2001 logits in steps of 1 / 4 have about 60 different values, so nearly every boundary is a tie.
    student, teacher = gpt2_like_logits(6, 2001)
    teacher = (teacher * 4).round() / 4
    for mu in (1e-9, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999):
        p, q = (x.double().softmax(1).tolist() for x in (teacher, student))
        expected = torch.tensor([oracle.head_share(*row, mu) for row in zip(p, q, strict=True)], dtype=torch.float64)
        assert_close([share_of_the_head(student, teacher, mu)], [expected], FLOAT32)


def test_no_head_counts_more_where_distributions_are_equal():
    student, _ = mild_logits(3, 9)
    assert share_of_the_head(student, student, 0.5).eq(0.5).all()


def branches(student, teacher):
    return [kernel(student, teacher, AlphaDivergence(alpha)) for alpha in (0.2, 0.8)]


def test_alphanet_per_token_takes_the_larger_of_each_row():
    student, teacher = mild_logits(64, 5)
    first, second = branches(student, teacher)
    takes_first = first[0] > second[0]
    assert 10 < takes_first.sum() < 54
    losses, gradient = kernel(student, teacher, "alphanet:0.2,0.8,token")
    assert_close([losses], [torch.maximum(first[0], second[0])], FLOAT32)
    assert_close([gradient], [torch.where(takes_first[:, None], first[1], second[1])], FLOAT32)


@pytest.mark.parametrize("hard_weight", [0.0, 0.3])
def test_alphanet_per_batch_takes_one_branch_that_ignored_rows_do_not_choose(hard_weight):
    student, teacher = mild_logits(64, 5)
    first, second = branches(student, teacher)
    for chosen, votes in ((0, first[0] > second[0]), (1, first[0] < second[0])):
        minority = (~votes).nonzero()[:1, 0]  # one row that would choose the other branch by itself
        counts = votes.clone()
        counts[minority] = True
        labels = torch.where(counts, 2, -100)
        assert (first[0] - second[0])[counts].sum() * (1 - 2 * chosen) > 0
        options = {"labels": labels, "hard_weight": hard_weight}
        got = kernel(student, teacher, AlphaNet(0.2, 0.8, "batch"), **options)
        expected = kernel(student, teacher, AlphaDivergence((0.2, 0.8)[chosen]), **options)
        assert_close([x[counts] for x in got], [x[counts] for x in expected], FLOAT32)
        assert all(x[~counts].eq(0).all() for x in got)


# ---- reductions


@pytest.mark.parametrize("divergence", ["ab", "alphanet:0.2,0.8,batch"])
def test_reductions_and_upstream_gradients(divergence):
    student, teacher = mild_logits(5, 40, torch.float64)
    labels = torch.tensor([1, -100, 3, 4, 5])
    rows, gradient = kernel(student, teacher, divergence, labels=labels)
    weights = torch.randn(5, dtype=torch.float64)
    for reduction, weight, expected in (("sum", 3.0, 3.0), ("mean", -2.0, -0.5), ("none", weights, weights[:, None])):
        z = student.clone().requires_grad_()
        loss = divergence_loss(z, teacher, parse(divergence), labels, reduction=reduction)
        torch.testing.assert_close(loss.detach(), {"sum": rows.sum(), "mean": rows.sum() / 4, "none": rows}[reduction])
        (loss * weight).sum().backward()
        torch.testing.assert_close(z.grad, gradient * expected)


@pytest.mark.parametrize("divergence", ["ab", "bdkd", "alphanet:0.2,0.8,batch"])
def test_everything_ignored(divergence):
    student, teacher = (x.requires_grad_() for x in mild_logits(3, 9))
    for reduction in ("mean", "sum", "none"):
        labels = torch.full((3,), -100)
        loss = divergence_loss(student, teacher, parse(divergence), labels, hard_weight=0.5, reduction=reduction)
        assert loss.eq(0).all()
        assert torch.autograd.grad(loss.sum(), student)[0].eq(0).all()


@pytest.mark.parametrize("divergence", ["ab", "akl", "alphanet:0.2,0.8,batch"])
def test_no_rows(divergence):
    student = torch.zeros(0, 5, requires_grad=True)
    loss = divergence_loss(student, torch.zeros(0, 5), parse(divergence))
    loss.backward()
    assert loss.item() == 0
    assert student.grad.shape == (0, 5)
    assert divergence_loss(student, torch.zeros(0, 5), parse(divergence), reduction="none").shape == (0,)


# ---- properties

ROWS = st.integers(0, 2**31)
# Numbers that are not subnormal in float32. Smaller ones have a test of their own.
COORDINATES = st.floats(-1, 1.5).map(lambda x: x if abs(x) > 1e-30 else 0.0)
POINTS = st.builds(AlphaBeta, COORDINATES, COORDINATES)
INSIDE = st.floats(1e-3, 1 - 1e-3)
PAIRS = st.one_of(  # a divergence, and the divergence with teacher and student exchanged
    POINTS.map(lambda x: (x, AlphaBeta(x.beta, x.alpha))),
    st.just((ForwardKL(), ReverseKL())),
    st.just((BDKD(), BDKD())),
    st.just((TotalVariation(), TotalVariation())),
    st.just((Hellinger(), Hellinger())),
    INSIDE.map(lambda x: (WSD(x), WSD(1 - x))),
    INSIDE.map(lambda x: (JensenShannon(x), JensenShannon(1 - x))),
    INSIDE.map(lambda x: (SkewForwardKL(x), SkewReverseKL(x))),
    COORDINATES.map(lambda x: (AlphaDivergence(x), AlphaDivergence(1 - x))),
    st.tuples(INSIDE, INSIDE, st.sampled_from(["batch", "token"])).map(
        lambda x: (AlphaNet(*x), AlphaNet(1 - x[0], 1 - x[1], x[2]))
    ),
)
AKLS = INSIDE.map(lambda mu: (parse(f"akl:{mu}"), None))
few = settings(max_examples=100, deadline=None, derandomize=True)


@few
@given(seed=ROWS, pair=st.one_of(PAIRS, AKLS), vocab=st.integers(2, 70))
def test_properties(seed, pair, vocab):
    divergence, dual = pair
    student, teacher = mild_logits(3, vocab, torch.float64, seed)
    losses, gradient = kernel(student, teacher, divergence)
    assert losses.gt(0).all()
    assert (gradient.sum(1).abs() <= 1e-11 * gradient.abs().sum(1)).all()

    shifted = kernel(student + 3.0, teacher - 5.0, divergence)
    assert_close(shifted, (losses, gradient), FLOAT64)

    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))
    permuted = kernel(student[:, order], teacher[:, order], divergence)
    assert_close(permuted, (losses, gradient[:, order]), FLOAT64)

    if dual is not None:
        assert_close([kernel(teacher, student, dual)[0]], [losses], FLOAT64)


@few
@given(seed=ROWS, pair=st.one_of(PAIRS, AKLS))
def test_float32_agrees_with_float64_everywhere(seed, pair):
    student, teacher = mild_logits(3, 50, torch.float32, seed)
    assert_close(kernel(student, teacher, pair[0]), kernel(student.double(), teacher.double(), pair[0]), FLOAT32)


@few
@given(seed=ROWS, pair=st.one_of(PAIRS, AKLS), scale=st.sampled_from([1e-6, 1e-3, 1.0, 30.0]))
def test_never_negative(seed, pair, scale):
    student, teacher = mild_logits(4, 40, torch.float32, seed)
    close = teacher + scale * (student - teacher)
    for dtype in (torch.float32, torch.bfloat16):
        losses, gradient = kernel(close.to(dtype), teacher.to(dtype), pair[0])
        assert losses.ge(0).all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_subnormal_parameters_are_like_0(dtype):
    student, teacher = mild_logits(3, 50, dtype)
    for tiny in (1e-39, 1e-46, 1e-309):
        for point, limit in (((tiny, 1.0), (0.0, 1.0)), ((1.0, tiny), (1.0, 0.0)), ((tiny, tiny), (0.0, 0.0))):
            got, expected = (kernel(student, teacher, AlphaBeta(*x)) for x in (point, limit))
            assert_close(got, expected, FLOAT32)


# ---- arguments


def test_different_vocabularies_are_refused():
    with pytest.raises(ValueError, match=r"32000.*50257"):
        divergence_loss(torch.zeros(1, 32000), torch.zeros(1, 50257), AlphaBeta())


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        ((3, 5), (4, 5), {}, r"\[3, 5\] and \[4, 5\]"),
        ((5,), (5,), {}, r"\[5\]"),
        ((2, 3, 4, 5), (2, 3, 4, 5), {}, r"\[2, 3, 4, 5\]"),
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
