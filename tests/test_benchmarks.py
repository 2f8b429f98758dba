import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_kernels_quick(tmp_path):
    command = [sys.executable, BENCHMARKS / "kernels.py", "--quick", "--device", "cpu", "--out", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert result.returncode == 0, result.stderr
    for text in (
        "published formulation",
        "alphanet:0.2,0.8,token",
        "four matrix products",
        "extra MiB",
        "of the value",
    ):
        assert text in result.stdout
    content = json.loads((tmp_path / "kernels.json").read_text())
    assert content.keys() == {"machine", "options", "sections", "notes", "targets"}
    assert content["sections"].keys() == {"losses", "families", "fused", "memory", "accuracy"}
    assert {"date", "commit", "device", "threads", "torch", "build"} <= content["machine"].keys()
    errors = content["sections"]["accuracy"][0]["rows"]
    assert all(0 < row["value"] < 1e-4 and 0 < row["gradient"] < 1e-4 for row in errors)
    held = {(row["name"], row["tokens"]): row["bytes"] for row in content["sections"]["memory"][0]["rows"]}
    assert 0 < held["fused_linear_divergence", 128] < held["published formulation", 128]
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_sampling_quick(tmp_path):
    command = [sys.executable, BENCHMARKS / "sampling.py", "--quick", "--device", "cpu", "--out", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "sampling.json").read_text())
    assert content["sections"].keys() == {"full", "ending"}
    for tables in content["sections"].values():
        rows = tables[0]["rows"]
        assert [row["name"].split(",")[0] for row in rows] == ["sample", "generate", "generate"]
        assert all(6 <= row["tokens"] <= 48 and row["rate"] > 0 for row in rows)
    assert {row["tokens"] for row in content["sections"]["full"][0]["rows"]} == {48}


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_gpu_script_says_what_is_missing(tmp_path):
    (tmp_path / "dirname").symlink_to(shutil.which("dirname"))
    result = subprocess.run(
        [shutil.which("bash"), BENCHMARKS / "gpu.sh", tmp_path / "report"],
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path)},
    )
    assert result.returncode == 2
    assert result.stderr.splitlines() == ["gpu.sh: no nvidia-smi on PATH: this needs an NVIDIA GPU and its driver"]
    assert not (tmp_path / "report").exists()
