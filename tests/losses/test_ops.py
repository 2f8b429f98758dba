import functools
import os
import pathlib
import subprocess
import sys
import warnings

import pytest
import torch
import torch._functorch.config
from torch.autograd.gradcheck import GradcheckError

import abkd_fast
from abkd_fast import AlphaBeta, divergence_loss, fused_linear_cross_entropy, fused_linear_divergence, parse
from abkd_fast.losses import reference, row_ops
from abkd_fast.losses.arguments import LossSpec, Rows
from oracle import ALPHA_BETA, FAMILIES, SMOOTH, gpt2_like_logits, mild_logits, relative_errors
from row_kernels import ALL, COMPILED, FLOAT32, FLOAT64, kernel

LABELS = torch.tensor([1, -100, 4])
ROW_OPTIONS = (2.0, 0.3)  # temperature, hard_weight


def spec_of(divergence):
    return LossSpec(parse(divergence), *ROW_OPTIONS)


# ---- row_losses and row_gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("divergence", ALL)
def test_statistics_are_all_that_the_gradient_needs(divergence, dtype):
    student, teacher = mild_logits(5, 2050, dtype)
    rows = Rows(student, teacher, torch.tensor([3, -100, 0, 49, 1]), spec_of(divergence))
    upstream = torch.tensor([0.5, 7.0, -2.0, 0.0, 3.0], dtype=torch.float64 if dtype == torch.float64 else None)
    gradient, scaled, later = (torch.empty_like(student) for _ in range(3))
    losses = row_ops.row_losses(rows, gradient=gradient)
    statistics = torch.full((5, row_ops.STATISTICS), torch.nan, dtype=torch.float64)
    if row_ops._C is None:
        statistics.zero_()
    for options in ({}, {"gradient": scaled, "upstream": upstream}):
        assert torch.equal(row_ops.row_losses(rows, statistics=statistics, **options), losses)
    row_ops.row_gradients(rows, statistics, upstream, later)
    # Each element, and the few products that it is made of, are rounded once more or once less.
    bound, kept = 4 * torch.finfo(dtype).eps, [0, 2, 4]
    assert relative_errors(scaled[kept], gradient[kept].double() * upstream[kept, None]).max() < bound
    assert relative_errors(later[kept], scaled[kept]).max() < bound
    assert scaled[[1, 3]].eq(0).all()
    assert later[[1, 3]].eq(0).all()
    row_ops.row_gradients(rows, statistics, upstream, student)
    assert torch.equal(student, later)


@pytest.mark.parametrize("divergence", [x for x in ALL if x != "alphanet:0.2,0.8,batch"])
def test_reference_has_the_same_doors(divergence):
    student, teacher = mild_logits(5, 50, torch.float64)
    rows = Rows(student, teacher, torch.tensor([3, -100, 0, 49, 1]), spec_of(divergence))
    upstream = torch.randn(5, dtype=torch.float64)
    results = []
    for module in (row_ops, reference):
        statistics, gradient, later = torch.zeros(5, 6).double(), torch.empty_like(student), torch.empty_like(student)
        losses = module.row_losses(rows, gradient, statistics, upstream)
        module.row_gradients(rows, statistics, upstream, later)
        results.append((losses, gradient, later))
    for mine, slow in zip(*results, strict=True):
        torch.testing.assert_close(mine, slow, rtol=FLOAT64, atol=1e-14)  # elements of 1e-3, made from terms of .1


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("divergence", ALL)
def test_passes_one_by_one_over_parts_of_the_vocabulary(monkeypatch, divergence, compiled):
    if compiled and row_ops._C is None:
        pytest.skip("the extension is missing")
    monkeypatch.setattr(row_ops, "_compiled", lambda _: compiled)
    labels, spec = torch.tensor([3, 12, 13, 49]), spec_of(divergence)
    cuts = [slice(0, 13), slice(13, 13), slice(13, 50)]
    for dtype, bound in ((torch.float32, FLOAT32), (torch.float64, 1e-12)):
        rows = mild_logits(4, 50, dtype)
        gradient, upstream = torch.empty_like(rows[0]), torch.tensor([0.5, 7.0, -2.0, 3.0], dtype=dtype)
        whole = torch.zeros(4, row_ops.STATISTICS, dtype=torch.float64)
        losses = row_ops.row_losses(Rows(*rows, labels, spec), gradient, whole, upstream)
        parts = [[x[:, cut].contiguous() for x in rows] for cut in cuts]
        merged = whole.clone()  # its last two columns are the decisions for whole rows
        normalizers = torch.stack([row_ops.row_normalizers(Rows(*x, None, spec)) for x in parts])
        merged[:, :3] = normalizers[:, :, :3].logsumexp(0)
        values, slopes = 0, 0
        for student, teacher in parts:
            values = values + row_ops.row_sums(Rows(student, teacher, None, spec), merged)
            slopes = slopes + merged[:, reference.SLOPE]
        merged[:, reference.SLOPE] = slopes
        assert relative_errors(merged[:, :3].T, whole[:, :3].T).max() < bound
        hard = merged[:, 2] - rows[0].gather(1, labels[:, None])[:, 0]
        assert relative_errors((1 - spec.hard_weight) * values + spec.hard_weight * hard, losses).max() < bound
        for (student, teacher), cut in zip(parts, cuts, strict=True):
            local = torch.where((labels >= cut.start) & (labels < cut.stop), labels - cut.start, -1)
            row_ops.row_gradients(Rows(student, teacher, local, spec), merged, upstream, student)
        assert relative_errors(torch.cat([x for x, _ in parts], 1), gradient).max() < bound


@COMPILED
def test_a_label_elsewhere_is_for_gradients_alone():
    student, teacher = mild_logits(3, 9)
    rows = Rows(student, teacher, torch.tensor([0, -2, -1]), spec_of("ab"))
    with pytest.raises(RuntimeError, match=r"labels\[1\] is -2, expected -100 or 0 to 8"):
        row_ops.row_gradients(rows, torch.zeros(3, 6).double(), torch.ones(3), student)


@pytest.mark.parametrize("divergence", ALL)
def test_gradient_may_overwrite_the_student(divergence):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        student, teacher = mild_logits(5, 2050, dtype)
        rows = Rows(student, teacher, torch.tensor([3, -100, 0, 49, 1]), spec_of(divergence))
        gradient = torch.empty_like(student)
        expected = row_ops.row_losses(rows, gradient=gradient)
        assert torch.equal(row_ops.row_losses(rows, gradient=student), expected)
        assert torch.equal(student, gradient)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_logits_of_a_batch(reduction):
    """Models give [B, T, V]; a shift by one token leaves a view."""
    student, teacher = (x.view(2, 4, 9)[:, :-1].requires_grad_(i == 0) for i, x in enumerate(mild_logits(8, 9)))
    labels = torch.tensor([[1, -100, 8], [0, 3, -100]])
    options = {"hard_weight": 0.3, "reduction": reduction}
    loss = divergence_loss(student, teacher, AlphaBeta(), labels, **options)
    rows = [x.detach().reshape(6, 9).requires_grad_() for x in (student, teacher)]
    expected = divergence_loss(*rows, AlphaBeta(), labels.flatten(), **options)
    assert loss.shape == (labels.shape if reduction == "none" else ())
    assert torch.equal(loss.flatten(), expected.flatten())
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    (expected,) = torch.autograd.grad(expected.sum(), rows[0])
    assert torch.equal(gradient.reshape(6, 9), expected)
    for wrong in (labels.flatten(), labels[:, :2]):
        with pytest.raises(ValueError, match=r"expected \[2, 3\], one for each row of logits"):
            divergence_loss(student, teacher, AlphaBeta(), wrong)
    with pytest.raises(ValueError, match="alike but for V"):
        divergence_loss(student, teacher[:1], AlphaBeta())


@COMPILED
@pytest.mark.parametrize("label", [5, -1, -101])
def test_labels_out_of_range(label):
    labels, message = torch.tensor([0, label, 2]), rf"labels\[1\] is {label}, expected -100 or 0 to 4"
    with pytest.raises(ValueError, match=message):
        divergence_loss(*mild_logits(3, 5), AlphaBeta(), labels, hard_weight=0.5)
    hidden, weight = torch.randn(3, 8), torch.randn(5, 8)
    with pytest.raises(ValueError, match=message):
        fused_linear_cross_entropy(hidden, weight, labels)
    for reduction in ("mean", "none"):
        options = {"hard_weight": 0.5, "reduction": reduction}
        with pytest.raises(ValueError, match=message):
            fused_linear_divergence(hidden, weight, hidden, weight, AlphaBeta(), labels, **options)
    fused_linear_divergence(hidden, weight, hidden, weight, AlphaBeta(), labels)  # hard_weight is 0: not read


@COMPILED
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"statistics": torch.zeros(3, 5).double()}, "statistics must be contiguous float64"),
        ({"statistics": torch.zeros(3, 6)}, "statistics must be contiguous float64"),
        ({"statistics": torch.zeros(2, 6).double()}, "statistics must be contiguous float64"),
        ({"upstream": torch.zeros(3).double()}, "upstream must be contiguous"),
        ({"upstream": torch.zeros(2)}, "upstream must be contiguous"),
        ({"upstream": torch.zeros(1).expand(3)}, "upstream must be contiguous"),
        ({"gradient": torch.zeros(3, 8)}, "gradient must have the shape"),
        ({"gradient": torch.zeros(3, 9).double()}, "gradient must be float64 if student is"),
        ({"gradient": torch.zeros(9, 3).T}, "gradient must have rows without gaps"),
        ({"teacher": torch.zeros(3, 9).double()}, "teacher must be float64 if student is"),
        ({"maps": [1.0]}, "maps must have 4 numbers, got 1"),
        ({"teacher": None}, "needs teacher"),
        ({"family": 99}, "unknown family 99"),
        ({"parameters": [0.1]}, "has 2 parameters, got 1"),
    ],
)
def test_wrong_operands(change, message):
    student, teacher = mild_logits(3, 9)
    call = {"student": student, "teacher": teacher, "labels": None, "family": 1, "parameters": [0.2, 0.7]}
    call |= {"temperature": 1.0, "hard_weight": 0.0, "maps": [], "gradient": None, "statistics": None, "upstream": None}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.abkd_fast.row_losses(**call | change)
    if "gradient" in change or "upstream" in change or "statistics" in change:
        call |= {"gradient": student, "statistics": torch.zeros(3, 6).double(), "upstream": torch.ones(3)}
        with pytest.raises(RuntimeError, match=message):
            torch.ops.abkd_fast.row_gradients(**call | change)


# ---- autograd


def loss_of(z, teacher, divergence, reduction, options=ROW_OPTIONS):
    temperature, hard_weight = options
    numbers = {"temperature": temperature, "hard_weight": hard_weight, "reduction": reduction}
    kind = parse(divergence) if isinstance(divergence, str) else divergence
    return divergence_loss(z, teacher, kind, LABELS, **numbers)


# AKL's weights depend on the student, but are constants for the gradient. BDKD's weights, AlphaNet's branch and the
# sign of p - q change in steps, and these logits are not near a step.
@pytest.mark.parametrize(
    "divergence", [*ALPHA_BETA, *SMOOTH, "bdkd", "alphanet:0.2,0.8,batch", "alphanet:0.2,0.8,token", "tvd"]
)
@pytest.mark.parametrize("options", [(1.0, 0.0), ROW_OPTIONS])
def test_gradcheck(divergence, options):
    student, teacher = mild_logits(3, 6, torch.float64)
    for reduction in ("none", "mean"):
        assert torch.autograd.gradcheck(
            functools.partial(loss_of, teacher=teacher, divergence=divergence, reduction=reduction, options=options),
            student.requires_grad_(),
        )


@pytest.mark.parametrize("point", [(1e-5, 0.7), (0.7, -1e-5)])
def test_gradcheck_near_a_limit(point):
    student, teacher = mild_logits(3, 6, torch.float64)
    assert torch.autograd.gradcheck(lambda z: divergence_loss(z, teacher, AlphaBeta(*point)), student.requires_grad_())


def test_gradcheck_notices_a_weight_that_is_not_constant():
    student, teacher = mild_logits(3, 6, torch.float64)
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda z: loss_of(z, teacher, "akl", "mean"), student.requires_grad_())


def test_double_backward_is_refused():
    student, teacher = mild_logits(3, 9)
    loss = divergence_loss(student.requires_grad_(), teacher, AlphaBeta())
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, student, create_graph=True)


@pytest.mark.parametrize("divergence", ["ab", "alphanet:0.2,0.8,batch"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_backward_twice(reduction, divergence):
    student, teacher = mild_logits(3, 9)
    expected = torch.autograd.grad(loss_of(student.requires_grad_(), teacher, divergence, reduction).sum(), student)[0]
    loss = loss_of(student, teacher, divergence, reduction).sum()
    # A gradient scaled in place would come back 8 times, then 64 times as large. Powers of 2 change no digit.
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(loss * 8, student, retain_graph=True)[0], 8 * expected)
    (loss * 8).backward()
    assert torch.equal(student.grad, 8 * expected)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_of_several_losses_add_up(dtype):
    student, teacher = mild_logits(3, 9, dtype)
    kinds, factors = ("ab", "tvd", "alphanet:0.2,0.8,batch"), (1.0, -2.0, 0.25)
    parts = [torch.autograd.grad(loss_of(student.requires_grad_(), teacher, x, "mean"), student)[0] for x in kinds]
    sum(factor * loss_of(student, teacher, x, "mean") for x, factor in zip(kinds, factors, strict=True)).backward()
    expected = sum(factor * part.double() for factor, part in zip(factors, parts, strict=True))
    # Each sum has a rounding error, on elements below 1.
    torch.testing.assert_close(student.grad.double(), expected, rtol=0, atol=torch.finfo(dtype).eps)


def test_no_gradient_flows_to_the_teacher():
    student, teacher = (x.requires_grad_() for x in mild_logits(3, 9))
    divergence_loss(student, teacher, AlphaBeta()).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("divergence", ["ab", "akl", "alphanet:0.2,0.8,batch"])
def test_no_grad_needs_no_gradient(divergence):
    student, teacher = mild_logits(3, 9)
    expected = divergence_loss(student, teacher, parse(divergence))
    with torch.no_grad():
        loss = divergence_loss(student.requires_grad_(), teacher, parse(divergence))
    assert not loss.requires_grad
    assert torch.equal(loss, expected)
    unneeded = torch.ops.abkd_fast.divergence(student, teacher, None, divergence, 1.0, 0.0, None, False)[2]
    assert unneeded.shape == (0,)


@pytest.mark.parametrize("divergence", ALL)
def test_same_bits_twice(divergence):
    student, teacher = gpt2_like_logits(9, 2503)
    first, second = (kernel(student, teacher, divergence) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


# ---- operators and compilation

ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
# Backward scales the operator's gradient in place. AOTAutograd could not return the gradient then, but divergence_loss
# does not return it (see test_compile).
CHECKS = ALL_CHECKS[:3]


@COMPILED
@pytest.mark.parametrize("divergence", ["ab", "akl", "jsd"])
def test_opcheck_row_operators(divergence):
    student, teacher = mild_logits(3, 9)
    kind = parse(divergence)
    maps = [0.5, 30.0, 1.0, 0.0]
    rows = (kind.family, kind.parameters, *ROW_OPTIONS, maps)
    statistics, upstream = torch.zeros(3, 6).double(), torch.tensor([1.0, 2.0, -1.0])
    for written in ((None, None, None), (torch.empty_like(student), None, None)):
        torch.library.opcheck(torch.ops.abkd_fast.row_losses, (student, teacher, LABELS, *rows, *written))
    written = (torch.empty_like(student), statistics, upstream)
    torch.library.opcheck(torch.ops.abkd_fast.row_losses, (student, teacher, LABELS, *rows, *written))
    row_ops.row_losses(Rows(student, teacher, LABELS, spec_of(divergence)), statistics=statistics)
    later = (statistics, upstream, torch.empty_like(student))
    torch.library.opcheck(torch.ops.abkd_fast.row_gradients, (student, teacher, LABELS, *rows, *later))
    torch.library.opcheck(torch.ops.abkd_fast.row_normalizers, (student, teacher, *ROW_OPTIONS, maps, statistics))
    torch.library.opcheck(torch.ops.abkd_fast.row_sums, (student, teacher, *rows[:3], maps, statistics))


@COMPILED
def test_opcheck_row_losses_without_teacher():
    student, _ = mild_logits(3, 9)
    torch.library.opcheck(torch.ops.abkd_fast.row_losses, (student, None, LABELS, 0, [], 1.0, 1.0, [], *[None] * 3))


@pytest.mark.parametrize("divergence", ["ab", "bdkd", "alphanet:0.2,0.8,batch"])
def test_opcheck_divergence(divergence):
    student, teacher = mild_logits(3, 9)
    for need, factors in ((True, None), (True, torch.tensor([1.0, 0.5, -1.0])), (False, None)):
        options = (divergence, *ROW_OPTIONS, factors, need)
        z = student.detach().requires_grad_(need)
        call = torch.ops.abkd_fast.divergence, (z, teacher, LABELS, *options)
        torch.library.opcheck(*call, test_utils=CHECKS if need else ALL_CHECKS, rtol=0, atol=0)


@pytest.mark.parametrize("upstream", [torch.tensor(2.0), torch.tensor(1.0), torch.randn(3, 1)])
def test_opcheck_scale(upstream):
    torch.library.opcheck(torch.ops.abkd_fast.scale_, (torch.randn(3, 9), upstream))


@torch._functorch.config.patch(donated_buffer=False)  # PyTorch demands it if a compiled graph is retained
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend, dynamic, monkeypatch, tmp_path):
    if backend == "inductor" and dynamic:
        pytest.skip("compiled once with inductor is enough, for time")
    # Inductor's cache on disk does not notice a change of our operators.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()

    def loss(z, y, labels):
        return divergence_loss(z * 2, y, AlphaBeta(), labels, temperature=2.0, hard_weight=0.3)

    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows in (3, 5) if dynamic else (3,):
        student, teacher = mild_logits(rows, 50)
        labels = torch.tensor([1, -100, 4, 0, 2])[:rows]
        results = []
        for run in (loss, compiled):
            z = student.clone().requires_grad_()
            value = run(z, teacher, labels)
            first = torch.autograd.grad(value * 4, z, retain_graph=True)[0]
            value.backward()
            assert torch.equal(first, 4 * z.grad)
            results.append((value.detach(), z.grad))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("divergence", FAMILIES)
def test_every_family_compiles(divergence, reduction):
    torch._dynamo.reset()
    student, teacher = mild_logits(3, 50)
    results = []
    for run in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
        z = student.clone().requires_grad_()
        value = run(z, teacher, parse(divergence), reduction)
        value.sum().backward()
        results.append((value.detach(), z.grad))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


# ---- builds

VARIANT = """
import sys, torch, abkd_fast
from row_kernels import kernel
from oracle import ALPHA_BETA, FAMILIES, gpt2_like_logits
results = {"simd": abkd_fast.build_info()["simd"]}
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    rows = [x.to(dtype) for x in gpt2_like_logits(3, 5003)]
    results |= {(str(dtype), x): kernel(*rows, x) for x in ALPHA_BETA + FAMILIES}
torch.save(results, sys.argv[1])
"""


@COMPILED
@pytest.mark.parametrize("simd", ["avx2", "baseline"])
def test_simd_variants(simd, tmp_path):
    capability = torch.backends.cpu.get_cpu_capability()
    if simd == "avx2" and capability not in ("AVX2", "AVX512"):
        pytest.skip(f"this processor has {capability}")
    environment = {**os.environ, "ABKD_SIMD": simd, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", VARIANT, tmp_path / "results.pt"], env=environment, check=True)
    results = torch.load(tmp_path / "results.pt")
    assert results.pop("simd") == simd
    # In bfloat16 the last digit of a float32 decides between two neighboring numbers, 2^-8 apart.
    bounds = {torch.float32: FLOAT32, torch.float64: FLOAT64, torch.bfloat16: 2**-8}
    for dtype, bound in bounds.items():
        rows = [x.to(dtype) for x in gpt2_like_logits(3, 5003)]
        for divergence in ALL:
            for got, expected in zip(results[str(dtype), divergence], kernel(*rows, divergence), strict=True):
                assert relative_errors(got, expected).max() < bound


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(row_ops, "_C", None)
    monkeypatch.setattr(row_ops, "_MISSING", "no such file", raising=False)
    monkeypatch.setattr(row_ops, "_warned", set())


@pytest.mark.parametrize("divergence", ALL)
def test_reference_takes_over_where_the_extension_is_missing(divergence, request):
    student, teacher = gpt2_like_logits(4, 1003)
    labels = torch.tensor([1, -100, 4, 1002])
    options = {"labels": labels, "temperature": 2.0, "hard_weight": 0.3}
    expected = kernel(student, teacher, divergence, **options)
    request.getfixturevalue("no_extension")
    with pytest.warns(RuntimeWarning, match="no such file") as caught:
        (losses, gradient), _ = (kernel(student, teacher, divergence, **options) for _ in range(2))
    assert len(caught) == 1
    assert abkd_fast.build_info()["missing"] == "no such file"
    torch.testing.assert_close(losses, expected[0], rtol=FLOAT32, atol=0)
    assert relative_errors(gradient[labels >= 0], expected[1][labels >= 0]).max() < FLOAT32
    if divergence == "alphanet:0.2,0.8,batch":
        return  # row_losses decides row by row
    in_place = student.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row_ops.row_losses(Rows(in_place, teacher, labels, spec_of(divergence)), gradient=in_place)
    assert torch.equal(in_place, gradient)


@pytest.mark.parametrize("divergence", ["akl", "alphanet:0.2,0.8,batch"])
def test_reference_takes_over_in_the_fused_loss(divergence, request):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in ((9, 8), (37, 8), (9, 12), (37, 12))]

    def run():
        hidden, weight, *teacher = (x.clone().requires_grad_() for x in tensors)
        loss = fused_linear_divergence(hidden, weight, *teacher, parse(divergence), chunk_tokens=4)
        loss.backward()
        return loss[None], hidden.grad, weight.grad

    expected = run()
    request.getfixturevalue("no_extension")
    with pytest.warns(RuntimeWarning, match="no such file"):
        got = run()
    for mine, exact in zip(got, expected, strict=True):
        assert relative_errors(mine.flatten()[None], exact.flatten()[None]).max() < FLOAT32
