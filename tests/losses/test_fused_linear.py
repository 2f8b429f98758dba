import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from abkd_fast import AlphaBeta, divergence_loss, fused_linear_cross_entropy, fused_linear_divergence, parse
from abkd_fast.losses.chunks import CHUNK_BYTES, choose_chunk_tokens, row_bytes
from oracle import FAMILIES

# In float32 sums of products have a few rounding errors of 2^-24, on logits of size 5. The row kernel adds its own (see
# row_kernels.py).
TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-11}
NAMES = ("hidden", "weight", "bias")
TOKENS, VOCAB = 20, 37
WHOLE = "", 0, 0  # the operator's group, first and widest for a vocabulary that is not sharded


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


def fused(student, teacher, labels, divergence="ab", **options):
    hidden, weight, bias = student
    if teacher is None:
        return fused_linear_cross_entropy(hidden, weight, labels, student_bias=bias, **options)
    biases = {"student_bias": bias, "teacher_bias": teacher[2]}
    kind = AlphaBeta() if divergence == "ab" else parse(divergence)  # torch.compile can't see through parse
    return fused_linear_divergence(hidden, weight, *teacher[:2], kind, labels, **biases, **options)


def full(student, teacher, labels, divergence="ab", **options):
    """The same loss from whole logits in float64."""
    student = [None if x is None else x.double() for x in student]
    logits = F.linear(*student)
    if teacher is None:
        loss = F.cross_entropy(logits, labels, reduction="none")
        total = loss.sum()
        return {"none": loss, "sum": total, "mean": total / (labels != -100).sum().clamp(min=1)}[
            options.get("reduction", "mean")
        ]
    teacher = [None if x is None else x.double() for x in teacher]
    return divergence_loss(logits, F.linear(*teacher), parse(divergence), labels, **options)


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


@pytest.mark.parametrize("chunk_tokens", [None, 3])
@pytest.mark.parametrize("divergence", FAMILIES)
def test_every_family_agrees_with_whole_logits(divergence, chunk_tokens):
    for dtype, reduction in ((torch.float32, "mean"), (torch.float64, "none")):
        student, teacher, labels = make(dtype)
        options = {"divergence": divergence, "reduction": reduction, "temperature": 2.0, "hard_weight": 0.3}
        upstream = torch.linspace(-1, 2, TOKENS) if reduction == "none" else None
        expected = differentiate(full, student, teacher, labels, upstream, **options)
        got = differentiate(fused, student, teacher, labels, upstream, chunk_tokens=chunk_tokens, **options)
        assert_close(got, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_alphanet_per_batch_decides_over_all_chunks(reduction):
    (hidden, weight, bias), teacher, _ = make()
    options = {"reduction": "none"}
    first, second = (full((hidden, weight, bias), teacher, None, f"alpha:{x}", **options) for x in (0.2, 0.8))
    order = (first - second).argsort()  # first the rows that prefer the second branch, then the others
    assert (first < second)[order[:2]].all()
    assert (first > second)[order[-2:]].all()
    student, teacher = (hidden[order], weight, bias), (teacher[0][order], *teacher[1:])
    options = {"reduction": reduction, "divergence": "alphanet:0.2,0.8,batch"}
    chosen = "alpha:0.2" if first.sum() > second.sum() else "alpha:0.8"
    expected = differentiate(full, student, teacher, None, **options | {"divergence": chosen})
    for chunk_tokens in (1, 2, 7):
        got = differentiate(fused, student, teacher, None, chunk_tokens=chunk_tokens, **options)
        assert_close(got, expected, TOLERANCE[torch.float64])
    # The first ten rows and the last ten would choose different branches by themselves.
    votes = [(first - second)[rows].sum() for rows in (order[:10], order[10:])]
    assert votes[0] < 0 < votes[1]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("reduce", [torch.sum, torch.mean, lambda x: x[::2].sum(), lambda x: x.square().sum()])
@pytest.mark.parametrize("with_labels", [True, False])
def test_upstream_gradients_of_any_layout(with_labels, reduce, reduction):
    student, teacher, labels = make()
    labels = labels if with_labels else None
    grads = []
    for function in (fused, full):
        leaf = leaves(student)
        loss = function(leaf, teacher, labels, reduction=reduction)
        reduce(loss if reduction == "none" else loss.expand(4)).backward()
        grads.append([x.grad for x in leaf])
    assert_close(*grads, TOLERANCE[torch.float64])


# In bfloat16 a logit x moves by up to |x| 2^-9. Logits go up to about 2, their differences are about 1, and slopes move
# with the differences. Each element of the gradient moves by 2^-9 more. Together these are a few times 2^-9. float16
# keeps 3 bits more.
LOGITS_TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9}


@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", ["ab", "jsd:0.1", "akl", "alphanet:0.2,0.8,batch", "cross-entropy"])
def test_16_bit_logits(divergence, logits_dtype):
    student, teacher, labels = make(torch.float32)
    for reduction, chunk_tokens in (("mean", None), ("none", 3)):
        options = {"reduction": reduction, "divergence": divergence}
        if divergence == "cross-entropy":
            teacher, options = None, {"reduction": reduction}
        expected = differentiate(full, student, teacher, labels, **options)
        options |= {"chunk_tokens": chunk_tokens, "logits_dtype": logits_dtype}
        got = differentiate(fused, student, teacher, labels, **options)
        assert [x.dtype for x in got] == [torch.float32] * 4
        assert_close(got, expected, LOGITS_TOLERANCE[logits_dtype])
        with pytest.raises(AssertionError):  # the option has an effect
            assert_close(got, expected, 2**-6 * LOGITS_TOLERANCE[logits_dtype])


@pytest.mark.parametrize(
    "logits_dtype", [torch.int32, torch.bool, torch.complex64, torch.float64, torch.float8_e4m3fn], ids=str
)
def test_wrong_logits_dtype(logits_dtype):
    student, teacher, labels = make(torch.float32)
    with pytest.raises(ValueError, match=f"logits_dtype is {logits_dtype}, expected torch.float32"):
        fused(student, teacher, labels, logits_dtype=logits_dtype)
    with pytest.raises(ValueError, match=f"logits_dtype is {logits_dtype}"):
        fused(student, None, labels, logits_dtype=logits_dtype)


def test_logits_of_float64_hidden_states_are_float64():
    student, teacher, labels = make()
    with pytest.raises(ValueError, match=r"expected torch\.float64 for torch\.float64 hidden"):
        fused(student, teacher, labels, logits_dtype=torch.float32)


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
    for divergence in ("ab", "alphanet:0.2,0.8,batch"):
        arguments = (*student, *teacher, labels, divergence, 1.0, 0.0, [], 0, torch.float64, *WHOLE, list(need), None)
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


@pytest.mark.parametrize("divergence", ["ab", "alphanet:0.2,0.8,batch", ""])
def test_opcheck(divergence):
    student, teacher, labels = make()
    teacher = teacher if divergence else (None, None, None)
    arguments = (*teacher, labels, divergence, 1.0, 0.5 if divergence else 1.0, [2.0, 30.0, 1.0, 0.0])
    arguments += (7, torch.float64, *WHOLE)
    operator = torch.ops.abkd_fast.fused_linear
    torch.library.opcheck(operator, (*student, *arguments, [False] * 3, None))
    # Backward scales the operator's results in place. AOTAutograd could not return them then (see test_ops.py).
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    for need, upstream in (([True] * 3, None), ([True, False, True], torch.randn(TOKENS, dtype=torch.float64))):
        inputs = [x.detach().requires_grad_(n) for x, n in zip(student, need, strict=True)]
        torch.library.opcheck(operator, (*inputs, *arguments, need, upstream), test_utils=checks)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("with_teacher", [True, False])
def test_gradcheck(with_teacher, reduction):
    student, teacher, labels = make(tokens=4, vocab=6, teacher_vocab=6)
    teacher = teacher if with_teacher else None
    assert torch.autograd.gradcheck(
        lambda *x: fused(x, teacher, labels, reduction=reduction, chunk_tokens=2), leaves(student)
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("divergence", ["ab", "alphanet:0.2,0.8,batch"])
def test_backward_twice(divergence, reduction):
    student, teacher, labels = make(torch.float32)
    expected = differentiate(fused, student, teacher, labels, divergence=divergence, reduction=reduction)[1:]
    student = leaves(student)
    loss = fused(student, teacher, labels, divergence, reduction=reduction)
    # Gradients scaled in place would come back 8 times, then 64 times as large. Powers of 2 change no digit.
    for _ in range(2):
        got = torch.autograd.grad(loss, student, torch.full_like(loss, 8), retain_graph=True)
        assert all(torch.equal(mine, 8 * exact) for mine, exact in zip(got, expected, strict=True))
    loss.backward(torch.full_like(loss, 8))
    assert all(torch.equal(x.grad, 8 * exact) for x, exact in zip(student, expected, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward(torch.ones_like(loss))


@pytest.mark.parametrize("divergence", ["ab", "akl", "alphanet:0.2,0.8,batch"])
def test_same_bits_twice(divergence):
    student, teacher, labels = make(torch.float32, tokens=100, vocab=1003, teacher_vocab=1003)
    options = {"divergence": divergence, "chunk_tokens": 48}
    first, second = (differentiate(fused, student, teacher, labels, **options) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


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


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_factor_of_a_loss_does_not_flush_float16(reduction):
    student, teacher, _ = make(torch.float32, tokens=512, vocab=2053, teacher_vocab=2053)
    options = {"reduction": reduction, "scale": 1e-3}
    expected = differentiate(fused, student, teacher, None, **options)
    got = differentiate(fused, student, teacher, None, logits_dtype=torch.float16, **options)
    assert_close(got, expected, 1e-2)


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
    with pytest.raises(ValueError, match=f"is {VOCAB}"):
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
    padded_row = row_bytes(vocab, models, dtype)
    assert padded_row == (vocab + 63) // 64 * 64 * dtype.itemsize * models
    step = choose_chunk_tokens(tokens, padded_row, torch.device(device), CHUNK_BYTES[device])
    tile = {"cpu": 16, "cuda": 128}[device]
    assert step % tile == 0
    assert step * padded_row <= max(CHUNK_BYTES[device], tile * padded_row)
    if tokens == 0:
        return
    assert step >= 1
    if (tokens + tile - 1) // tile * tile * padded_row <= CHUNK_BYTES[device]:
        assert step >= tokens
    chunks = -(-tokens // step)
    assert step - tokens / chunks <= tile * chunks, "the chunks are not nearly equal"


def peak_of_allocations(function):
    """The most bytes that PyTorch's CPU allocator held at once during function(), beyond those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [x for x in profile.profiler.kineto_results.events() if x.name() == "[memory]"]
    return max(itertools.accumulate(x.nbytes() for x in sorted(events, key=lambda x: x.start_ns())))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("divergence", ["ab", "alphanet:0.2,0.8,batch", None])
def test_memory_of_512_and_8192_tokens_is_the_same(divergence, reduction, monkeypatch):
    vocab = 2048
    chunk_bytes = 128 * vocab * 2 * 4  # 128 rows of both models or 256 of one: 256 and 4096 tokens are whole chunks
    monkeypatch.setitem(CHUNK_BYTES, "cpu", chunk_bytes)
    peaks = []
    for tokens in (512, 8192):
        student, teacher, labels = make(torch.float32, tokens, vocab, vocab)
        labels = labels.clamp(min=0)
        labels[::2] = -100
        hidden, weight, bias = leaves(student)
        results = hidden.nbytes + weight.nbytes + bias.nbytes  # the gradients

        def step(inputs=(hidden, weight, bias), teacher=teacher, labels=labels):
            options = {"divergence": divergence} if divergence else {}
            loss = fused(inputs, teacher if divergence else None, labels, reduction=reduction, **options)
            loss.sum().backward()

        step()
        for x in (hidden, weight, bias):
            x.grad = None
        # Memory per row: labels, indices of the rows that count, a few numbers, and for AlphaNet 6 float64 for each of
        # two branches and for the chosen one.
        rows = tokens * (64 + (160 if divergence == "alphanet:0.2,0.8,batch" else 0))
        peaks.append(peak_of_allocations(step) - results - rows)
    assert peaks[1] < 1.05 * peaks[0]
    assert peaks[0] > 0.9 * chunk_bytes  # the measurement has seen the chunk itself


def test_chunks_do_not_grow_with_the_number_of_tokens():
    of_row = row_bytes(50257, 2, torch.float32)
    steps = [choose_chunk_tokens(n, of_row, torch.device("cpu")) for n in (10**4, 10**5, 10**6)]
    assert max(steps) * 50304 * 2 * 4 <= CHUNK_BYTES["cpu"]


def test_real_vocabulary():
    student, teacher, labels = make(torch.float32, tokens=5, vocab=50257, teacher_vocab=50257)
    got = differentiate(fused, student, teacher, labels, chunk_tokens=2)
    expected = differentiate(full, student, teacher, labels)
    assert_close(got, expected, TOLERANCE[torch.float32])
    assert oracle.relative_errors(got[1][labels != -100], expected[1][labels != -100]).max() < 3e-5
