"""Runs the CUDA kernel's own source on the host: see emulator/cuda_on_host.h.

The program is built twice: with AddressSanitizer and UndefinedBehaviorSanitizer, and with a detector of races. Planted
faults show that each build would report them.
"""

import dataclasses
import itertools
import math
import platform
import re
import shutil
import struct

import pytest
import torch
from emulated_kernel import (
    HEADERS,
    RACES,
    SANITIZE,
    SOURCES,
    STATISTICS_BYTES,
    Compilation,
    Launch,
    Layout,
    Result,
    expected_of,
    report,
    run,
    same,
)

from abkd_fast.losses import divergences, reference
from abkd_fast.losses.arguments import LogitMap
from oracle import independent_logits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
POINTS = ["ab:1,0", "ab:0,1", "ab:0,0", "ab:0.5,-0.5", "ab:2,-1", "ab:1,1"]
FAMILIES = [
    divergences.parse(name)
    for name in ("ab", "hellinger", "alphanet:0.2,0.8,batch", "wsd", "bdkd", "akl", "jsd", "tvd")
]
FAMILIES.append(divergences.CrossEntropy())
OTHERS = [divergences.parse(text) for text in [*divergences.BY_NAME, *POINTS]]

# As on a GPU (see test_gpu.py).
FLOAT32 = 3e-5
FLOAT32_UNWEIGHTED = 4 * FLOAT32
# What online.cuh promises for losses, and for gradients beyond their rounding, where results have 16 bits.
ONE_PASS_LOSS, ONE_PASS_GRADIENT = 1e-3, 1e-4


def spelling(divergence):
    return "ce" if isinstance(divergence, divergences.CrossEntropy) else str(divergence)


every_family = pytest.mark.parametrize("divergence", FAMILIES, ids=spelling)
every_divergence = pytest.mark.parametrize("divergence", dict.fromkeys(FAMILIES + OTHERS), ids=spelling)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

pytestmark = [
    pytest.mark.skipif(HEADERS is None, reason="no CUDA headers in CUDA_HOME, beside nvcc, or among the nvidia wheels"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
    pytest.mark.skipif(platform.system() != "Linux", reason="the emulator is made for Linux"),
]


@pytest.fixture(scope="module")
def compilations(tmp_path_factory):
    """Both builds, started at the same time."""
    folder = tmp_path_factory.mktemp("emulator")
    return {
        "sanitized": Compilation(folder / "sanitized", SANITIZE, SANITIZE),
        "races": Compilation(folder / "races", RACES, ["-no-pie"]),
    }


@pytest.fixture(scope="module")
def sanitized(compilations):
    return compilations["sanitized"].finish()


@pytest.fixture(scope="module")
def races(compilations):
    return compilations["races"].finish()


# ---- data


def logits(count, vocab, dtype=torch.float32, seed=0):
    """Student and teacher logits, roughly alike. A larger vocabulary has a sharper distribution."""
    generator = torch.Generator().manual_seed(seed)
    common, student, teacher = torch.randn(3, count, vocab, generator=generator)
    scale = min(3.0, math.log(vocab))
    return tuple((scale * (common + 0.5 * x)).to(dtype) for x in (student, teacher))


def make(divergence, count, vocab, dtype, seed=0, **options):
    student, teacher = logits(count, vocab, dtype, seed)
    if isinstance(divergence, divergences.CrossEntropy):
        teacher, options["hard_weight"] = None, 1.0
        options.setdefault("labels", torch.arange(count) * 7919 % vocab)
    return Launch(student, teacher, divergence, **options)


def kept_rows(divergence):
    return range(2 if isinstance(divergence, divergences.CrossEntropy) else 3)


def may_take_one_pass(launch):
    """Whether online.cuh allows the sums of this launch in one pass. The rows decide whether it is taken."""
    narrow = launch.out if launch.gradient != "none" else launch.student.dtype
    families = divergences.Family.WEIGHTED_KL, divergences.Family.BALANCED_KL, divergences.Family.ALPHA_NET
    alpha, beta = [*launch.divergence.parameters, 0, 0][:2]
    allowed = launch.divergence.family in families
    if launch.divergence.family == divergences.Family.ALPHA_BETA:
        allowed = min(alpha, beta) > 0 and alpha * beta >= 1 / 64 and alpha + beta <= 4
    return allowed and narrow != torch.float32 and launch.mode in ("none", "written")


def assert_close(result, launch):
    losses, gradient = expected_of(launch)
    divergence = launch.divergence
    weighted = divergence.family != divergences.Family.ALPHA_BETA or abs(sum(divergence.parameters)) >= 0.1
    of_loss = of_gradient = FLOAT32 if weighted else FLOAT32_UNWEIGHTED
    if may_take_one_pass(launch):
        of_loss, of_gradient = ONE_PASS_LOSS, ONE_PASS_GRADIENT
    if result.losses is not None:
        assert (result.losses.double() - losses).abs().le(of_loss * losses.abs()).all()
    if result.gradient is None:
        return
    information = torch.finfo(launch.out)
    rounding = 0 if launch.out == torch.float32 else information.eps / 2
    smallest = information.smallest_normal * information.eps
    within = gradient.abs().amax(1) < information.max  # the type has no larger numbers
    excess = ((result.gradient.double() - gradient).abs() - rounding * gradient.abs() - smallest).clamp(min=0)
    size = gradient.norm(dim=1)
    size = size.clamp(min=0.01) if may_take_one_pass(launch) else size
    assert (excess.norm(dim=1) <= of_gradient * size)[within].all()


# ---- the kernel


LAYOUTS = [
    (Layout(), Layout(), Layout()),
    (Layout(1, 2), Layout(0, 1), Layout(3, 4)),
    (Layout(3, 5), Layout(3, 5), Layout(0, 0)),
    (Layout(8, 13), Layout(7, 1), Layout(16, 3)),
]


@every_dtype
@every_divergence
def test_agrees_with_reference(sanitized, divergence, dtype):
    launches = []
    for i, vocab in enumerate([1, 3, 7, 1000, 1003, 2050, 5003]):
        for j in range(1 if vocab > 2000 else 2):
            turn = i + 2 * j
            kept = turn % len(kept_rows(divergence))
            launches.append(make(divergence, 2, vocab, dtype, turn, layouts=LAYOUTS[turn % 4], kept=kept, order=turn))
    labels = torch.tensor([999, -100, 0])
    for kept, temperature in enumerate([0.7, 2.0]):
        options = {"labels": labels, "hard_weight": 0.3, "temperature": temperature, "kept": kept}
        upstream = torch.tensor([0.5, 3.0, -2.0])
        launches.append(make(divergence, 3, 1000, dtype, layouts=LAYOUTS[1], order=9, upstream=upstream, **options))
    for launch, result in zip(launches, run(sanitized, launches), strict=True):
        assert_close(result, launch)
        if launch.labels is not None and launch.labels.eq(-100).any():
            assert result.losses[1] == 0
            assert result.gradient[1].eq(0).all()


APART = [0.003, 0.03, 0.3, 3.0]  # how far the student's logits are from the teacher's


def apart(distance, count, vocab, seed=0):
    common, student = 3 * torch.randn(2, count, vocab, generator=torch.Generator().manual_seed(seed))
    return common + distance / 3 * student, common


@pytest.mark.parametrize("out", DTYPES[1:], ids=str)
@every_divergence
def test_one_pass_and_exact_passes(sanitized, divergence, out):
    """Rows that are near and far from the teacher, under each temperature, and with a part of cross-entropy."""
    launches = []
    for i, distance in enumerate(APART):
        student, teacher = apart(distance, 2, 2053, i)
        labels = torch.tensor([5, 777])
        if isinstance(divergence, divergences.CrossEntropy):
            launches.append(Launch(student, None, divergence, labels, hard_weight=1.0, gradient_dtype=out))
            continue
        for temperature, hard_weight in ((1.0, 0.0), (2.0, 0.0), (0.7, 0.3)):
            options = {"labels": labels, "temperature": temperature, "hard_weight": hard_weight, "kept": i % 3}
            launches.append(Launch(student, teacher, divergence, gradient_dtype=out, **options))
    for launch, result in zip(launches, run(sanitized, launches), strict=True):
        assert_close(result, launch)


CENTERED = "jsd:0.5 sfkl:0.1 srkl:0.1 tvd hellinger alpha:0.3 alpha:0.8 alphanet:0.2,0.8,batch alphanet:0.3,2,batch"
ONE_PASS = ["ab", "hellinger", "alphanet:0.2,0.8,batch", "fkl", "rkl", "wsd", "bdkd"]


@pytest.mark.parametrize("name", ONE_PASS)
def test_one_pass_where_both_models_are_sure(sanitized, name):
    student, teacher = apart(1.0, 60, 53)
    sure = torch.linspace(0, 12, 60)
    student[:, 0] += sure
    teacher[:, 0] += sure.flip(0).roll(7)
    student[::3], teacher[::3] = student[::3] / 4, teacher[::3] / 4
    launches = [Launch(student, teacher, divergences.parse(name), gradient_dtype=x) for x in DTYPES[1:]]
    for launch, result in zip(launches, run(sanitized, launches), strict=True):
        assert_close(result, launch)


@pytest.mark.parametrize("mask", [-math.inf, -1e9, -3e4])
@pytest.mark.parametrize("name", ONE_PASS)
def test_one_pass_where_one_model_masks(sanitized, name, mask):
    for masked in (0, 1):
        pair = [x.clone() for x in apart(1.0, 4, 203)]
        pair[1 - masked][:, 5] -= torch.tensor([0.0, 3.0, 6.0, 20.0])  # the other model's probability there
        pair[masked][:, 5] = mask
        kind = divergences.parse(name)
        exact, narrow = run(sanitized, [Launch(*pair, kind, gradient_dtype=x) for x in (None, torch.bfloat16)])
        torch.testing.assert_close(narrow.losses, exact.losses, rtol=ONE_PASS_LOSS, atol=0)
        torch.testing.assert_close(narrow.gradient.float(), exact.gradient, rtol=5e-3, atol=1e-5)


@pytest.mark.parametrize("name", ONE_PASS)
def test_rows_near_the_teacher_take_the_exact_passes(sanitized, name):
    divergence = divergences.parse(name)
    for distance, near in ((APART[0], True), (APART[-1], False)):
        student, teacher = apart(distance, 2, 2053)
        wide, narrow = (Launch(student, teacher, divergence, gradient_dtype=x) for x in (None, torch.bfloat16))
        exact, result = run(sanitized, [wide, narrow])
        assert same(result.losses, exact.losses) == near
        assert not near or same(result.gradient, exact.gradient.bfloat16())


@pytest.mark.parametrize("student", DTYPES, ids=str)
@pytest.mark.parametrize("teacher", DTYPES, ids=str)
@every_family
def test_types_and_maps_of_each_model(sanitized, divergence, teacher, student):
    if isinstance(divergence, divergences.CrossEntropy) and teacher != student:
        pytest.skip("it has no teacher")
    z, y = logits(2, 1003)
    maps = (LogitMap(), LogitMap()), (LogitMap(0.5), LogitMap(2.0)), (LogitMap(1.0, 4.0), LogitMap(0.5, 30.0))
    launches = []
    for i, (out, map_pair) in enumerate(itertools.product(DTYPES, maps)):
        options = {"labels": torch.tensor([5, 777]), "hard_weight": 0.3, "temperature": 2.0, "maps": map_pair}
        options |= {"gradient_dtype": out, "kept": i % len(kept_rows(divergence)), "layouts": LAYOUTS[i % 4]}
        of_teacher = None if isinstance(divergence, divergences.CrossEntropy) else y.to(teacher)
        launches.append(Launch(z.to(student), of_teacher, divergence, **options))
    for launch, result in zip(launches, run(sanitized, launches), strict=True):
        assert_close(result, launch)


@pytest.mark.parametrize("kept", [0, 1, 2])
@pytest.mark.parametrize("divergence", CENTERED.split())
def test_distributions_that_hardly_overlap(sanitized, divergence, kept):
    """In float32 and 16 bits. The statistics of either make the same gradient in float32."""
    divergence = divergences.parse(divergence)
    launches = [
        Launch(*independent_logits(3, 20003), divergence, gradient_dtype=out, statistics="written", **options)
        for options in [{"kept": kept, "layouts": LAYOUTS[1]}]
        for out in DTYPES
    ]
    results = run(sanitized, launches)
    for launch, result in zip(launches, results, strict=True):
        assert_close(result, launch)
    given = [dataclasses.replace(launches[0], kept=0, statistics=result.statistics) for result in results]
    for launch, result in zip(given, run(sanitized, given), strict=True):
        assert_close(result, launch)


@every_dtype
def test_sums_of_both_branches(sanitized, dtype):
    student, teacher = logits(3, 1003, dtype)
    kind = divergences.parse("alphanet:0.3,0.8,token")
    branches = [Launch(student, teacher, x, gradient="none", statistics="written") for x in kind.branches]
    expected = run(sanitized, branches)
    statistics = torch.frombuffer(bytearray(expected[0].statistics), dtype=torch.float64).view(3, 6).clone()
    statistics[:, reference.STATE] = reference.BOTH_BRANCHES
    given = {"statistics": statistics.numpy().tobytes(), "sums": True}
    result = run(sanitized, [Launch(student, teacher, kind, gradient="none", **given)])[0]
    second = torch.frombuffer(bytearray(result.statistics), dtype=torch.float64).view(3, 6)[:, reference.SLOPE]
    bound = FLOAT32 if dtype == torch.float32 else ONE_PASS_LOSS
    torch.testing.assert_close(result.losses, expected[0].losses, rtol=bound, atol=0)
    torch.testing.assert_close(second.float(), expected[1].losses, rtol=bound, atol=0)


@every_dtype
@every_family
def test_results_depend_on_nothing_else(sanitized, divergence, dtype):
    """The order of threads, the rows kept in shared memory and the place of the gradient do not change a bit, and the
    statistics make the same gradient again."""
    options = {"labels": torch.tensor([5, 777]), "hard_weight": 0.3, "layouts": LAYOUTS[1], "statistics": "written"}
    launches = [
        make(divergence, 2, 2103, dtype, kept=kept, order=order, gradient=gradient, **options)
        for kept, (order, gradient) in itertools.product(
            kept_rows(divergence), [(0, "apart"), (1, "in place"), (7, "apart"), (8, "none")]
        )
    ]
    results = run(sanitized, launches)
    first = results[0]
    for result in results:
        assert same(result.losses, first.losses)
        assert result.gradient is None or same(result.gradient, first.gradient)
        assert result.statistics == first.statistics
    options["statistics"] = first.statistics
    upstream = torch.tensor([2.0, -0.5])  # powers of 2 change no digit
    again = [
        make(divergence, 2, 2103, dtype, gradient=gradient, order=order, upstream=upstream, **options)
        for order, gradient in [(0, "apart"), (1, "in place"), (9, "apart")]
    ]
    made = run(sanitized, again)
    assert all(same(result.gradient, made[0].gradient) for result in made)
    if dtype == torch.float32:
        assert same(made[0].gradient, first.gradient * upstream[:, None])
    else:
        assert_close(made[0], again[0])


@every_dtype
@every_family
def test_passes_one_by_one_over_parts_of_the_vocabulary(sanitized, divergence, dtype):
    labels, cuts = torch.tensor([3, 1002, 500]), [slice(0, 500), slice(500, 500), slice(500, 1003)]
    options = {"labels": labels, "temperature": 2.0, "hard_weight": 0.3, "layouts": LAYOUTS[1]}
    whole = make(divergence, 3, 1003, dtype, statistics="written", **options)

    def part(x, **changes):
        teacher = None if whole.teacher is None else whole.teacher[:, x]
        return dataclasses.replace(whole, student=whole.student[:, x], teacher=teacher, **changes)

    def numbers(result):
        return torch.frombuffer(bytearray(result.statistics), dtype=torch.float64).view(3, 6)

    expected = run(sanitized, [whole])[0]
    merged = numbers(expected)
    options = {"labels": None, "gradient": "none", "statistics": "normalizers"}
    normalizers = run(sanitized, [part(x, **options) for x in cuts])
    merged[:, :3] = torch.stack([numbers(x)[:, :3] for x in normalizers]).logsumexp(0)
    losses = whole.hard_weight * (merged[:, 2] - whole.student.gather(1, labels[:, None])[:, 0].double())
    if whole.teacher is not None:
        options |= {"hard_weight": 0.0, "statistics": merged.numpy().tobytes(), "sums": True}
        sums = run(sanitized, [part(x, **options) for x in cuts])
        losses += (1 - whole.hard_weight) * sum(x.losses.double() for x in sums)
        merged[:, 3] = sum(numbers(x)[:, 3] for x in sums)
    torch.testing.assert_close(losses.float(), expected.losses, rtol=FLOAT32, atol=0)
    local = [torch.where((labels >= x.start) & (labels < x.stop), labels - x.start, -1) for x in cuts]
    given = merged.numpy().tobytes()
    gradients = run(sanitized, [part(x, labels=y, statistics=given) for x, y in zip(cuts, local, strict=True)])
    assert_close(Result(None, torch.cat([x.gradient for x in gradients], 1), None), whole)


@every_dtype
@every_family
def test_rows_that_are_no_distributions(sanitized, divergence, dtype):
    plain = make(divergence, 3, 1003, dtype, labels=torch.tensor([3, 4, 5]), hard_weight=0.3)

    def changed(row, tokens, value, **options):
        student = plain.student.clone()
        student[row, tokens] = value
        return dataclasses.replace(plain, student=student, **options)

    teacher = None if plain.teacher is None else plain.teacher.clone()
    if teacher is not None:
        teacher[:, 100:200] = -math.inf
    masked = changed(slice(None), slice(100, 200), -math.inf, teacher=teacher)
    launches = {
        "plain": plain,
        "impossible": dataclasses.replace(plain, labels=torch.tensor([3, 1003, -1])),
        "broken": changed(1, 500, math.nan),
        "empty": changed(1, slice(None), -math.inf),
        "ignored": changed(1, 500, math.nan, labels=torch.tensor([3, -100, 5]), statistics="written"),
        "masked": masked,
    }
    results = dict(zip(launches, run(sanitized, launches.values()), strict=True))
    assert results["impossible"].losses.isnan().tolist() == [False, True, True]
    assert results["broken"].losses.isnan().tolist() == [False, True, False]
    assert results["broken"].gradient.isnan().all(1).tolist() == [False, True, False]
    ignored = results["ignored"]
    assert ignored.losses[1] == 0
    assert ignored.gradient[1].eq(0).all()
    assert ignored.statistics[STATISTICS_BYTES : 2 * STATISTICS_BYTES] == bytes(STATISTICS_BYTES)
    assert_close(results.pop("masked"), masked)
    for result in results.values():  # the other rows are not affected
        assert same(result.losses[:1], results["plain"].losses[:1])
        assert same(result.gradient[0], results["plain"].gradient[0])


def launches_of_every_kind(divergence, dtype):
    copies = kept_rows(divergence)
    shapes = [(50, kept, gradient) for kept in copies for gradient in ("apart", "in place")]
    shapes.append((2100, copies[-1], "in place"))
    options = {"labels": torch.tensor([1, -100, 2]), "hard_weight": 0.3, "temperature": 2.0, "layouts": LAYOUTS[1]}
    launches = [
        make(divergence, 3, vocab, dtype, kept=kept, order=kept, gradient=gradient, statistics="written", **options)
        for vocab, kept, gradient in shapes
    ]
    statistics = struct.pack("6d", 5.0, 5.0, 5.0, 1.0, 1.0, 0.0) * 3
    return [*launches, make(divergence, 3, 50, dtype, statistics=statistics, **options)]


@every_family
def test_no_races(races, divergence):
    run(races, [launch for dtype in DTYPES[:2] for launch in launches_of_every_kind(divergence, dtype)])


# ---- planted faults

BARRIERS = [
    f"{path.name}:{number}"
    for path in sorted(SOURCES.glob("*.cuh"))
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if "__syncthreads();" in line
]


@pytest.mark.parametrize("place", BARRIERS)
def test_without_a_barrier_threads_race(races, place):
    chosen = [divergences.parse(name) for name in ("akl", "alphanet:0.2,0.8,batch")]
    launches = [launch for x in chosen for dtype in DTYPES[:2] for launch in launches_of_every_kind(x, dtype)]
    assert "race: thread" in report(races, launches, place)


def test_without_a_barrier_the_order_of_threads_matters(sanitized):
    launches = [make(divergences.AlphaBeta(), 1, 1003, torch.float32, order=order) for order in (0, 1)]
    results = [run(sanitized, launches, place) for place in BARRIERS if place.startswith("reduce.cuh")]
    assert any(not same(first.gradient, last.gradient) for first, last in results)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A build of a copy of the sources with a fault in each of these places. PLANTED_FAULT names the active one."""
    shuffle = "numbers[i] = operation(numbers[i], __shfl_xor_sync(0xffffffffu, numbers[i], offset));"
    replacements = {
        "tail": (
            "i < cut.vocab - cut.packs * kPack; i += kThreads) {",
            "i < cut.vocab + {} - cut.packs * kPack; i += kThreads) {",
        ),
        "head": ("head = to_boundary;", "head = to_boundary - {};"),
        "room": ("(vocab + kPack) * size_of(dtype)", "(vocab + kPack * !{}) * size_of(dtype)"),
        "alignment": ("together = !rows.teacher.data", "together = {} || !rows.teacher.data"),
        "barrier": (
            "__syncthreads();\n#pragma unroll\n",
            "if (!{} || threadIdx.x != 7) __syncthreads();\n#pragma unroll\n",
        ),
        "return": (
            "if (!token.rows.gradient) return true;\n",
            "if (!token.rows.gradient || ({} && threadIdx.x > 40)) return true;\n__syncthreads();\n",
        ),
        "shuffle": (
            f"{shuffle}\n  }}\n  const int",
            f"if (!{{}} || threadIdx.x) {shuffle}\n  }}\n  const int",
        ),
    }
    folder = tmp_path_factory.mktemp("csrc")
    shutil.copytree(SOURCES.parent, folder, dirs_exist_ok=True)
    headers = sorted((folder / "cuda").glob("*.cuh"), key=lambda path: path.name != "packs.cuh")  # the first included
    texts = [path.read_text() for path in headers]
    for fault, (old, new) in replacements.items():
        counts = [text.count(old) for text in texts]
        assert sum(counts) == 1, f"{old!r} is no longer in the kernel, once"
        texts = [text.replace(old, new.replace("{}", f'planted("{fault}")')) for text in texts]
    planted = """namespace abkd::cuda {
inline bool planted(const char* fault) { return std::strcmp(std::getenv("PLANTED_FAULT"), fault) == 0; }
"""
    texts[0] = texts[0].replace("namespace abkd::cuda {\n", planted, 1)
    for path, text in zip(headers, texts, strict=True):
        path.write_text(text)
    flags = [*SANITIZE, "-DROWS_ON_HOST_BRIEF"]
    return Compilation(folder / "faulty", flags, SANITIZE, kernel=folder / "cuda").finish()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("tail", "heap-buffer-overflow"),
        ("head", "misaligned address"),
        ("room", "use-after-poison"),
        ("alignment", "misaligned address"),
        ("barrier", r"thread 0 is at the barrier of reduce.cuh:\d+:\d+, thread 7 is at the shuffle of reduce.cuh"),
        ("return", r"thread 0 is at the barrier of rows.cuh:\d+:\d+, thread 41 has finished"),
        ("shuffle", r"threads part: thread 0 is at the \w+ of reduce.cuh:\d+:\d+, thread 1 is at the shuffle"),
    ],
)
def test_planted_faults_are_reported(faulty, fault, message):
    in_step = Layout(3), Layout(3), Layout(7)  # the second element is the first on a 16-byte boundary
    options = {"kept": 2, "layouts": LAYOUTS[1] if fault == "alignment" else in_step}
    launch = make(divergences.AlphaNet(per="batch"), 1, 1004, torch.float32, gradient_dtype=torch.bfloat16, **options)
    assert re.search(message, report(faulty, [launch], PLANTED_FAULT=fault))
    run(faulty, [launch], PLANTED_FAULT="")
