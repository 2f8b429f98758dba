import itertools

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from abkd_fast import AlphaBeta, divergence_loss, fused_linear_cross_entropy, fused_linear_divergence
from abkd_fast.fused_linear import CHUNK_BYTES, choose_chunk_tokens

# Sums of products in float32: a few roundings of 2^-24 on logits of size 5, then the row kernel's own (see
# test_divergence.py).
TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-11}
NAMES = ("hidden", "weight", "bias")
TOKENS, VOCAB = 20, 37


def make(dtype=torch.float64, tokens=TOKENS, vocab=VOCAB, teacher_vocab=VOCAB, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).div(2).to(dtype)

    student = tensor(tokens, 8), tensor(vocab, 8), tensor(vocab)
    teacher = tensor(tokens, 12), tensor(teacher_vocab, 12), tensor(teacher_vocab)
    labels = torch.randint(0, min(vocab, teacher_vocab), (tokens,), generator=generator)
    labels[1::3] = -100
    return student, teacher, labels


def leaves(tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


def fused(student, teacher, labels, **options):
    hidden, weight, bias = student
    if teacher is None:
        return fused_linear_cross_entropy(hidden, weight, labels, student_bias=bias, **options)
    biases = {"student_bias": bias, "teacher_bias": teacher[2]}
    return fused_linear_divergence(hidden, weight, *teacher[:2], AlphaBeta(), labels, **biases, **options)


def full(student, teacher, labels, **options):
    """The same from whole logits in float64."""
    student = [None if x is None else x.double() for x in student]
    logits = F.linear(*student)
    if teacher is None:
        loss = F.cross_entropy(logits, labels, reduction="none")
        total = loss.sum()
        return {"none": loss, "sum": total, "mean": total / (labels != -100).sum().clamp(min=1)}[
            options.get("reduction", "mean")
        ]
    teacher = [None if x is None else x.double() for x in teacher]
    return divergence_loss(logits, F.linear(*teacher), AlphaBeta(), labels, **options)


def differentiate(function, student, teacher, labels, upstream=None, **options):
    student = leaves(student)
    loss = function(student, teacher, labels, **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype))
    return [loss.detach(), *(x.grad for x in student)]


def assert_close(got, expected, tolerance):
    for mine, exact in zip(got, expected, strict=True):
        assert mine.shape == exact.shape
        error = (mine.double() - exact.double()).norm()
        assert error <= tolerance * exact.double().norm(), (error / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk_tokens", [None, 1, 7, TOKENS])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("task", ["divergence", "tempered", "cross-entropy"])
def test_agrees_with_whole_logits(task, reduction, chunk_tokens, dtype):
    student, teacher, labels = make(dtype)
    options = {"reduction": reduction}
    if task == "tempered":
        options |= {"temperature": 2.0, "hard_weight": 0.3}
    teacher = None if task == "cross-entropy" else teacher
    upstream = torch.linspace(-1, 2, TOKENS) if reduction == "none" else torch.tensor(1.7)
    expected = differentiate(full, student, teacher, labels, upstream, **options)
    got = differentiate(fused, student, teacher, labels, upstream, chunk_tokens=chunk_tokens, **options)
    assert got[0].dtype == dtype
    assert_close(got, expected, TOLERANCE[dtype])
    assert got[1][1::3].eq(0).all()


def test_without_labels_or_biases():
    (hidden, weight, _), (teacher_hidden, teacher_weight, _), _ = make()
    student, teacher = (hidden, weight), (teacher_hidden, teacher_weight)
    z, w = leaves(student)
    expected = divergence_loss(z @ w.T, teacher_hidden @ teacher_weight.T, AlphaBeta())
    expected.backward()
    h, v = leaves(student)
    loss = fused_linear_divergence(h, v, *teacher, AlphaBeta())
    loss.backward()
    assert_close((loss, h.grad, v.grad), (expected, z.grad, w.grad), 1e-11)


def test_tolerance_notices_small_errors():
    expected = differentiate(full, *make())
    for wrong in (0.0, 1.0002):
        for exact in expected:
            with pytest.raises(AssertionError):
                assert_close([exact * wrong], [exact], TOLERANCE[torch.float32])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [c for n in (1, 2) for c in itertools.combinations(range(3), n)])
def test_frozen_inputs_get_no_gradient(frozen, reduction):
    student, teacher, labels = make()
    expected = differentiate(full, student, teacher, labels, reduction=reduction)[1:]
    student = leaves(student)
    for index in frozen:
        student[index].requires_grad_(False)
    fused(student, teacher, labels, reduction=reduction).sum().backward()
    for index, (x, gradient) in enumerate(zip(student, expected, strict=True)):
        if index in frozen:
            assert x.grad is None
        else:
            assert_close([x.grad], [gradient], 1e-11)


@pytest.mark.parametrize("need", list(itertools.product([False, True], repeat=3)))
def test_only_needed_gradients_are_made(need):
    student, teacher, labels = make()
    arguments = (*student, *teacher, labels, 1, [0.2, 0.7], 1.0, 0.0, 0, list(need), None)
    _, _, *gradients = torch.ops.abkd_fast.fused_linear(*arguments)
    assert [g.numel() for g in gradients] == [x.numel() if n else 0 for n, x in zip(need, student, strict=True)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_grad(reduction):
    student, teacher, labels = make()
    with torch.no_grad():
        loss = fused(leaves(student), teacher, labels, reduction=reduction)
    assert not loss.requires_grad
    assert_close([loss], [full(student, teacher, labels, reduction=reduction)], 1e-11)


@pytest.mark.parametrize(("vocab", "teacher_vocab"), [(37, 50), (50, 37)])
def test_padded_vocabularies(vocab, teacher_vocab):
    student, teacher, labels = make(vocab=vocab, teacher_vocab=teacher_vocab)
    expected = differentiate(full, student, teacher, labels)
    got = differentiate(fused, student, teacher, labels)
    assert_close(got, expected, 1e-11)
    assert got[2][37:].eq(0).all()
    assert got[3][37:].eq(0).all()


@pytest.mark.parametrize("with_teacher", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tokens", [0, 5])
def test_no_row_counts(tokens, reduction, with_teacher):
    student, teacher, labels = make(tokens=tokens)
    teacher = teacher if with_teacher else None
    loss, *gradients = differentiate(fused, student, teacher, labels.fill_(-100), reduction=reduction)
    assert loss.eq(0).all()
    assert [g.shape for g in gradients] == [x.shape for x in student]
    assert all(g.eq(0).all() for g in gradients)


@pytest.mark.parametrize("function", [fused, full])
def test_tied_weights_and_two_calls_in_one_graph(function):
    (_, weight, bias), teacher, labels = make()
    w, b = leaves((weight, bias))
    v, c = leaves((weight, bias))

    def total(weight, bias, loss):
        hidden = weight[labels.clamp(min=0)].tanh()
        first = loss((hidden, weight, bias), teacher, labels)
        return first + 2 * loss((hidden * 2, weight, bias), None, labels) + weight.square().sum()

    total(w, b, function).backward()
    total(v, c, full).backward()
    assert_close((w.grad, b.grad), (v.grad, c.grad), 1e-11)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(reduction):
    torch._dynamo.reset()
    student, teacher, labels = make(torch.float32)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    expected = differentiate(fused, student, teacher, labels, reduction=reduction)
    got = differentiate(compiled, student, teacher, labels, reduction=reduction)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("with_teacher", [True, False])
def test_opcheck(with_teacher):
    student, teacher, labels = make()
    teacher = teacher if with_teacher else (None, None, None)
    arguments = (*teacher, labels, int(with_teacher), [0.2, 0.7] * with_teacher, 1.0, 1.0 - 0.5 * with_teacher, 7)
    torch.library.opcheck(torch.ops.abkd_fast.fused_linear, (*leaves(student), *arguments, [True] * 3, None))
    need = [True, False, True]
    inputs = [x.detach().requires_grad_(n) for x, n in zip(student, need, strict=True)]
    torch.library.opcheck(torch.ops.abkd_fast.fused_linear, (*inputs, *arguments, need, None))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("with_teacher", [True, False])
def test_gradcheck(with_teacher, reduction):
    student, teacher, labels = make(tokens=4, vocab=6, teacher_vocab=6)
    teacher = teacher if with_teacher else None
    assert torch.autograd.gradcheck(
        lambda *x: fused(x, teacher, labels, reduction=reduction, chunk_tokens=2), leaves(student)
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused(reduction):
    student, teacher, labels = make()
    student = leaves(student)
    loss = fused(student, teacher, labels, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, student, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_16_bit_inputs(dtype, reduction):
    student, teacher, labels = make(dtype)
    expected = differentiate(
        fused, [x.float() for x in student], [x.float() for x in teacher], labels, reduction=reduction
    )
    got = differentiate(fused, student, teacher, labels, reduction=reduction)
    assert got[0].dtype == torch.float32
    assert [x.dtype for x in got[1:]] == [dtype] * 3
    assert_close(got[:1], expected[:1], TOLERANCE[torch.float32])
    assert_close(got[1:], expected[1:], torch.finfo(dtype).eps)


def test_autocast_changes_nothing():
    student, teacher, labels = make(torch.float32)
    expected = differentiate(fused, student, teacher, labels)
    with torch.autocast("cpu", torch.bfloat16):
        got = differentiate(fused, student, teacher, labels)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_autocast_hidden_states_with_float32_weights():
    (hidden, weight, bias), (teacher_hidden, *rest), labels = make(torch.float32)
    hidden, teacher_hidden = hidden.bfloat16(), teacher_hidden.bfloat16()
    got = differentiate(fused, (hidden, weight, bias), (teacher_hidden, *rest), labels)
    expected = differentiate(full, (hidden, weight, bias), (teacher_hidden, *rest), labels)
    assert_close(got[:1] + got[2:], expected[:1] + expected[2:], TOLERANCE[torch.float32])
    assert_close(got[1:2], expected[1:2], torch.finfo(torch.bfloat16).eps)


def test_16_bit_teacher_of_a_float32_student():
    student, teacher, labels = make(torch.float32)
    teacher = [x.bfloat16() for x in teacher]
    expected = differentiate(full, student, teacher, labels)
    assert_close(differentiate(fused, student, teacher, labels), expected, TOLERANCE[torch.float32])


def test_labels_out_of_range():
    student, _, labels = make()
    labels[0] = VOCAB
    with pytest.raises(RuntimeError, match=f"is {VOCAB}"):
        fused(student, None, labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_hidden": torch.zeros(3, 8)}, "student_hidden has 3 rows and teacher_hidden 20"),
        ({"student_hidden": torch.zeros(TOKENS, 9)}, r"student.*\[20, 9\] and \[37, 8\]"),
        ({"teacher_hidden": torch.zeros(TOKENS, 9)}, r"teacher.*\[20, 9\] and \[37, 12\]"),
        ({"student_hidden": torch.zeros(TOKENS, 1, 8)}, r"student.*\[20, 1, 8\]"),
        ({"teacher_weight": torch.zeros(5000, 12)}, "37.*5000"),
        ({"labels": torch.zeros(3)}, r"labels have shape \[3\]"),
        ({"hard_weight": 0.5}, "needs labels"),
        ({"hard_weight": -0.5}, "hard_weight is -0.5"),
        ({"temperature": 0}, "temperature is 0"),
        ({"reduction": "max"}, "max"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
    ],
)
def test_wrong_arguments(change, message):
    (hidden, weight, _), (teacher_hidden, teacher_weight, _), _ = make(torch.float32)
    arguments = {
        "student_hidden": hidden,
        "student_weight": weight,
        "teacher_hidden": teacher_hidden,
        "teacher_weight": teacher_weight,
        "divergence": AlphaBeta(),
    }
    with pytest.raises(ValueError, match=message):
        fused_linear_divergence(**arguments | change)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 100_000),
    vocab=st.integers(1, 200_000),
    models=st.sampled_from([1, 2]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    device=st.sampled_from(["cpu", "cuda"]),
)
def test_choose_chunk_tokens(tokens, vocab, models, dtype, device):
    step = choose_chunk_tokens(tokens, vocab, models, dtype, torch.device(device))
    tile = {"cpu": 16, "cuda": 128}[device]
    assert step % tile == 0
    padded_row = (vocab + 63) // 64 * 64 * dtype.itemsize * models
    assert step * padded_row <= max(CHUNK_BYTES[device], tile * padded_row)
    if tokens == 0:
        return
    assert step >= 1
    if (tokens + tile - 1) // tile * tile * padded_row <= CHUNK_BYTES[device]:
        assert step >= tokens
    chunks = -(-tokens // step)
    assert step - tokens / chunks <= tile * chunks, "the chunks are not nearly equal"


def test_memory_does_not_grow_with_the_number_of_tokens():
    steps = [choose_chunk_tokens(n, 50257, 2, torch.float32, torch.device("cpu")) for n in (10**4, 10**5, 10**6)]
    assert max(steps) * 50304 * 2 * 4 <= CHUNK_BYTES["cpu"]


def test_real_vocabulary():
    student, teacher, labels = make(torch.float32, tokens=5, vocab=50257, teacher_vocab=50257)
    got = differentiate(fused, student, teacher, labels, chunk_tokens=2)
    expected = differentiate(full, student, teacher, labels)
    assert_close(got, expected, TOLERANCE[torch.float32])
    assert oracle.relative_errors(got[1][labels != -100], expected[1][labels != -100]).max() < 3e-5
