"""The divergence over the teacher's likeliest tokens and one outcome for all others."""

import pytest
import torch

import oracle
from abkd_fast import ForwardKL, ReverseKL, fused_linear_divergence, fused_linear_top_k
from abkd_fast.divergences import parse

ROWS, WIDTH, VOCAB = 21, 8, 60
LOSSES = [*oracle.ALPHA_BETA, *oracle.FAMILIES]


def models(dtype=torch.float64, seed=0):
    """Hidden states, projection and bias of the student; the teacher's logits; labels, of which some don't count."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (ROWS, WIDTH), (VOCAB, WIDTH), (VOCAB,), (ROWS, VOCAB)
    *student, logits = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    labels = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    labels[::5] = -100
    return [x.requires_grad_() for x in student], 2 * logits, labels


def likeliest(logits, k):
    log_probs, ids = logits.log_softmax(1).topk(k)
    return ids, log_probs


def gradients(loss, student):
    return torch.autograd.grad(loss, student)


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_the_divergence_over_the_outcomes(name):
    (hidden, weight, bias), logits, labels = models()
    ids, log_probs = likeliest(logits, 7)
    ids[3, 4:] = -1  # of this row four tokens are known, and of the next one
    ids[4, 1:] = -1
    log_probs[4, 1:] = 9.0  # what stands there does not matter
    options = {"student_bias": bias, "student_logit_scale": 0.7, "student_softcap": 5.0, "hard_weight": 0.3}
    losses = fused_linear_top_k(
        hidden, weight, ids, log_probs, parse(name), labels, **options, reduction="none", chunk_tokens=16
    )
    upstream = torch.linspace(0.5, 2, ROWS, dtype=torch.float64)
    ours = gradients((losses * upstream).sum(), (hidden, weight, bias))

    log_q = (5 * (0.7 * (hidden @ weight.T + bias) / 5).tanh()).log_softmax(1)
    is_known = torch.zeros(ROWS, VOCAB + 1, dtype=torch.bool).scatter(1, ids % (VOCAB + 1), True)[:, :-1]
    rest = [x.masked_fill(is_known, -torch.inf).logsumexp(1, keepdim=True) for x in (log_q, logits.log_softmax(1))]
    outcomes = [torch.cat(pair, 1) for pair in zip((log_q, logits.log_softmax(1)), rest, strict=True)]
    is_outcome = torch.nn.functional.pad(is_known, (0, 1), value=True)
    student, teacher = (x.masked_fill(~is_outcome, -200) for x in outcomes)
    expected, slope = oracle.evaluate(student, teacher, parse(name), labels)
    kept = labels != -100
    cross_entropy = torch.nn.functional.nll_loss(log_q[kept], labels[kept], reduction="none")
    torch.testing.assert_close(losses[kept], 0.7 * expected[kept] + 0.3 * cross_entropy, rtol=1e-8, atol=1e-12)
    assert not losses[~kept].any()
    objective = 0.7 * (student * slope.masked_fill(~is_outcome, 0) * upstream[:, None]).sum()
    objective = objective + 0.3 * (cross_entropy * upstream[kept]).sum()
    for mine, theirs in zip(ours, gradients(objective, (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-5), (torch.float64, 1e-11)])
def test_with_the_whole_vocabulary_it_is_the_dense_loss(dtype, rtol):
    student, logits, labels = models(dtype)
    ids = torch.stack([torch.randperm(VOCAB) for _ in range(ROWS)])
    log_probs = logits.log_softmax(1).gather(1, ids)
    teacher = logits, torch.eye(VOCAB, dtype=dtype)
    more = {"student_softcap": 3.0, "hard_weight": 0.4, "reduction": "sum", "scale": 0.5}
    for number, name in enumerate(LOSSES):
        options = {"student_bias": student[2], **(more if number % 2 else {})}
        ours = fused_linear_top_k(*student[:2], ids, log_probs, parse(name), labels, **options)
        dense = fused_linear_divergence(*student[:2], *teacher, parse(name), labels, **options)
        torch.testing.assert_close(ours, dense, rtol=rtol, atol=0)
        for mine, theirs in zip(gradients(ours, student), gradients(dense, student), strict=True):
            assert (mine - theirs).norm() <= rtol * theirs.norm(), name


def test_gradients_are_those_of_finite_differences():
    student, logits, labels = models()
    ids, log_probs = likeliest(logits, 5)

    def loss(*student):
        options = {"student_bias": student[2], "student_softcap": 4.0, "hard_weight": 0.2, "chunk_tokens": 16}
        return fused_linear_top_k(*student[:2], ids, log_probs, parse("ab:0.2,0.7"), labels, **options)

    assert torch.autograd.gradcheck(loss, student, fast_mode=True)


def test_a_rest_that_is_next_to_nothing_keeps_its_digits():
    """With logits of the others 500 below, their probability is no number of float32, and its logarithm is one."""
    weight = torch.eye(4)
    student = torch.tensor([[0.0, 0.0, -500.0, -500.0]], requires_grad=True)
    ids = torch.tensor([[1, 0]])
    log_probs = torch.tensor([[0.4, 0.4]]).log()
    forward = fused_linear_top_k(student, weight, ids, log_probs, ForwardKL())
    # 0.8 log(0.4 / 0.5) + 0.2 log(0.2 / (2 e^-500 / 2))
    exact = 0.8 * torch.tensor(0.8).log() + 0.2 * (torch.tensor(0.2).log() + 500)
    torch.testing.assert_close(forward, exact)
    (gradient,) = gradients(forward, student)
    torch.testing.assert_close(gradient, torch.tensor([[0.1, 0.1, -0.1, -0.1]]))  # q - p, half of the rest each


def test_a_teacher_that_is_sure_of_its_tokens_has_a_finite_divergence():
    """A sum of 1, or of a bit more by rounding: what the others have is not known, but it is not 0."""
    student = torch.randn(1, 6, requires_grad=True)
    for total in (1.0, 1.0 + 3e-7):
        log_probs = torch.tensor([[0.75, 0.25]], dtype=torch.float64).mul(total).log().float()
        for divergence in (ForwardKL(), ReverseKL(), parse("ab:0.2,0.7"), parse("jsd:0.5")):
            loss = fused_linear_top_k(student, torch.eye(6), torch.tensor([[2, 5]]), log_probs, divergence)
            assert 0 < loss < 16
            assert gradients(loss, student)[0].isfinite().all()


def test_sixteen_bits_and_autocast_change_the_types_alone():
    student, logits, labels = models(torch.bfloat16)
    ids, log_probs = likeliest(logits.float(), 5)
    loss = fused_linear_top_k(*student[:2], ids, log_probs, ReverseKL(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused_linear_top_k(*student[:2], ids, log_probs, ReverseKL(), labels), loss)
    assert loss.dtype == torch.float32
    wide = [x.detach().float().requires_grad_() for x in student[:2]]
    expected = gradients(fused_linear_top_k(*wide, ids, log_probs, ReverseKL(), labels), wide)
    for mine, theirs in zip(gradients(loss, student[:2]), expected, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.float(), theirs, rtol=1e-2, atol=1e-4)


def test_rows_that_do_not_count_need_no_tokens():
    student, logits, labels = models()
    ids, log_probs = likeliest(logits, 3)
    expected = fused_linear_top_k(*student[:2], ids, log_probs, ForwardKL(), labels)
    ids[labels == -100] = -1
    assert fused_linear_top_k(*student[:2], ids, log_probs, ForwardKL(), labels) == expected
    assert fused_linear_top_k(*student[:2], ids, log_probs, ForwardKL(), torch.full_like(labels, -100)) == 0


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([[1, 2]], "expected [2, k], both the same"),
        ([[1.0, 2.0], [1.0, 2.0]], "expected whole numbers and a floating-point type"),
        ([[1, 2], [1, 6]], "top_ids has 6, expected ids below 6, or -1 for padding"),
        ([[1, 2], [1, -2]], "top_ids has -2, expected ids below 6"),
        ([[1, 2], [-1, 3]], "begins with -1 in a row"),
        ([[1, 2], [3, 3]], "top_ids has id 3 twice in one row"),
        ([[], []], "top_ids"),
        ([[True, False], [True, False]], "top_ids and top_log_probs are torch.bool and torch.float32, expected whole"),
    ],
)
def test_ids_that_can_not_be_meant_are_refused(ids, words):
    ids = torch.tensor(ids)
    log_probs = torch.full((2, 2) if ids.numel() else (2, 0), -1.0)
    with pytest.raises(ValueError, match="top_ids") as error:
        fused_linear_top_k(torch.randn(2, 3), torch.randn(6, 3), ids, log_probs, ForwardKL())
    assert words in str(error.value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int32])
def test_ids_may_have_any_integer_type(dtype):
    student, logits, labels = models()
    ids, log_probs = likeliest(logits, 3)
    expected = fused_linear_top_k(*student[:2], ids, log_probs, ForwardKL(), labels)
    assert fused_linear_top_k(*student[:2], ids.to(dtype), log_probs, ForwardKL(), labels) == expected
    ids[1, 2] = VOCAB
    with pytest.raises(ValueError, match=f"top_ids has {VOCAB}, expected ids below {VOCAB}"):
        fused_linear_top_k(*student[:2], ids.to(dtype), log_probs, ForwardKL(), labels)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_numbers_that_are_no_log_probabilities_are_refused(dtype):
    student, ids = (torch.randn(3, 3), torch.randn(6, 3)), torch.tensor([[1, 2], [3, 4], [5, -1]])
    log_probs = torch.tensor([[-1.0, -2.0], [-3.0, -1.0], [-1.0, torch.nan]], dtype=dtype)  # the last one is padding
    labels = torch.tensor([1, 2, 3])
    fused_linear_top_k(*student, ids, log_probs, ReverseKL(), labels)
    for value, words in (
        (0.7, "top_log_probs has a row with probabilities that sum to 2."),
        (-0.3, "top_log_probs has a row with probabilities that sum to 1.1"),
        (torch.nan, "top_log_probs has nan, expected a finite number"),
        (-torch.inf, "top_log_probs has -inf, expected a finite number of float32; pad in place of a token that has"),
        *([(-1e39, "top_log_probs has -1e+39, expected a finite number of float32")] * (dtype == torch.float64)),
    ):
        log_probs[1, 0] = value
        with pytest.raises(ValueError, match="top_log_probs") as error:
            fused_linear_top_k(*student, ids, log_probs, ReverseKL(), labels)
        assert words in str(error.value)
        labels[1] = -100  # as it does not count
        assert fused_linear_top_k(*student, ids, log_probs, ReverseKL(), labels).isfinite()
        labels[1] = 2


def test_sums_above_one_by_rounding_are_good():
    student, generator = (torch.randn(4, 8), torch.randn(50_000, 8)), torch.Generator().manual_seed(0)
    exact = torch.randn(4, 50_000, generator=generator, dtype=torch.float64).log_softmax(1)
    ids = torch.arange(50_000).expand(4, -1)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        up = exact.to(dtype)
        up = torch.where(up.double() < exact, up.nextafter(up.new_zeros(())), up)  # every one is rounded up
        assert fused_linear_top_k(*student, ids, up, ForwardKL()).isfinite()
    assert fused_linear_top_k(*student, ids, exact + 9e-4, ForwardKL()).isfinite()


@pytest.mark.gpu
def test_on_a_gpu_it_is_what_it_is_on_the_cpu():
    for dtype, rtol in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        student, logits, labels = models(dtype)
        ids, log_probs = likeliest(logits.float(), 5)
        results = []
        for device in ("cpu", "cuda"):
            moved = [x.detach().to(device).requires_grad_() for x in student]
            options = {"student_bias": moved[2], "hard_weight": 0.2, "student_softcap": 5.0}
            loss = fused_linear_top_k(*moved[:2], ids, log_probs, parse("ab:0.2,0.7"), labels, **options)
            results.append([loss.detach(), *gradients(loss, moved)])
        for ours, theirs in zip(*results, strict=True):
            assert (ours - theirs.cpu()).norm() <= rtol * ours.norm()
