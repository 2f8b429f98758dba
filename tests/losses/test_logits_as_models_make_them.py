"""Logits in other types than the student's, and logits that models scale or bound (Gemma, Cohere, Granite)."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abkd_fast import AlphaBeta, divergence_loss, fused_linear_cross_entropy, fused_linear_divergence, parse
from abkd_fast.losses import reference, row_ops
from abkd_fast.losses.arguments import LogitMap, LossSpec, Rows
from oracle import FAMILIES, mild_logits, relative_errors
from row_kernels import ALL, COMPILED, FLOAT32, FLOAT64

MAPS = [
    (LogitMap(), LogitMap(0.25)),
    (LogitMap(softcap=5.0), LogitMap()),
    (LogitMap(0.5, 3.0), LogitMap(2.0, 30.0)),
]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
LABELS = torch.tensor([1, -100, 4])


def by_autograd(student, teacher, spec, labels):
    """Losses and gradient in float64, with the maps in plain PyTorch."""
    leaf = student.double().clone().requires_grad_()
    z, y = spec.student_map(leaf), spec.teacher_map(teacher.double())
    numbers = {"temperature": spec.temperature, "hard_weight": spec.hard_weight, "reduction": "none"}
    losses = divergence_loss(z, y, spec.divergence, labels, **numbers)
    losses.sum().backward()
    return losses.detach(), leaf.grad


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize("divergence", ALL)
def test_maps_of_logits(monkeypatch, divergence, maps, compiled):
    if compiled and row_ops._C is None:
        pytest.skip("the extension is missing")
    monkeypatch.setattr(row_ops, "_compiled", lambda _: compiled)
    student, teacher = mild_logits(3, 2050, torch.float64)
    for dtype, bound in ((torch.float64, FLOAT64), (torch.float32, FLOAT32)):
        z, y = student.to(dtype), teacher.to(dtype)
        spec = LossSpec(
            parse(divergence if divergence != "alphanet:0.2,0.8,batch" else "alphanet:0.2,0.8,token"), 2.0, 0.3, *maps
        )
        rows = Rows(z, y, LABELS, spec)
        gradient, later, statistics = torch.empty_like(z), torch.empty_like(z), torch.zeros(3, 6).double()
        losses = row_ops.row_losses(rows, gradient, statistics)
        row_ops.row_gradients(rows, statistics, torch.ones_like(losses), later)
        expected, slopes = by_autograd(z, y, spec, LABELS)
        kept = [0, 2]
        assert relative_errors(losses[kept], expected[kept]).max() < bound
        for mine in (gradient, later):
            assert relative_errors(mine[kept], slopes[kept]).max() < bound
            assert mine[1].eq(0).all()


@COMPILED
@pytest.mark.parametrize(("student", "teacher"), [x for x in itertools.product(TYPES, TYPES) if x[0] != x[1]])
@pytest.mark.parametrize("divergence", FAMILIES)
def test_each_model_has_its_own_type(divergence, student, teacher):
    z, y = mild_logits(3, 1003)
    z, y = z.to(student), y.to(teacher)
    losses = divergence_loss(z, y, parse(divergence), reduction="none")
    expected = divergence_loss(z.double(), y.double(), parse(divergence), reduction="none")
    assert relative_errors(losses, expected).max() < FLOAT32
    rounded = divergence_loss(z, y.to(torch.float16).to(teacher), parse(divergence), reduction="none")
    assert teacher != torch.float32 or not torch.equal(rounded, losses)  # the teacher's last bits matter


@COMPILED
@pytest.mark.parametrize("out", TYPES)
@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("divergence", ["ab", "akl", "alphanet:0.2,0.8,batch"])
def test_gradient_in_another_type(divergence, source, out):
    student, teacher = (x.to(source) for x in mild_logits(3, 1003))
    spec = LossSpec(parse(divergence), 2.0, 0.3)
    wide, narrow = torch.empty(3, 1003), torch.empty(3, 1024, dtype=out)[:, :1003]
    losses = row_ops.row_losses(Rows(student, teacher, LABELS, spec), wide)
    assert torch.equal(row_ops.row_losses(Rows(student, teacher, LABELS, spec), narrow), losses)
    assert torch.equal(narrow, wide.to(out))


@COMPILED
def test_a_gradient_of_another_type_can_not_overwrite_the_logits():
    student, teacher = mild_logits(3, 8)
    place = student.flatten().view(torch.bfloat16)[:24].view(3, 8)
    with pytest.raises(RuntimeError, match="in place of the logits must have their dtype"):
        row_ops.row_losses(Rows(student, teacher, None, LossSpec(AlphaBeta())), place)


def leaves(tokens, vocab, width, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    return hidden.requires_grad_(), weight.requires_grad_()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    scales=st.tuples(st.floats(0.05, 4), st.floats(0.05, 4)),
    softcaps=st.tuples(st.none() | st.floats(0.5, 50), st.none() | st.floats(0.5, 50)),
    divergence=st.sampled_from([*ALL, None]),
    seed=st.integers(0, 100),
)
def test_fused_losses_map_logits(scales, softcaps, divergence, seed):
    (hidden, weight), (states, head) = leaves(5, 37, 8, seed), leaves(5, 37, 4, seed + 1)
    labels = torch.tensor([3, -100, 0, 36, 7])
    student, teacher = (LogitMap(a, b or 0.0) for a, b in zip(scales, softcaps, strict=True))
    if divergence is None:
        options = {"student_logit_scale": scales[0], "student_softcap": softcaps[0]}
        loss = fused_linear_cross_entropy(hidden, weight, labels, chunk_tokens=2, **options)
        plain = torch.nn.functional.cross_entropy(student(hidden @ weight.T), labels)
    else:
        names = "student_logit_scale", "teacher_logit_scale", "student_softcap", "teacher_softcap"
        options = dict(zip(names, (*scales, *softcaps), strict=True))
        kind = parse(divergence)
        loss = fused_linear_divergence(hidden, weight, states, head, kind, labels, chunk_tokens=2, **options)
        plain = divergence_loss(student(hidden @ weight.T), teacher((states @ head.T).detach()), kind, labels)
    got = loss, *torch.autograd.grad(loss, (hidden, weight))
    expected = plain, *torch.autograd.grad(plain, (hidden, weight))
    for mine, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_logit_scale": 0.0}, "student_logit_scale is 0.0, expected a positive number"),
        ({"teacher_softcap": -1.0}, "teacher_softcap is -1.0, expected a positive number, or None for no softcap"),
        ({"student_softcap": float("nan")}, "student_softcap is nan, expected a positive number"),
    ],
)
def test_maps_out_of_range(change, message):
    (hidden, weight), (states, head) = leaves(5, 37, 8, 0), leaves(5, 37, 4, 1)
    with pytest.raises(ValueError, match=message):
        fused_linear_divergence(hidden, weight, states, head, AlphaBeta(), **change)


def test_reference_maps_large_logits():
    student = torch.tensor([[1e4, -1e4, 0.0, float("inf")]])
    assert LogitMap(1.0, 30.0).slope(student).tolist() == [[0.0, 0.0, 1.0, 0.0]]
    gradient = torch.empty_like(student)
    spec = LossSpec(AlphaBeta(), student_map=LogitMap(1.0, 30.0))
    assert reference.row_losses(Rows(student, torch.zeros(1, 4), None, spec), gradient).isfinite().all()
    assert gradient.isfinite().all()
