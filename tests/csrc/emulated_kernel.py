"""Builds the CUDA kernel's own source for the host, launches it, and reads its results: see emulator/cuda_on_host.h."""

import dataclasses
import itertools
import math
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sysconfig

import torch
from torch import Tensor

from abkd_fast.losses import divergences, reference
from abkd_fast.losses.arguments import LogitMap, LossSpec, Rows

HERE = pathlib.Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "cuda"

NUMBERS = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}  # DType in csrc/row_call.h
STATISTICS_BYTES = 48


def find_headers() -> str | None:
    """The folder of the CUDA headers that g++ needs: in CUDA_HOME, beside nvcc, or among the nvidia wheels."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):  # it may be a wrapper script: nvcc itself knows its folder
        dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        homes += re.findall(r"TOP=(\S+)", dry_run.stderr)
    # The wheels nvidia-cuda-runtime and, since CUDA 13, nvidia-cuda-crt have them.
    homes += pathlib.Path(sysconfig.get_paths()["purelib"]).glob("nvidia/cu*")
    needed = ["cuda_bf16.h", "cuda_fp16.h", "vector_functions.h", "crt/host_defines.h"]
    folders = [pathlib.Path(home, "include") for home in homes if home]
    return next((str(x) for x in folders if all((x / name).exists() for name in needed)), None)


HEADERS = find_headers()
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# For compiling alone: emulator/races.h replaces the library. (Without -O1 some stores would make no call.)
RACES = ["-fsanitize=thread", "-fno-pie"]


class Compilation:
    """A running build of the emulated kernel. `kernel` is the folder of rows.cuh."""

    def __init__(self, program, flags, link=(), kernel=SOURCES):
        language = ["-std=c++20", "-O1", "-g1", "-fno-strict-aliasing", "-fno-extern-tls-init"]
        # #pragma unroll is for nvcc. With sanitizers g++ takes some initialized variables for uninitialized.
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


@dataclasses.dataclass
class Layout:
    """Where rows lie in their array: the first at `offset`, with `padding` elements between two rows."""

    offset: int = 0
    padding: int = 0

    def stride(self, rows: Tensor) -> int:
        return rows.shape[1] + self.padding

    def spread(self, rows: Tensor, filler: float) -> Tensor:
        """An array that holds `rows` and ends with the last one."""
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
    statistics: str | bytes = "none"  # or "written", "normalizers" (nothing else is made), or given statistics
    sums: bool = False  # whether given statistics make losses, not a gradient
    upstream: Tensor | None = None
    gradient_dtype: torch.dtype | None = None  # None: that of the student
    maps: tuple[LogitMap, LogitMap] = (LogitMap(), LogitMap())
    layouts: tuple[Layout, Layout, Layout] = (Layout(), Layout(), Layout())  # for student, teacher and gradient
    kept: int = 0
    order: int = 0

    def __post_init__(self):
        # The elements between rows must neither matter nor change.
        student, teacher, gradient = self.layouts
        self.arrays = [student.spread(self.student, math.nan)]
        self.arrays += [] if self.teacher is None else [teacher.spread(self.teacher, math.nan)]
        self.before = gradient.spread(torch.zeros_like(self.student, dtype=self.out), 99.0)
        if self.gradient == "in place":
            self.before = self.arrays[0]
        self.from_statistics = isinstance(self.statistics, bytes)
        self.mode = self.statistics
        if self.from_statistics:
            self.mode = "sums" if self.sums else "read"

    @property
    def out(self) -> torch.dtype:
        return self.gradient_dtype or self.student.dtype

    def request(self) -> bytes:
        """The bytes of `Request` in emulator/rows_on_host.cpp, and the arrays after it."""
        layouts = [number for x in self.layouts for number in (x.offset, x.stride(self.student))]
        given = [self.teacher is not None, ["none", "apart", "in place"].index(self.gradient), self.labels is not None]
        given += [["none", "written", "read", "normalizers", "sums"].index(self.mode), self.upstream is not None]
        of_teacher = self.student.dtype if self.teacher is None else self.teacher.dtype
        dtypes = [NUMBERS[dtype] for dtype in (self.student.dtype, of_teacher, self.out)]
        numbers = [*dtypes, self.divergence.family, *self.student.shape, *layouts, *given]
        parameters = [*self.divergence.parameters, 0.0, 0.0, 0.0][:3]
        parameters += [self.temperature, self.hard_weight, *itertools.chain(*self.maps)]
        header = struct.pack("19q9d", *numbers, self.kept, self.order, *parameters)
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


def expected_of(launch: Launch) -> tuple[Tensor, Tensor]:
    """The losses and the gradient of a launch by the reference, in float64."""
    gradient = torch.empty(launch.student.shape, dtype=torch.float64)
    teacher = None if launch.teacher is None else launch.teacher.double()
    upstream = None if launch.upstream is None else launch.upstream.double()
    spec = LossSpec(launch.divergence, launch.temperature, launch.hard_weight, *launch.maps)
    rows = Rows(launch.student.double(), teacher, launch.labels, spec)
    return reference.row_losses(rows, gradient, upstream=upstream), gradient


def execute(program, launches, *arguments, **environment) -> subprocess.CompletedProcess:
    requests = b"".join(launch.request() for launch in launches)
    # The search for leaks needs ptrace, which containers and debuggers may forbid. A kernel allocates nothing.
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
    """Returns the error message of a run that must fail."""
    process = execute(program, launches, *arguments, **environment)
    assert process.returncode != 0, "the planted fault was not noticed"
    return process.stderr.decode()


def same(x, y):
    """Equal bit by bit."""
    return torch.equal(x.flatten().view(torch.uint8), y.flatten().view(torch.uint8))
