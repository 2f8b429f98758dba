import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from abkd_fast.data import read_rows, tokenise
from abkd_fast.models import read_tokenizer

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def timing(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("timing")


def run(script, *arguments):
    command = [sys.executable, BENCHMARKS / script, "--device", "cpu", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_kernels_quick(tmp_path):
    output = run("kernels.py", "--quick", "--out", tmp_path)
    for text in (
        "published formulation",
        "alphanet:0.2,0.8,token",
        "four matrix products",
        "extra MiB",
        "of the value",
    ):
        assert text in output
    content = json.loads((tmp_path / "kernels.json").read_text())
    assert content.keys() == {"machine", "options", "sections", "notes", "targets"}
    assert content["sections"].keys() == {"losses", "families", "fused", "memory", "accuracy"}
    assert {"date", "commit", "device", "threads", "torch", "build"} <= content["machine"].keys()
    errors = content["sections"]["accuracy"][0]["rows"]
    assert all(0 < row["value"] < 1e-4 and 0 < row["gradient"] < 1e-4 for row in errors)
    held = {(row["name"], row["tokens"]): row["bytes"] for row in content["sections"]["memory"][0]["rows"]}
    assert 0 < held["fused_linear_divergence", 128] < held["published formulation", 128]
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_timing_tiny(tmp_path):
    output = run("timing.py", "--scale", "tiny", "--repeats", "2", "--out", tmp_path)
    content = json.loads((tmp_path / "timing.json").read_text())
    assert content["sections"].keys() == {"methods", "ways", "cache"}
    rows = {row["name"]: row for row in content["sections"]["methods"][0]["rows"]}
    assert list(rows) == ["SFT", "KD", "AlphaNet", "ABKD"]
    for name, row in rows.items():
        assert row["same"], row
        assert row["difference"] < 1e-5
        assert row["paper"] is None  # no figure is known
        assert row["published_over_ours"] > 0
        assert ("cached" in row) == (name != "SFT")
    assert rows["SFT"]["ours_over_sft"] == 1
    ways = {row["name"]: row for row in content["sections"]["ways"][0]["rows"]}
    assert len(ways) == 2 + 3 * 3
    assert all(len(row["all_ms"]) == 2 and row["min_ms"] > 0 for row in ways.values())
    logits = 4 * 512 * 1009 * 4  # bytes of the student's alone, padded; the teacher's are as many
    assert ways["ABKD, published way"]["bytes"] > 2 * logits > ways["ABKD, ours"]["bytes"] > 0
    assert [row["name"] for row in content["sections"]["cache"][0]["rows"]] == ["KD", "AlphaNet", "ABKD"]
    markdown = (tmp_path / "timing.md").read_text()
    for table in (table for tables in content["sections"].values() for table in tables):
        assert f"**{table['title']}**" in markdown
        assert table["title"] in output
    assert f"| ABKD |  | {rows['ABKD']['published']:.3g} |" in markdown


@pytest.mark.parametrize("factor", [1.001, math.nan])
def test_timing_marks_a_wrong_loss(timing, tmp_path, monkeypatch, factor):
    right = timing.METHODS["ABKD"]
    wrong = dataclasses.replace(right, published=lambda *logits: factor * right.published(*logits))
    monkeypatch.setitem(timing.METHODS, "ABKD", wrong)
    options = ["--scale", "tiny", "--device", "cpu", "--methods", "ABKD", "--repeats", "1", "--out", str(tmp_path)]
    assert timing.main(options) == 1
    sft, ab = json.loads((tmp_path / "timing.json").read_text())["sections"]["methods"][0]["rows"]
    assert sft["same"]
    assert not ab["same"]
    assert ab["check"].startswith("FAILED")
    assert not [key for key in ab if "_over_" in key]  # no ratio of steps that do different things


def test_timing_overhead(timing, tmp_path):
    options = ["--scale", "tiny", "--device", "cpu", "--methods", "ABKD", "--overhead", "--out", str(tmp_path)]
    assert timing.main(options) == 0
    tables = json.loads((tmp_path / "overhead.json").read_text())["sections"]["overhead"]
    assert [table["title"].partition(":")[0] for table in tables] == ["SFT", "ABKD, teacher's states cached"]
    for table in tables:
        rows = {row["name"]: row["ratio"] for row in table["rows"]}
        own = rows.pop("the trainer itself")
        assert sum(rows.values()) == pytest.approx(100)
        assert own == pytest.approx(100 - sum(rows[name] for name in timing.WORK))
        # Every function is found in the profile, and none counts twice.
        assert all(value > 0 for name, value in rows.items() if name != "teacher's states")
    assert rows["teacher's states"] > 0


def test_timing_lengths_are_dollys(timing, shared):
    measured = timing.length_quantiles(str(shared / "data/dolly/train.jsonl"), str(shared / "tokenizers/gpt2"))
    assert measured == (timing.PROMPTS, timing.RESPONSES)


def test_timing_batches_are_like_the_whole(timing):
    generator = np.random.default_rng(0)
    quantiles = np.arange(101)  # uniform from 0 to 100
    lengths = np.array([timing.draw_lengths(quantiles, 5, 4, generator) for _ in range(100)])
    assert lengths.shape == (100, 5, 4)
    for count, each in ((4, lengths), (20, lengths.reshape(100, 20))):
        part = np.sort(each, axis=-1) * count / 100
        rounding = 0.5 * count / 100 + 1e-9
        assert (part >= np.arange(count) - rounding).all()  # one sample in each part
        assert (part <= np.arange(count) + 1 + rounding).all()
    deviation = 100 / math.sqrt(12 * 100)  # of the mean over 100 draws
    assert np.abs(lengths.mean(axis=0) - 50).max() < 5 * deviation  # in no fixed order


def test_timing_rows_have_the_lengths_drawn(timing, tmp_path):
    timing.write_rows(tmp_path / "rows.jsonl", 5, 4, 1009)
    timing.write_tokenizer(tmp_path / "tokenizer", 1009)
    rows = read_rows(str(tmp_path / "rows.jsonl"))
    dataset = tokenise(rows, read_tokenizer(str(tmp_path / "tokenizer"), "tokenizer"), 512)
    for row, ids, prompt in zip(rows, dataset["input_ids"], dataset["prompt_length"], strict=True):
        whole = [*map(int, (row.values["prompt"] + row.values["output"]).split()), 0]
        assert ids == whole[:512]
        assert prompt == len(row.values["prompt"].split())
    assert len(rows) == 20
    assert np.mean(dataset["prompt_length"]) == pytest.approx(71.3, rel=0.1)


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
