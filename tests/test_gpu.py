import pytest
import torch

import oracle
from abkd_fast import (
    AlphaBeta,
    build_info,
    divergence_loss,
    fused_linear_divergence,
    fused_linear_policy_gradient,
    parse,
)
from abkd_fast.losses import row_ops
from abkd_fast.losses.arguments import LossSpec, Rows
from abkd_fast.losses.divergences import BY_NAME

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(build_info()["cuda"] is None, reason="built without CUDA kernels"),
]

# As on the CPU (see row_kernels.py). The exponential has an error of 2 ulp in place of 1.5.
FLOAT32 = 3e-5
FLOAT32_UNWEIGHTED = 4 * FLOAT32
# Where results have 16 bits, one pass may do: csrc/cuda/online.cuh promises this for losses, and for gradients besides
# their rounding.
ONE_PASS_LOSS, ONE_PASS_GRADIENT = 1e-3, 1e-4


def assert_close_to_oracle(student, teacher, alpha, beta, labels=None, **numbers):
    """`student` and `teacher` are on the GPU. The gradient may have the rounding errors of its type."""
    expected = oracle.row_losses(student.cpu(), teacher.cpu(), alpha, beta, labels, **numbers)
    gradient = torch.empty_like(student)
    labels_there = None if labels is None else labels.cuda()
    spec = LossSpec(AlphaBeta(alpha, beta), **numbers)
    losses = row_ops.row_losses(Rows(student, teacher, labels_there, spec), gradient=gradient)
    kept = slice(None) if labels is None else labels != -100
    bound = of_gradient = FLOAT32_UNWEIGHTED if abs(alpha + beta) < 0.1 else FLOAT32
    storage = 0
    if student.dtype != torch.float32:
        bound, of_gradient = ONE_PASS_LOSS, ONE_PASS_GRADIENT
        storage = torch.finfo(student.dtype).eps / 2
    assert oracle.relative_errors(losses.cpu()[kept], expected[0][kept]).max() < bound
    tiny = torch.finfo(student.dtype).smallest_normal * torch.finfo(student.dtype).eps * student.shape[1] ** 0.5
    error = (gradient.cpu().double() - expected[1]).norm(dim=1)
    assert (error <= (of_gradient + storage) * expected[1].norm(dim=1) + tiny).all()
    return losses, gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1000, 1003, 50257, 151936])
@pytest.mark.parametrize(("alpha", "beta"), [*oracle.GRID, *oracle.neighbors(1e-5)])
def test_kernel_agrees_with_oracle(alpha, beta, vocab, dtype):
    student, teacher = (x.to(dtype).cuda() for x in oracle.gpt2_like_logits(2, vocab))
    if dtype == torch.float16 and alpha + beta < 0.1:
        pytest.skip("the gradient is beyond the range of float16")
    assert_close_to_oracle(student, teacher, alpha, beta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1003, 50257, 151936])
@pytest.mark.parametrize("spelling", [*BY_NAME, "alphanet:0.2,0.8,batch"])
def test_every_divergence_agrees_with_oracle(spelling, vocab, dtype):
    divergence = parse(spelling)
    student, teacher = (x.to(dtype).cuda() for x in oracle.gpt2_like_logits(3, vocab))
    expected = oracle.evaluate(student.cpu(), teacher.cpu(), divergence)
    leaf = student.clone().requires_grad_()
    losses = divergence_loss(leaf, teacher, divergence, reduction="none")
    losses.sum().backward()
    assert oracle.relative_errors(losses.cpu(), expected[0]).max() < FLOAT32
    storage = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * vocab**0.5
    error = (leaf.grad.cpu().double() - expected[1]).norm(dim=1)
    assert (error <= (FLOAT32 + storage) * expected[1].norm(dim=1) + tiny).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spelling", BY_NAME)
def test_gradients_from_statistics(spelling, dtype):
    divergence = parse(spelling)
    student, teacher = (x.to(dtype).cuda() for x in oracle.gpt2_like_logits(3, 5003))
    rows = Rows(student, teacher, torch.tensor([1, -100, 5002]).cuda(), LossSpec(divergence, 2.0, 0.3))
    upstream = torch.tensor([0.5, 3.0, -2.0], device="cuda")
    statistics = torch.zeros(3, row_ops.STATISTICS, dtype=torch.float64, device="cuda")
    expected, gradient = torch.empty_like(student), torch.empty_like(student)
    row_ops.row_losses(rows, gradient=expected, statistics=statistics, upstream=upstream)
    row_ops.row_gradients(rows, statistics, upstream, gradient)
    if dtype == torch.float32:
        assert torch.equal(gradient, expected)
    else:  # one of the two may come from one pass
        error = (gradient.double() - expected.double()).norm(dim=1)
        assert (error <= torch.finfo(dtype).eps * expected.double().norm(dim=1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 3, 1003, 151937])
def test_labels_temperature_hard_weight_and_in_place_gradient(vocab, dtype):
    student, teacher = (x.to(dtype).cuda() for x in oracle.gpt2_like_logits(4, vocab))
    labels = torch.tensor([0, -100, vocab - 1, vocab // 2])
    rows = Rows(student, teacher, labels.cuda(), LossSpec(AlphaBeta(), 2.0, 0.3))
    gradient = torch.empty_like(student)
    losses = row_ops.row_losses(rows, gradient=gradient)
    if vocab > 3:
        assert_close_to_oracle(student, teacher, 0.2, 0.7, labels, temperature=2.0, hard_weight=0.3)
    assert losses[1] == 0
    assert gradient[1].eq(0).all()
    assert torch.equal(row_ops.row_losses(rows, gradient=student), losses)
    assert torch.equal(student, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("student_shift", "teacher_shift", "width"), [(1, 0, 1010), (0, 1, 1011), (3, 2, 1013)])
def test_unaligned_rows(student_shift, teacher_shift, width, dtype):
    student, teacher = (x.to(dtype).cuda() for x in oracle.gpt2_like_logits(5, 1003))
    expected = assert_close_to_oracle(student, teacher, 0.2, 0.7)
    views = []
    for rows, shift in ((student, student_shift), (teacher, teacher_shift)):
        view = torch.full((5, width), 99.0, dtype=dtype, device="cuda")[:, shift : shift + 1003]
        views.append(view.copy_(rows))
    losses, gradient = assert_close_to_oracle(*views, 0.2, 0.7)
    torch.testing.assert_close(losses, expected[0], rtol=FLOAT32, atol=0)
    storage = FLOAT32 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(gradient, expected[1], rtol=storage, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunk_tokens", [None, 100])
def test_fused_linear_in_bfloat16(reduction, chunk_tokens):
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 64), (5003, 64), (300, 96), (5003, 96)]
    inputs = [torch.randn(shape, generator=generator).div(3).bfloat16() for shape in shapes]
    labels = torch.randint(0, 5003, (300,), generator=generator)
    labels[::3] = -100
    options = {"temperature": 2.0, "hard_weight": 0.3, "reduction": reduction}
    hidden, weight, teacher_hidden, teacher_weight = (x.double().requires_grad_() for x in inputs)
    exact = divergence_loss(hidden @ weight.T, teacher_hidden @ teacher_weight.T, AlphaBeta(), labels, **options)
    exact.sum().backward()
    z, w, y, v = (x.cuda().requires_grad_() for x in inputs)
    loss = fused_linear_divergence(z, w, y, v, AlphaBeta(), labels, chunk_tokens=chunk_tokens, **options)
    loss.sum().backward()
    torch.testing.assert_close(loss.cpu().double(), exact, rtol=1e-4, atol=1e-5)
    # Both the gradient by the logits and the result are rounded to bfloat16: 2^-9 each, relative to an element.
    assert oracle.relative_errors(z.grad.cpu().flatten()[None], hidden.grad.flatten()[None]).max() < 2**-7
    assert oracle.relative_errors(w.grad.cpu().flatten()[None], weight.grad.flatten()[None]).max() < 2**-7


def test_policy_gradient_equals_the_cpus():
    generator = torch.Generator().manual_seed(0)
    shapes = (300, 64), (5003, 64), (300, 96), (5003, 96)
    states = [torch.randn(shape, generator=generator).div(4) for shape in shapes]
    labels = torch.randint(5003, (300,), generator=generator)
    advantages, log_probs = torch.randn(300, generator=generator), -8.5 + torch.randn(300, generator=generator)
    results = []
    for device in ("cpu", "cuda"):
        # Copies, because x.to("cpu") is x: the second turn would find leaves of the first.
        hidden, weight, *teacher = (x.to(device, copy=True) for x in states)
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        numbers = labels, advantages.to(device), log_probs.to(device), 0.2
        total, divergences, ratios = fused_linear_policy_gradient(*leaves, *teacher, *numbers)
        total.backward()
        results.append([x.detach().cpu() for x in (total, divergences, ratios, *(leaf.grad for leaf in leaves))])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= FLOAT32 * ours.norm()
