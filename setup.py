"""Builds the extension: CPU kernels always, CUDA kernels when torch is a CUDA build and there is an nvcc for it.

Environment: ABKD_CUDA=auto|0|1, ABKD_CUDA_ARCHS="80;90;100" (compute capabilities), ABKD_CUDA_THREADS (of a block of
the row kernel), MAX_JOBS, CXX.
"""

import os
import shlex
import subprocess

from setuptools import setup

from build_backend import find_cuda_home, nvcc_version, nvcc_wheels

STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # PyTorch 2.10
# No -ffast-math: the kernels rely on the order of their additions, on infinities and on NaN. -fno-math-errno and
# -fno-trapping-math give up only errno and floating-point traps, which nothing reads. Loops are not vectorized without.
OPTIMIZE = ["-O3", "-std=c++20", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]


def known_archs(cuda_home: str) -> list[str]:
    """The default compute capabilities that this nvcc can compile for."""
    known = subprocess.check_output([f"{cuda_home}/bin/nvcc", "--list-gpu-code"], text=True).split()
    return [arch for arch in ("80", "90", "100") if f"sm_{arch}" in known]


def decide_cuda() -> tuple[str | None, str]:
    """The CUDA toolkit to build with, or None and the reason. Exits if ABKD_CUDA=1 can't be satisfied."""
    import torch

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        raise SystemExit(f"abkd_fast needs torch 2.10 or later, found {torch.__version__}")
    wish = os.environ.get("ABKD_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"ABKD_CUDA is {wish!r}, expected auto, 0 or 1")
    if wish == "0":
        return None, "ABKD_CUDA=0"
    cuda = torch.version.cuda
    cuda_home = find_cuda_home(cuda) if cuda else None
    if cuda is None:
        reason = f"torch {torch.__version__} is a CPU build"
    elif cuda_home is None:
        reason = f"no nvcc of CUDA {cuda.split('.')[0]} in CUDA_HOME or on PATH, and no wheels of one; {way_on(cuda)}"
    else:
        return cuda_home, ""
    if wish == "1":
        raise SystemExit(f"ABKD_CUDA=1, but CUDA kernels can't be built: {reason}")
    return None, reason


def way_on(cuda: str) -> str:
    """How to get what is missing, in words."""
    toolkit = f"install the CUDA {cuda} toolkit and set CUDA_HOME to its folder"
    wheels = " ".join(f"'{wheel}'" for wheel in nvcc_wheels(cuda))
    if not wheels:
        return toolkit
    return f"{toolkit}, or: pip install {wheels} 'setuptools>=77' ninja && pip install --no-build-isolation ."


def extensions() -> tuple[list, type]:
    cuda_home, reason = decide_cuda()
    if cuda_home:
        os.environ["CUDA_HOME"] = cuda_home  # read by torch.utils.cpp_extension when it is imported
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    archs = []
    if cuda_home:
        wanted = os.environ.get("ABKD_CUDA_ARCHS")
        archs = wanted.split(";") if wanted else known_archs(cuda_home)
    command = [*shlex.split(os.environ.get("CXX", "c++")), "--version"]
    compiler = subprocess.check_output(command, text=True).splitlines()[0]
    defines = [
        f'-DABKD_CUDA_VERSION="{nvcc_version(cuda_home) if cuda_home else ""}"',
        f'-DABKD_CUDA_ARCHS="{" ".join(archs)}"',
        f'-DABKD_COMPILER="{compiler}"',
    ]
    modules = [
        CppExtension(
            "abkd_fast.losses._C",
            ["csrc/bindings.cpp", *(f"csrc/cpu/{name}.cpp" for name in ("choose", "baseline", "avx2", "avx512"))],
            extra_compile_args={"cxx": OPTIMIZE + STABLE_ABI + defines},
        )
    ]
    if cuda_home:
        gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        gencode.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        threads = os.environ.get("ABKD_CUDA_THREADS")
        gencode += [f"-DABKD_THREADS={threads}"] if threads else []
        module = CUDAExtension(
            "abkd_fast.losses._cuda",
            ["csrc/cuda/bindings.cpp", "csrc/cuda/rows.cu", "csrc/cuda/scale.cu"],
            extra_compile_args={"cxx": OPTIMIZE + STABLE_ABI, "nvcc": ["-O3", "-std=c++20", *gencode]},
            py_limited_api=True,
        )
        # By its full name, because the wheels have no libcudart.so. At run time torch has loaded it already.
        module.libraries[module.libraries.index("cudart")] = f":libcudart.so.{nvcc_version(cuda_home).split('.')[0]}"
        modules.append(module)
    built = f"CUDA {nvcc_version(cuda_home)} for sm_{', sm_'.join(archs)}" if cuda_home else f"no CUDA ({reason})"
    print(f"abkd_fast: building CPU kernels (AVX-512, AVX2, baseline) and {built}", flush=True)

    class BuildAndKeep(BuildExtension):
        """Leaves the libraries in the source folder too: Python started there imports the package from that folder."""

        def run(self) -> None:
            super().run()
            if not self.inplace:
                self.copy_extensions_to_source()

    return modules, BuildAndKeep


modules, build_extension = extensions()
setup(ext_modules=modules, cmdclass={"build_ext": build_extension})
