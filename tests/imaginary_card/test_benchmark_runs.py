"""The benchmarks from beginning to end, as programs of their own. Their times mean nothing here."""

import json
import os
import pathlib
import sys

import card
import pytest

HERE = pathlib.Path(__file__).parent


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("timing", ["--scale", "tiny", "--repeats", "1", "--methods", "GKD", "ABKD"]),
        ("kernels", ["--quick"]),
        ("generation", ["--quick"]),
    ],
)
def test_benchmark(script, options, tmp_path):
    path = f"{HERE / 'children'}:{os.environ['PYTHONPATH']}"
    program = str(HERE.parents[1] / "benchmarks" / f"{script}.py")
    command = [sys.executable, program, "--device", "cuda", *options, "--out", str(tmp_path)]
    card.run_child(*command, CARD_EMULATE="1", PYTHONPATH=path)
    report = json.loads((tmp_path / f"{script}.json").read_text())
    assert report["machine"]["gpu"].startswith("Imaginary")
    assert report["sections"]
