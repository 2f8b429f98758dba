"""The CUDA kernel's own source, run on the host: see emulator/cuda_on_host.h.

Two builds of one program: with AddressSanitizer and UndefinedBehaviorSanitizer, and with a detector of races. Faults
planted into either show that it would tell.
"""

import dataclasses
import itertools
import math
import os
import pathlib
import platform
import re
import shutil
import struct
import subprocess
import sysconfig

import pytest
import torch
from torch import Tensor

from abkd_fast.losses import divergences, reference

HERE = pathlib.Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "cuda"
KERNEL = (SOURCES / "rows.cuh").read_text()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUMBERS = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}  # DType in csrc/row_call.h
POINTS = ["ab:1,0", "ab:0,1", "ab:0,0", "ab:0.5,-0.5", "ab:2,-1", "ab:1,1"]
FAMILIES = [divergences.parse(name) for name in ("ab", "alphanet", "wsd", "bdkd", "akl", "jsd", "tvd")]  # one of each
FAMILIES.append(divergences.CrossEntropy())
OTHERS = [divergences.parse(text) for text in [*divergences.BY_NAME, *POINTS]]
STATISTICS_BYTES = 48

# As on a GPU (see test_gpu.py).
FLOAT32 = 3e-5
FLOAT32_UNWEIGHTED = 4 * FLOAT32


def spelling(divergence):
    return "ce" if isinstance(divergence, divergences.CrossEntropy) else str(divergence)


every_family = pytest.mark.parametrize("divergence", FAMILIES, ids=spelling)
every_divergence = pytest.mark.parametrize("divergence", dict.fromkeys(FAMILIES + OTHERS), ids=spelling)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


# ---- building


def find_headers() -> str | None:
    """The folder of the CUDA headers that g++ needs: in CUDA_HOME, beside nvcc, or among the nvidia wheels."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):  # perhaps a wrapper script: nvcc itself says where it lives
        dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        homes += re.findall(r"TOP=(\S+)", dry_run.stderr)
    # Of the wheels it takes nvidia-cuda-runtime, and since CUDA 13 nvidia-cuda-crt besides.
    homes += pathlib.Path(sysconfig.get_paths()["purelib"]).glob("nvidia/cu*")
    needed = ["cuda_bf16.h", "cuda_fp16.h", "vector_functions.h", "crt/host_defines.h"]
    folders = [pathlib.Path(home, "include") for home in homes if home]
    return next((str(x) for x in folders if all((x / name).exists() for name in needed)), None)


HEADERS = find_headers()
pytestmark = [
    pytest.mark.skipif(HEADERS is None, reason="no CUDA headers in CUDA_HOME, beside nvcc, or among the nvidia wheels"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
    pytest.mark.skipif(platform.system() != "Linux", reason="the emulator is made for Linux"),
]

SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# When compiling only: emulator/races.h takes the place of its library. (Without -O1 some stores would make no call.)
RACES = ["-fsanitize=thread", "-fno-pie"]


class Compilation:
    """A build of the emulated kernel under way; `kernel` is the folder of rows.cuh."""

    def __init__(self, program, flags, link=(), kernel=SOURCES):
        language = ["-std=c++20", "-O1", "-g1", "-fno-strict-aliasing", "-fno-extern-tls-init"]
        # #pragma unroll is nvcc's; sanitizers make variables look uninitialized that are not.
        language += ["-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
        folders = ["-isystem", HEADERS, "-I", str(kernel)]
        self.program, self.link = program, link
        source = str(HERE / "emulator" / "rows_on_host.cpp")
        command = ["g++", *language, *folders, *flags, "-c", source, "-o", f"{program}.o"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def finish(self):
        errors = self.process.communicate()[1]
        assert self.process.returncode == 0, errors
        subprocess.run(["g++", f"{self.program}.o", *self.link, "-o", self.program], check=True)
        return self.program


@pytest.fixture(scope="module")
def compilations(tmp_path_factory):
    """Both builds, side by side."""
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


# ---- launching


@dataclasses.dataclass
class Layout:
    """Where rows lie in their array: the first at `offset`, `padding` elements between one and the next."""

    offset: int = 0
    padding: int = 0

    def stride(self, rows: Tensor) -> int:
        return rows.shape[1] + self.padding

    def spread(self, rows: Tensor, filler: float) -> Tensor:
        """The array that holds `rows`, and nothing after the last."""
        length = self.offset + (len(rows) - 1) * self.stride(rows) + rows.shape[1]
        array = torch.full((length,), filler, dtype=rows.dtype)
        self.rows(array, rows).copy_(rows)
        return array

    def rows(self, array: Tensor, like: Tensor) -> Tensor:
        return array.as_strided(like.shape, (self.stride(like), 1), self.offset)


@dataclasses.dataclass
class Launch:
    student: Tensor
    teacher: Tensor | None
    divergence: divergences.Divergence
    labels: Tensor | None = None
    temperature: float = 1.0
    hard_weight: float = 0.0
    gradient: str = "apart"  # or "none", "in place"
    statistics: str | bytes = "none"  # or "written", "normalizers" (alone), or those that are given
    sums: bool = False  # whether losses, not a gradient, are made from those given
    upstream: Tensor | None = None
    layouts: tuple[Layout, Layout, Layout] = (Layout(), Layout(), Layout())  # of student, teacher and gradient
    kept: int = 0
    order: int = 0

    def __post_init__(self):
        # What lies between rows must neither matter nor change.
        student, teacher, gradient = self.layouts
        self.arrays = [student.spread(self.student, math.nan)]
        self.arrays += [] if self.teacher is None else [teacher.spread(self.teacher, math.nan)]
        self.before = gradient.spread(torch.zeros_like(self.student), 99.0)
        if self.gradient == "in place":
            self.before = self.arrays[0]
        self.from_statistics = isinstance(self.statistics, bytes)
        self.mode = self.statistics
        if self.from_statistics:
            self.mode = "sums" if self.sums else "read"

    def request(self) -> bytes:
        """As `Request` in emulator/rows_on_host.cpp."""
        layouts = [number for x in self.layouts for number in (x.offset, x.stride(self.student))]
        given = [self.teacher is not None, ["none", "apart", "in place"].index(self.gradient), self.labels is not None]
        given += [["none", "written", "read", "normalizers", "sums"].index(self.mode), self.upstream is not None]
        numbers = [NUMBERS[self.student.dtype], self.divergence.family, *self.student.shape, *layouts, *given]
        parameters = [*self.divergence.parameters, 0.0, 0.0, 0.0][:3]
        header = struct.pack("17q5d", *numbers, self.kept, self.order, *parameters, self.temperature, self.hard_weight)
        arrays = [*self.arrays, *([self.before] if self.gradient == "apart" else []), self.labels, self.upstream]
        data = [x.view(torch.uint8).numpy().tobytes() for x in arrays if x is not None]
        return b"".join([header, *data, self.statistics if self.from_statistics else b""])

    def receive(self, answer: memoryview) -> tuple["Result", memoryview]:
        losses = gradient = statistics = None
        if self.mode not in ("read", "normalizers"):
            size = 4 * len(self.student)
            losses, answer = torch.frombuffer(bytearray(answer[:size]), dtype=torch.float32), answer[size:]
        if self.gradient != "none":
            size = self.before.numel() * self.before.element_size()
            after, answer = torch.frombuffer(bytearray(answer[:size]), dtype=self.before.dtype), answer[size:]
            layout = self.layouts[0 if self.gradient == "in place" else 2]
            gradient = layout.rows(after, self.student).clone()
            layout.rows(after, self.student).copy_(layout.rows(self.before, self.student))
            assert same(after, self.before), "written between rows"
        if self.mode not in ("none", "read"):
            size = STATISTICS_BYTES * len(self.student)
            statistics, answer = bytes(answer[:size]), answer[size:]
        return Result(losses, gradient, statistics), answer


@dataclasses.dataclass
class Result:
    losses: Tensor | None
    gradient: Tensor | None
    statistics: bytes | None


def execute(program, launches, *arguments, **environment) -> subprocess.CompletedProcess:
    requests = b"".join(launch.request() for launch in launches)
    # Leaks are looked for through ptrace, which containers and debuggers may not allow; a kernel allocates nothing.
    variables = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", **environment}
    return subprocess.run([program, *arguments], input=requests, capture_output=True, env=variables)


def run(program, launches, *arguments, **environment) -> list[Result]:
    process = execute(program, launches, *arguments, **environment)
    assert process.returncode == 0, process.stderr.decode()
    results, answer = [], memoryview(process.stdout)
    for launch in launches:
        result, answer = launch.receive(answer)
        results.append(result)
    assert not answer
    return results


def report(program, launches, *arguments, **environment) -> str:
    """What a run that must fail says."""
    process = execute(program, launches, *arguments, **environment)
    assert process.returncode != 0, "the planted fault was not noticed"
    return process.stderr.decode()


# ---- data


def logits(count, vocab, dtype=torch.float32, seed=0):
    """Student and teacher, of the same shape roughly, and sharper where the vocabulary is larger."""
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


def same(x, y):
    """Equal bit by bit."""
    return torch.equal(x.flatten().view(torch.uint8), y.flatten().view(torch.uint8))


def expected_of(launch):
    gradient = torch.empty(launch.student.shape, dtype=torch.float64)
    teacher = None if launch.teacher is None else launch.teacher.double()
    upstream = None if launch.upstream is None else launch.upstream.double()
    options = launch.labels, launch.divergence, launch.temperature, launch.hard_weight, gradient
    return reference.row_losses(launch.student.double(), teacher, *options, upstream=upstream), gradient


def assert_close(result, launch):
    losses, gradient = expected_of(launch)
    divergence = launch.divergence
    weighted = divergence.family != divergences.Family.ALPHA_BETA or abs(sum(divergence.parameters)) >= 0.1
    bound = FLOAT32 if weighted else FLOAT32_UNWEIGHTED
    if result.losses is not None:
        assert (result.losses.double() - losses).abs().le(bound * losses.abs()).all()
    dtype = launch.student.dtype
    largest = torch.finfo(dtype).max
    storage = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * launch.student.shape[1] ** 0.5
    within = gradient.abs().amax(1) < largest  # beyond it the storage has no such numbers
    error = (result.gradient.double() - gradient).norm(dim=1)
    assert (error <= (bound + storage) * gradient.norm(dim=1) + smallest)[within].all()


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


@every_dtype
@every_family
def test_results_depend_on_nothing_else(sanitized, divergence, dtype):
    """Neither on the order of threads, nor on the rows kept in shared memory, nor on where the gradient goes; and the
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
    for result in results.values():  # other rows do not notice
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

LINES = KERNEL.splitlines()
# Without the one before "else" nothing changes: a thread reads back only what it kept itself, and statistics are read
# after a later barrier.
BARRIERS = [i for i in range(len(LINES)) if "__syncthreads();" in LINES[i] and "} else {" not in LINES[i + 1]]


@pytest.mark.parametrize("line", BARRIERS)
def test_without_a_barrier_threads_race(races, line):
    chosen = [divergences.parse(name) for name in ("akl", "alphanet")]
    launches = [launch for divergence in chosen for launch in launches_of_every_kind(divergence, torch.float32)]
    assert "race: thread" in report(races, launches, str(line + 1))


def test_without_a_barrier_the_order_of_threads_matters(sanitized):
    launches = [make(divergences.AlphaBeta(), 1, 1003, torch.float32, order=order) for order in (0, 1)]
    first, last = run(sanitized, launches, str(BARRIERS[0] + 1))
    assert not same(first.losses, last.losses)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A build of a copy of the sources with a fault in each of these places; PLANTED_FAULT says which counts."""
    replacements = {
        "tail": ("if (single < vocab)", "if (single < vocab + {})"),
        "head": ("head + pack * kWidth);", "head + pack * kWidth - {});"),
        "room": ("sizeof(Logit)) + 16 + 15)", "sizeof(Logit)) + 16 * !{} + 15)"),
        "alignment": ("kWidth > 1 && cut.teacher_aligned);", "kWidth > 1 && ({} || cut.teacher_aligned));"),
        "barrier": (
            "__syncthreads();\n  return total;",
            "if (!{} || threadIdx.x != 7) __syncthreads();\n  return total;",
        ),
        "return": (
            "if (!gradient) return;\n\n",
            "if (!gradient || ({} && threadIdx.x > 40)) return;\n__syncthreads();\n",
        ),
        "shuffle": ("sums.second += __shfl", "if (!{} || threadIdx.x) sums.second += __shfl"),
    }
    text = KERNEL
    for fault, (old, new) in replacements.items():
        assert text.count(old) == 1, f"{old!r} is no longer in rows.cuh, once"
        text = text.replace(old, new.replace("{}", f'planted("{fault}")'))
    planted = """namespace abkd::cuda {
inline bool planted(const char* fault) { return std::strcmp(std::getenv("PLANTED_FAULT"), fault) == 0; }
"""
    folder = tmp_path_factory.mktemp("csrc")
    shutil.copytree(SOURCES.parent, folder, dirs_exist_ok=True)
    (folder / "cuda" / "rows.cuh").write_text(text.replace("namespace abkd::cuda {\n", planted, 1))
    flags = [*SANITIZE, "-DROWS_ON_HOST_BRIEF"]
    return Compilation(folder / "faulty", flags, SANITIZE, kernel=folder / "cuda").finish()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("tail", "heap-buffer-overflow"),
        ("head", "misaligned address"),
        ("room", "use-after-poison"),
        ("alignment", "misaligned address"),
        ("barrier", r"thread 0 is at the barrier of rows.cuh:\d+:\d+, thread 7 is at the shuffle of rows.cuh"),
        ("return", r"thread 0 is at the barrier of rows.cuh:\d+:\d+, thread 41 has finished"),
        ("shuffle", r"threads part: thread 0 is at the shuffle of rows.cuh:\d+:\d+, thread 1 is at the shuffle"),
    ],
)
def test_planted_faults_are_reported(faulty, fault, message):
    launch = make(divergences.AlphaNet(), 1, 1004, torch.float32, kept=2, layouts=LAYOUTS[1])
    assert re.search(message, report(faulty, [launch], PLANTED_FAULT=fault))
    run(faulty, [launch], PLANTED_FAULT="")
