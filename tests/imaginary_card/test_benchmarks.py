"""The benchmarks from beginning to end, as programs of their own. Their times mean nothing here."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("timing", ["--scale", "tiny", "--repeats", "1"]),
        ("kernels", ["--quick"]),
        ("generation", ["--quick"]),
    ],
)
def test_benchmark(script, options, tmp_path):
    command = [sys.executable, HERE.parents[1] / "benchmarks" / f"{script}.py", "--device", "cuda", *options]
    path = f"{HERE / 'children'}:{os.environ['PYTHONPATH']}"
    environment = os.environ | {"CARD_EMULATE": "1", "PYTHONPATH": path}
    process = subprocess.run([*command, "--out", tmp_path], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    report = json.loads((tmp_path / f"{script}.json").read_text())
    assert report["machine"]["gpu"].startswith("Imaginary")
    assert report["sections"]
