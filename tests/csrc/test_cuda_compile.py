import pathlib
import re
import shutil
import subprocess

import pytest

SOURCES = sorted(pathlib.Path(__file__).parents[2].glob("csrc/cuda/*.cu"))
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_kernels_compile_without_spilling(arch, source, tmp_path):
    if arch not in subprocess.check_output(["nvcc", "--list-gpu-code"], text=True).split():
        pytest.skip(f"this nvcc does not know {arch}")
    flags = ["-std=c++20", "-O3", f"-arch={arch}", "-cubin", "--resource-usage"]
    command = ["nvcc", *flags, "-o", tmp_path / "kernels.cubin", source]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    spills = SPILLS.findall(result.stdout + result.stderr)
    assert spills, "nvcc reported no kernel"
    assert set(spills) == {("0", "0")}, result.stderr
