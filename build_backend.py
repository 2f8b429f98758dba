"""A PEP 517 backend: setuptools, building against the torch that will load the result.

An isolated build can't import the packages of the environment it installs into, and a torch of its own would be a
second download of gigabytes and perhaps another version. The interpreter still knows where those packages are, so a
torch that is there is used, and only if there is none does the build ask for one.

A CUDA build of torch needs an nvcc of its CUDA version. Where the machine has none, the build asks for the wheels that
hold one, unless ABKD_CUDA=0 says that no CUDA kernels are wanted.
"""

import importlib.util
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig

from setuptools.build_meta import *  # noqa: F403 - the hooks that need no change

if importlib.util.find_spec("torch") is None:
    sys.path += {sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")}


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    torch = importlib.util.find_spec("torch")
    if torch is None:
        return ["torch>=2.10"]
    cuda = runpy.run_path(str(pathlib.Path(torch.origin).with_name("version.py")))["cuda"]  # importing takes seconds
    if cuda is None or os.environ.get("ABKD_CUDA", "auto") not in ("auto", "1") or find_cuda_home(cuda):
        return []
    wheels = nvcc_wheels(cuda)
    return wheels if wheels and pip_has(wheels) else []


get_requires_for_build_editable = get_requires_for_build_sdist = get_requires_for_build_wheel


def find_cuda_home(cuda: str) -> str | None:
    """The folder of a toolkit whose major version is that of `cuda` ("13.0"), or None.

    It is CUDA_HOME, the folder of the nvcc on PATH, or one that the wheels of `nvcc_wheels` make up.
    """
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):  # it may be a wrapper script: nvcc itself knows its folder
        dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        candidates += [str(pathlib.Path(top).resolve()) for top in re.findall(r"TOP=(\S+)", dry_run.stderr)]
    for folder in sys.path:  # this header is of the wheel that nvcc's wheel doesn't depend on
        headers = sorted(pathlib.Path(folder).glob("nvidia/cu*/include/nv/target"), reverse=True)
        candidates += [str(header.parents[2]) for header in headers]
    homes = (home for home in candidates if home and pathlib.Path(home, "bin", "nvcc").exists())
    return next((home for home in homes if nvcc_version(home).split(".")[0] == cuda.split(".")[0]), None)


def nvcc_version(cuda_home: str) -> str:
    """Such as "13.0"; empty if this nvcc does not run."""
    try:
        text = subprocess.run([f"{cuda_home}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
    except OSError:
        return ""
    release = re.search(r"release (\d+\.\d+)", text)
    return release[1] if release else ""


def nvcc_wheels(cuda: str) -> list[str]:
    """Requirements of the wheels that together hold a compiler and the headers it needs; none for CUDA 12.

    All have one version: their own requirements name none, and pip would mix releases.
    """
    if int(cuda.split(".")[0]) < 13:  # nvidia-cuda-nvcc-cu12 holds ptxas, and no nvcc
        return []
    names = "cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime", "cuda-cccl"
    return [f"nvidia-{name}=={cuda}.*" for name in names]


def pip_has(wheels: list[str]) -> bool:
    """False if pip finds one of them nowhere: asking for it would end an installation that works without.

    pip is asked outside the isolated build, in which it can't be imported. Whatever else goes wrong, the installer
    that runs this build may do better.
    """
    command = [sys.executable, "-I", "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps"]
    command += ["--retries", "1", "--timeout", "15", *wheels]
    return "No matching distribution found" not in subprocess.run(command, capture_output=True, text=True).stderr
