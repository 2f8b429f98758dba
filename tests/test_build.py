"""What the build asks for, and what it says, on machines with and without an nvcc. All of them are made up."""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = pathlib.Path(__file__).parents[1]
WHEELS = [f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime", "cuda-cccl")]
# Enough of torch for setup.py.
CPP_EXTENSION = """
import atexit
from setuptools import Extension
from setuptools.command.build_ext import build_ext as BuildExtension
def CppExtension(name, sources, **_): return Extension(name, sources)
def CUDAExtension(name, sources, **_):
    extension = Extension(name, sources, libraries=["cudart", "torch_cuda"])
    atexit.register(lambda: print(extension.libraries))
    return extension
"""


def write_nvcc(home, version="13.0"):
    """An nvcc that knows its version and one kind of card."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={home}' >&2\necho 'release {version}, V'\necho sm_90\n")
    nvcc.chmod(0o755)
    return home


def write_header(home):
    header = home / "include" / "nv" / "target"
    header.parent.mkdir(parents=True)
    header.touch()


def write_torch(folder, cuda="13.0"):
    (folder / "torch" / "utils").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text("from .version import __version__\nfrom . import version\n")
    (folder / "torch" / "version.py").write_text(f"__version__ = '2.14.1'\ncuda = {cuda!r}\n")
    (folder / "torch" / "utils" / "__init__.py").touch()
    (folder / "torch" / "utils" / "cpp_extension.py").write_text(CPP_EXTENSION)


def write_wheels(folder):
    for requirement in WHEELS:
        name = requirement.split("==")[0].replace("-", "_")
        with zipfile.ZipFile(folder / f"{name}-13.0.88-py3-none-any.whl", "w") as wheel:
            info = f"{name}-13.0.88.dist-info"
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 13.0.88\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """The folder of a CUDA build of torch, first on sys.path, on a machine without nvcc or network."""
    write_torch(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    compiler = tmp_path / "path" / "c++"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho a compiler\n")
    compiler.chmod(0o755)
    empty = tmp_path / "registry"
    empty.mkdir()
    machine = {"PATH": compiler.parent, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": empty, "PIP_CONFIG_FILE": os.devnull}
    for name, value in machine.items():
        monkeypatch.setenv(name, str(value))
    for name in ("CUDA_HOME", "CUDA_PATH", "ABKD_CUDA"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "site"


@pytest.fixture
def backend(site, monkeypatch):
    real = importlib.util.find_spec
    spec = importlib.util.spec_from_file_location("torch", site / "torch" / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "torch" else real(name))
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("build_backend")


def run_setup(site, wish="auto"):
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "ABKD_CUDA": wish}
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_nvcc_is_asked_for_where_there_is_none(backend, tmp_path, monkeypatch):
    write_wheels(tmp_path / "registry")
    assert backend.get_requires_for_build_wheel() == WHEELS
    assert backend.get_requires_for_build_editable() == WHEELS
    monkeypatch.setenv("ABKD_CUDA", "0")
    assert backend.get_requires_for_build_wheel() == []


def test_nvcc_is_not_asked_for_where_it_can_not_be_had(backend):
    """pip would end an installation that works without it."""
    assert backend.get_requires_for_build_wheel() == []


@pytest.mark.parametrize("cuda", [None, "12.8"])
def test_nvcc_is_not_asked_for_by_other_builds_of_torch(cuda, backend, site, tmp_path):
    """A CPU build needs none. CUDA 12 has no wheel with an nvcc."""
    write_wheels(tmp_path / "registry")
    shutil.rmtree(site / "torch")
    write_torch(site, cuda)
    assert backend.get_requires_for_build_wheel() == []


def test_a_toolkit_that_is_there_is_used(backend, tmp_path, monkeypatch):
    write_wheels(tmp_path / "registry")
    home = write_nvcc(tmp_path / "cuda")
    monkeypatch.setenv("PATH", str(home / "bin"))
    assert backend.find_cuda_home("13.0") == backend.find_cuda_home("13.2") == str(home)
    assert backend.get_requires_for_build_wheel() == []
    monkeypatch.setenv("CUDA_HOME", str(write_nvcc(tmp_path / "old", "12.4")))
    assert backend.find_cuda_home("13.0") == str(home)
    assert backend.find_cuda_home("12.8") == str(tmp_path / "old")
    monkeypatch.setenv("PATH", "")
    assert backend.get_requires_for_build_wheel() == WHEELS  # nvcc 12 can't serve a torch of CUDA 13


@pytest.mark.parametrize("broken", ["#!/bin/sh\nexit 1\n", "no program"])
def test_a_toolkit_that_does_not_run_is_none(backend, broken, tmp_path, monkeypatch):
    write_wheels(tmp_path / "registry")
    home = write_nvcc(tmp_path / "cuda")
    (home / "bin" / "nvcc").write_text(broken)
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert backend.find_cuda_home("13.0") is None
    assert backend.get_requires_for_build_wheel() == WHEELS
    monkeypatch.setenv("ABKD_CUDA", "2")  # setup.py refuses it, before anything is fetched
    assert backend.get_requires_for_build_wheel() == []


def test_wheels_are_used_if_they_are_complete(backend, site):
    home = write_nvcc(site / "nvidia" / "cu13")
    assert backend.find_cuda_home("13.0") is None  # nvcc's own requirements leave out the wheel with nv/target
    write_header(home)
    assert backend.find_cuda_home("13.0") == str(home)


def test_the_build_says_why_it_has_no_cuda_kernels_and_how_to_get_them(site):
    done = run_setup(site)
    assert done.returncode == 0, done.stderr
    for text in ("no CUDA (no nvcc of CUDA 13 ", "set CUDA_HOME", *WHEELS, "pip install --no-build-isolation ."):
        assert text in done.stdout
    refused = run_setup(site, "1")
    assert refused.returncode == 1
    assert refused.stderr.startswith("ABKD_CUDA=1, but CUDA kernels can't be built: no nvcc of CUDA 13")
    assert "no CUDA (ABKD_CUDA=0)" in run_setup(site, "0").stdout


def test_the_build_names_no_wheels_for_cuda_12(site):
    shutil.rmtree(site / "torch")
    write_torch(site, "12.8")
    assert "; install the CUDA 12.8 toolkit and set CUDA_HOME to its folder)" in run_setup(site).stdout


def test_the_build_links_the_library_that_wheels_have(site):
    """They have no libcudart.so."""
    write_header(write_nvcc(site / "nvidia" / "cu13"))
    lines = run_setup(site).stdout.splitlines()
    assert lines[0] == "abkd_fast: building CPU kernels (AVX-512, AVX2, baseline) and CUDA 13.0 for sm_90"
    assert lines[-1] == "[':libcudart.so.13', 'torch_cuda']"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_bindings_compile_where_pybind11_refuses_the_stable_abi(tmp_path):
    """As the one in torch 2.10 to 2.12 does."""
    header = tmp_path / "pybind11" / "pybind11.h"
    header.parent.mkdir()
    header.write_text("#ifdef TORCH_TARGET_VERSION\n#error refused\n#else\n#include_next <pybind11/pybind11.h>\n#endif")
    folders = [tmp_path, *include_paths(), sysconfig.get_path("include")]
    defines = {"TORCH_TARGET_VERSION": "0x020a000000000000", "TORCH_EXTENSION_NAME": "_C"}
    defines |= dict.fromkeys(("ABKD_CUDA_VERSION", "ABKD_CUDA_ARCHS", "ABKD_COMPILER"), '""')
    command = ["g++", "-std=c++20", "-fsyntax-only", "-w", *(f"-I{folder}" for folder in folders)]
    command += [*(f"-D{name}={value}" for name, value in defines.items()), ROOT / "csrc" / "bindings.cpp"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
