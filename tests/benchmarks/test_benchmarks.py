import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from abkd_fast.losses import row_ops
from abkd_fast.training import costs, dry_run
from conftest import needs_proc

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def path(monkeypatch):
    """The scripts of benchmarks/ import each other by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def run(script, *arguments, device=("--device", "cpu")):
    command = [sys.executable, BENCHMARKS / script, *device, *arguments]
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
    assert content["sections"].keys() == {*importlib.import_module("kernels").SECTIONS}
    assert {"date", "commit", "device", "threads", "torch", "build"} <= content["machine"].keys()
    errors = content["sections"]["accuracy"][0]["rows"]
    assert all(0 < row["value"] < 1e-4 and 0 < row["gradient"] < 1e-4 for row in errors)
    strides = [row["name"].rpartition("rows ")[2] for row in content["sections"]["products"][0]["rows"]]
    assert strides == ["1009 apart"] * 3 + ["1024 apart"] * 3
    names = [row["name"] for row in content["sections"]["rows"][0]["rows"]]
    assert names == ["ab:0.2,0.7, float32", "cross-entropy, float32"]
    held = {(row["name"], row["tokens"]): row["bytes"] for row in content["sections"]["memory"][0]["rows"]}
    assert 0 < held["fused_linear_divergence", 128] < held["published formulation", 128]
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


@needs_proc
def test_data_quick(tmp_path):
    run("data.py", "--quick", "--out", tmp_path, device=())
    sections = json.loads((tmp_path / "data.json").read_text())["sections"]
    rows = sections["rows"][0]["rows"] + sections["long"][0]["rows"]
    assert [row["samples"] for row in rows] == [500, 500, 500, 1, 0, 1]  # the long prompt is left out
    assert all(row["seconds"] > 0 for row in rows)


def test_peers_tiny(tmp_path, capsys):
    options = ["--scale", "tiny", "--device", "cpu", "--repeats", "1", "--out", str(tmp_path)]
    importlib.import_module("peers").main(options)
    rows = json.loads((tmp_path / "peers.json").read_text())["sections"]["peers"][0]["rows"]
    output = capsys.readouterr().out
    installed = importlib.util.find_spec("trl") is not None
    peers = ["TRL, DistillationTrainer", "TRL, GKDTrainer"]
    for name in peers:
        assert f"{name}: {'its loss' if installed else 'skipped'}" in output
    assert "Liger-Kernel's loss: skipped" in output  # on a processor
    assert "our DistillationTrainer: its loss differs by" in output
    peers = ["our DistillationTrainer", *(peers if installed else [])]
    names = ["ours", "ours, teacher's states cached", "published way", *peers]
    assert [row["name"] for row in rows] == names
    assert rows[0]["ratio"] == 1


def test_predict(tmp_path):
    predict = importlib.import_module("predict")
    predict.main(["--batch-size", "16", "--mfu", "0.5", "--bandwidth", "1", "--out", str(tmp_path)])
    sections = json.loads((tmp_path / "predict.json").read_text())["sections"]
    pair = predict.make_pairs()["GPT-2 XL to GPT-2"]
    real, padded, (student, teacher) = pair.samples["ours"], pair.samples["published"], pair.models
    for way, samples, teaching, cached in (
        ("published", padded, teacher, False),
        ("ours", real, teacher, False),
        ("cached", real, teacher, True),
        ("sft", real, None, False),
    ):
        expected = costs.StepCost(student, None, teaching, cached).flops(samples) / len(samples)
        assert pair.flops[way] == pytest.approx(expected)
        assert sections["operations"][0]["rows"][-1][way] == pytest.approx(expected / 1e9)
    published, ours, _, _ = sections["prediction"][0]["rows"]
    assert published["products"] == pytest.approx(pair.flops["published"] / (0.5 * 989e12))
    assert ours["optimizer"] == pytest.approx(40 * student.parameters / 16 / 3.35e12)
    assert published["gigabytes"] > 10 * 512 * 50257 * 4 / 1e9  # of tensors in float32 that are written and read


def test_predict_without_kernels(tmp_path, monkeypatch):
    """The first lines of a run state these numbers."""
    monkeypatch.setattr(row_ops, "build_info", lambda: {"cuda": None})
    importlib.import_module("predict").main(["--out", str(tmp_path)])
    (table,) = json.loads((tmp_path / "predict.json").read_text())["sections"]["reference"]
    slower = {row["name"]: round(row["step"]) for row in table["rows"]}
    (line,) = dry_run.without_kernels(torch.device("cuda"))
    assert "the package was built without CUDA kernels" in line
    assert f"{slower['fkl']} (fkl) to {slower['ab:0.2,0.7']} (ab) times" in line


def test_predict_for_many_gpus(tmp_path):
    importlib.import_module("predict").main(["--out", str(tmp_path)])
    sections = json.loads((tmp_path / "predict.json").read_text())["sections"]
    gpt2, llama = sections["gpus"]
    assert "| cached | 32 | 8 | 11.1% | 0.871 | 1.74 | 5.8 | 7.1 |" in gpt2["markdown"]
    assert "| in every step | 8,192 | 512 | 0.1% | 0.0425 | 54.6 | 510.0 | 157.6 |" in llama["markdown"]
    assert [len(table["rows"]) for table in (gpt2, llama)] == [8, 8]  # no rank is without a sample
    assert "| 20.41 | 2.55 | 0.32 |" in sections["memory"][1]["markdown"]


def test_predicted_heads():
    head = importlib.import_module("head")
    gpt2, plain, llama, qwen = head.CASES
    # 12 bytes of rows that the cache holds; 28 where each of three passes reads both.
    assert [head.row_kernel(case, head.BEFORE).bytes for case in head.CASES] == [12, 8, 12, 28]
    assert [head.row_kernel(case, head.AFTER).bytes for case in (gpt2, qwen)] == [10, 18]
    assert head.products_seconds(gpt2) == pytest.approx(2 * (3 * 768 + 1600) / 650e12)
    assert head.products_seconds(llama) == pytest.approx(2 * (2 * 3200 + 4096) / 650e12)
    assert head.BEFORE.rows(gpt2) == 2048
    assert head.AFTER.rows(qwen) % 128 == 0
    before, after = (
        [step.seconds for case in (gpt2, plain) for step in head.steps(case, design)]
        for design in (head.BEFORE, head.AFTER)
    )
    # Two products and two casts of a float32 gradient, with and without a teacher.
    assert sum(before) - sum(after) > 2 * (4 * 768 * (1 / 200e12 - 1 / 650e12) + 12 / 3e12)


def test_traffic_counts_what_operators_read_and_write():
    predict = importlib.import_module("predict")
    a, b = torch.empty(3, 5, device="meta"), torch.empty(5, device="meta")
    with predict.Traffic() as traffic:
        (a + b).t().exp_()
    add, exp = 4 * (15 + 5 + 15), 4 * (15 + 15)
    assert traffic.bytes == add + exp


def test_document_fills_in_tables(tmp_path):
    document = importlib.import_module("document")
    report = importlib.import_module("harness").Report(torch.device("cpu"), {"out": tmp_path / "run"})
    with report.kept("speed"):
        for title in ("first", "second"):
            report.table("part", title, [{"name": title, "ratio": 2}], {"ratio": "x|.1f"})
    page = "<!-- {} -->\nold\n<!-- end -->\ntext\n"
    table = "|  | x |\n| --- | --- |\n| second | 2.0 |\n"
    filled = document.fill(page.format("speed part: second"), tmp_path)
    assert filled.startswith("<!-- speed part: second -->\n**second** (")
    assert filled.endswith(f"\n\n{table}\n<!-- end -->\ntext\n")
    assert document.fill(filled, tmp_path) == filled
    assert document.fill(page.format("speed part"), tmp_path).count("| x |") == 2
    for absent in ("memory part", "speed@paper part", "speed part: third"):  # never measured, or otherwise
        assert document.fill(page.format(absent), tmp_path) == page.format(absent)


def test_document_has_places_for_tables_alone():
    """Of results that some benchmark writes."""
    page = (BENCHMARKS.parent / "docs" / "performance.md").read_text()
    places = importlib.import_module("document").PLACE.findall(page)
    assert len(places) == page.count("<!-- end -->") == page.count("<!--") / 2
    assert {(name, section) for _, name, _, _, section, *_ in places} == {
        *(("predict", section) for section in ("operations", "scaling", "prediction", "head")),
        *(("timing", section) for section in ("methods", "ways", "cache")),
        *(("profile", section) for section in ("kinds", "operators")),
        ("peers", "peers"),
    }


def test_sampling_quick(tmp_path):
    run("generation.py", "--quick", "--only", "full", "ending", "--out", tmp_path)
    content = json.loads((tmp_path / "generation.json").read_text())
    assert content["sections"].keys() == {"full", "ending"}
    for tables in content["sections"].values():
        rows = tables[0]["rows"]
        assert [row["name"].split(",")[0] for row in rows] == ["sample", "generate", "generate"]
        assert all(6 <= row["tokens"] <= 48 and row["rate"] > 0 for row in rows)
    assert {row["tokens"] for row in content["sections"]["full"][0]["rows"]} == {48}


def test_evaluation_quick(tmp_path):
    run("generation.py", "--quick", "--only", "scores", "--out", tmp_path)
    content = json.loads((tmp_path / "generation.json").read_text())
    tables = {section: table["rows"] for section, (table,) in content["sections"].items()}
    assert tables.keys() == {"time", "scores", "scoring"}
    ours, published = tables["time"]
    assert published["ratio"] == published["seconds"] / ours["seconds"]
    # Responses of at most 8 words, some of which are the end token.
    assert all(4 < row["words"] < 8 for row in (ours, published))
    a, b, difference = tables["scores"]
    assert difference["rouge_l"] == pytest.approx(a["rouge_l"] - b["rouge_l"])
    assert difference["ratio"] == pytest.approx(abs(difference["rouge_l"]) / difference["error"])
