import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch

from abkd_fast.data.rows import read_rows
from abkd_fast.data.tokenize import tokenize
from abkd_fast.models.loading import read_tokenizer
from abkd_fast.training import costs

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def timing(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("timing")


@pytest.fixture
def workload(timing):
    return importlib.import_module("workload")


@pytest.fixture
def breakdown(timing):
    return importlib.import_module("breakdown")


@pytest.fixture
def benchmark(timing, tmp_path):
    """Of the tiny scale, with every method that generates."""
    on_policy = [name for name, method in timing.METHODS.items() if method.is_on_policy]
    options = ["--scale", "tiny", "--device", "cpu", "--methods", *on_policy, "--repeats", "1", "--out", str(tmp_path)]
    return timing.Benchmark(timing.parse(options), tmp_path)


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


def test_timing_tiny(timing, tmp_path):
    output = run("timing.py", "--scale", "tiny", "--repeats", "1", "--out", tmp_path)
    content = json.loads((tmp_path / "timing.json").read_text())
    assert content["sections"].keys() == {"methods", "ways", "cache"}
    rows = {row["name"]: row for row in content["sections"]["methods"][0]["rows"]}
    assert list(rows) == ["SFT", "KD", "MiniLLM", "GKD", "DISTILLM", "AlphaNet", "ABKD"]
    for name, row in rows.items():
        assert row["same"], row
        assert row["difference"] < 1e-5
        assert row["published_over_ours"] > 0
        assert ("cached" in row) == ("data" in timing.METHODS[name].parts and name != "SFT")
    assert rows["SFT"]["ours_over_sft"] == 1
    ways = {row["name"]: row for row in content["sections"]["ways"][0]["rows"]}
    assert all(len(row["all_ms"]) == 1 and row["min_ms"] > 0 for row in ways.values())
    logits = 4 * 512 * 1009 * 4  # bytes of the student's alone, padded; the teacher's are as many
    assert ways["ABKD, published way"]["bytes"] > 2 * logits > ways["ABKD, ours"]["bytes"] > 0
    assert [row["name"] for row in content["sections"]["cache"][0]["rows"]] == [n for n in rows if "cached" in rows[n]]
    markdown = (tmp_path / "timing.md").read_text()
    for table in (table for tables in content["sections"].values() for table in tables):
        assert f"**{table['title']}**" in markdown
        assert table["title"] in output
    assert f"| ABKD | {rows['ABKD']['published']:.3g} |" in markdown
    assert "DISTILLM: its threshold" in markdown
    if importlib.util.find_spec("matplotlib") is not None:
        assert (tmp_path / "timing.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / "timing.svg").read_text()


def test_timing_with_plain_text(timing, tmp_path, capsys):
    options = ["--scale", "tiny", "--device", "cpu", "--methods", "ABKD", "MiniLLM", "--repeats", "1"]
    assert timing.main([*options, "--pretrain", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "timing.json").read_text())["sections"]["methods"][0]["rows"]
    assert [row["name"] for row in rows] == ["SFT", "MiniLLM", "ABKD"]
    assert all(row["same"] and row["difference"] < 1e-5 for row in rows)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("SFT, ours: loss")]
    loss = float(lines[0].split()[3].rstrip(","))
    # Of responses and text, each about what random tokens cost, and a little more.
    assert 2 * math.log(1009) < loss < 2.5 * math.log(1009)


def test_timing_adds_up_the_parts(benchmark):
    parts = {
        ("GKD", "published", "data"): [100.0, 200.0],
        ("GKD", "published", "rollout"): [10.0, 20.0],
        ("GKD", "ours", "data"): [30.0, 60.0],
        ("GKD", "ours", "rollout"): [4.0, 8.0],
        ("GKD", "ours", "new"): [50.0, 100.0],
        ("GKD", "cached", "data"): [20.0, 40.0],
    }
    assert benchmark.totals(parts) == {
        ("GKD", "published"): [105, 210],  # new responses cost as much as the data
        ("GKD", "ours"): [42, 84],
        ("GKD", "cached"): [37, 74],  # no cache helps with them
    }
    assert benchmark.share(("GKD", "published", "data")) == 1
    assert benchmark.share(("GKD", "ours", "data")) == 0.5


@pytest.mark.parametrize("wrong", [1.5, math.nan])
def test_timing_compares_every_part(benchmark, wrong):
    same = {("GKD", way, part): (2.0, 3.0) for way in ("published", "ours") for part in ("data", "new")}
    benchmark.numbers = same
    assert benchmark.difference("GKD") == 0
    benchmark.numbers = same | {("GKD", "ours", "new"): (2.0, 3 * wrong)}
    assert not benchmark.difference("GKD") < 0.4


def test_timing_responses_are_as_long_as_the_datas(benchmark, workload):
    benchmark.build()
    turn = benchmark.turns[1]
    for name in benchmark.methods:
        for side in (benchmark.ours, benchmark.published) if benchmark.methods[name].is_on_policy else ():
            side.rollout(name)(turn)
            written = side.written[name]
            if name == "MiniLLM" and side is benchmark.published:
                lengths, expected = written.mask.sum(1).tolist(), workload.response_lengths(turn.prompts[:16])
            else:
                lengths, expected = workload.response_lengths(written), workload.response_lengths(turn.samples)
                assert [s["input_ids"][: s["prompt_length"]] for s in written] == [
                    s["input_ids"][: s["prompt_length"]] for s in turn.samples
                ]
            assert lengths == expected
            assert max(lengths) <= 256


def test_published_mixture_is_of_student_and_teacher(benchmark, timing):
    benchmark.build()
    published = importlib.import_module("published")
    student, teacher = benchmark.published.trainer.student.eval(), benchmark.published.trainer.teacher
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    ids, mask = published._pad_left(prompts, torch.device("cpu"))
    mix = published.TeacherMix(teacher, mask, 0.2)
    with torch.no_grad():
        for new in ([], [[1], [2]], [[1, 3], [2, 4]]):  # the teacher's cache grows with the responses
            tokens = [prompt + (new[row] if new else []) for row, prompt in enumerate(prompts)]
            logits = [torch.stack([m(torch.tensor([row])).logits[0, -1] for row in tokens]) for m in (student, teacher)]
            expected = 0.8 * logits[0].softmax(-1) + 0.2 * logits[1].softmax(-1)
            scores = mix(torch.cat([ids, torch.tensor(new, dtype=torch.int64).view(2, -1)], 1), logits[0])
            assert torch.allclose(scores.exp(), expected, rtol=1e-4, atol=1e-9)


def test_timing_mfu(timing, tmp_path, monkeypatch):
    options = ["--scale", "tiny", "--device", "cpu", "--methods", "GKD", "--repeats", "1", "--out", str(tmp_path)]
    benchmark, peak = timing.Benchmark(timing.parse(options), tmp_path), 1e12
    monkeypatch.setattr(timing, "peak_flops", lambda device: peak)
    benchmark.time()
    sft, gkd = benchmark.report.content["sections"]["methods"][0]["rows"]
    assert any("| MFU, ours |" in part for part in benchmark.report.markdown)
    flops = sft["ours_mfu"] * peak * sft["ours"] * benchmark.batch_size
    tokens = sum(len(sample["input_ids"]) for sample in benchmark.turns[1].samples)
    layers = 2 * 12 * 32**2  # weights
    # Forward and backward of the layers at every token; attention comes on top, and the projection at the responses.
    assert 6 * layers * tokens < flops < 6 * (layers + 32 * 1009 + 2 * 32 * 512) * tokens
    assert "ours_mfu" not in gkd  # of generation nothing is counted


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


def test_timing_stops_where_no_round_fits(timing, tmp_path, capsys):
    options = ["--scale", "tiny", "--device", "cpu", "--methods", "SFT", "--repeats", "3", "--minutes", "0"]
    assert timing.main([*options, "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "timing.json").read_text())
    assert "1 of 3 rounds: the next would not end within 0 minutes" in content["notes"]
    assert content["sections"]["methods"][0]["title"] == "seconds/sample, medians of 1"
    assert [len(row["all_ms"]) for row in content["sections"]["ways"][0]["rows"]] == [1, 1]


def test_timing_takes_fewer_samples_on_a_processor(timing, tmp_path):
    options = timing.parse(["--scale", "paper", "--device", "cpu", "--methods", "SFT", "--repeats", "1"])
    benchmark = timing.Benchmark(options, tmp_path)
    assert (benchmark.batch_size, benchmark.scale.batch_size) == (4, 8)


def test_published_way_has_the_activations_of_transformers(benchmark):
    benchmark.build()
    kinds = [
        {type(block.mlp.act).__name__ for block in model.transformer.h}
        for model in (benchmark.trainer.student.model, benchmark.published.trainer.student)
    ]
    assert kinds == [{"GELU"}, {"NewGELUActivation"}]


def test_timing_profile(timing, tmp_path):
    options = ["--scale", "tiny", "--device", "cpu", "--methods", "ABKD", "--repeats", "1", "--profile"]
    assert timing.main([*options, "--out", str(tmp_path)]) == 0
    sections = json.loads((tmp_path / "profile.json").read_text())["sections"]
    kinds = {table["title"]: {row["name"]: row["ratio"] for row in table["rows"]} for table in sections["kinds"]}
    assert list(kinds) == ["SFT, ours", "ABKD, ours", "ABKD, ours, teacher's states cached"]
    assert len(sections["operators"]) == 3
    for ratios in kinds.values():
        assert sum(ratios.values()) == pytest.approx(100)
        assert all(ratio > 0 for ratio in ratios.values())
    markdown = (tmp_path / "profile.md").read_text()
    assert "**ABKD, ours, teacher's states cached: the 12 operators that take most**" in markdown


def test_profile_finds_what_work_is_for(breakdown):
    """Also in backward, where operators don't say whose derivative they are."""
    torch.manual_seed(0)
    embedding, layer = torch.nn.Embedding(50, 16), torch.nn.Linear(16, 16)
    optimizer = torch.optim.AdamW([*embedding.parameters(), *layer.parameters()], fused=True)

    def run():
        x = layer(embedding(torch.arange(40).view(1, 2, 20)))
        x = torch.nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5)  # by products of batches
        (torch.tanh(x) @ embedding.weight.T).sum().backward()
        torch.nn.utils.clip_grad_norm_(embedding.parameters(), 1.0)
        optimizer.step()

    run()
    trace = breakdown.profile(run, torch.device("cpu"))
    kinds = {}
    for path, name, _ in trace:
        kinds.setdefault(name, []).append(breakdown.kind_of(path))
    assert kinds["aten::bmm"] == ["attention"] * 6
    assert kinds["aten::bernoulli_"] == ["attention"]
    assert kinds["aten::addmm"] == ["matrix products"]
    assert kinds["aten::mm"] == ["matrix products"] * 5  # one forward; two of it and two of the layer backward
    assert kinds["aten::embedding_dense_backward"] == ["embedding, picking rows"]
    assert kinds["aten::tanh_backward"] == ["activations, norms, dropout, and the rest"]
    assert set(kinds["aten::linalg_vector_norm"] + kinds["aten::_fused_adamw_"]) == {"clipping and AdamW"}
    assert "gradients added up" in kinds["aten::add_"] + kinds["aten::add"]  # of the embedding, which is used twice
    assert all(milliseconds >= 0 for *_, milliseconds in trace)


class Event(types.SimpleNamespace):
    __hash__ = object.__hash__


def test_profile_of_a_gpu_counts_kernels_once(breakdown):
    def event(name, parent=None, kernels=(), annotation=False, microseconds=0):
        return Event(
            name=name,
            cpu_parent=parent,
            kernels=[types.SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels],
            is_user_annotation=annotation,
            cpu_time_total=microseconds,
            time_range=types.SimpleNamespace(start=0),
            sequence_nr=-1,
            scope=0,
        )

    step = event("step", kernels=[("step", 900)], annotation=True, microseconds=1000)  # its kernels' whole span
    events = [
        step,
        event("aten::mm", step, [("gemm", 400)]),
        event("Torch-Compiled Region", step, [("triton_gelu", 300)]),
    ]
    expected = [("matrix products", 0.4), ("activations, norms, dropout, and the rest", 0.3)]
    expected += [("Python, dispatch, waiting", 0.3)]  # the GPU waits
    found = [(breakdown.kind_of(path), milliseconds) for path, _, milliseconds in breakdown.spent(events, on_gpu=True)]
    assert found == expected


def test_timing_overhead(timing, tmp_path):
    options = ["--scale", "tiny", "--device", "cpu", "--methods", "ABKD", "--overhead", "--out", str(tmp_path)]
    assert timing.main(options) == 0
    tables = json.loads((tmp_path / "overhead.json").read_text())["sections"]["overhead"]
    assert [table["title"].partition(":")[0] for table in tables] == ["SFT", "ABKD, teacher's states cached"]
    for table in tables:
        rows = {row["name"]: row["ratio"] for row in table["rows"]}
        own = rows.pop("the trainer itself")
        assert sum(rows.values()) == pytest.approx(100)
        assert own == pytest.approx(100 - sum(rows[name] for name in importlib.import_module("overhead").WORK))
        # Every function is found in the profile, and none counts twice.
        assert all(value > 0 for name, value in rows.items() if name != "teacher's states")
    assert rows["teacher's states"] > 0


def test_timing_lengths_are_dollys(workload, shared):
    measured = workload.length_quantiles(str(shared / "data/dolly/train.jsonl"), str(shared / "tokenizers/gpt2"))
    assert measured == (workload.PROMPTS, workload.RESPONSES)


def test_timing_batches_are_like_the_whole(workload):
    generator = np.random.default_rng(0)
    quantiles = np.arange(101)  # uniform from 0 to 100
    lengths = np.array([workload.draw_lengths(quantiles, 5, 4, generator) for _ in range(100)])
    assert lengths.shape == (100, 5, 4)
    for count, each in ((4, lengths), (20, lengths.reshape(100, 20))):
        part = np.sort(each, axis=-1) * count / 100
        rounding = 0.5 * count / 100 + 1e-9
        assert (part >= np.arange(count) - rounding).all()  # one sample in each part
        assert (part <= np.arange(count) + 1 + rounding).all()
    deviation = 100 / math.sqrt(12 * 100)  # of the mean over 100 draws
    assert np.abs(lengths.mean(axis=0) - 50).max() < 5 * deviation  # in no fixed order


def test_timing_rows_have_the_lengths_drawn(workload, tmp_path):
    workload.write_rows(tmp_path / "rows.jsonl", 5, 4, 1009)
    workload.write_tokenizer(tmp_path / "tokenizer", 1009)
    rows = read_rows(str(tmp_path / "rows.jsonl"))
    dataset = tokenize(rows, read_tokenizer(str(tmp_path / "tokenizer"), "tokenizer"), 512)
    for row, ids, prompt in zip(rows, dataset["input_ids"], dataset["prompt_length"], strict=True):
        whole = [*map(int, (row.values["prompt"] + row.values["output"]).split()), 0]
        assert ids == whole[:512]
        assert prompt == len(row.values["prompt"].split())
    assert len(rows) == 20
    assert np.mean(dataset["prompt_length"]) == pytest.approx(71.3, rel=0.1)


def test_peers_tiny(timing, tmp_path, capsys):
    options = ["--scale", "tiny", "--device", "cpu", "--repeats", "1", "--out", str(tmp_path)]
    importlib.import_module("peers").main(options)
    rows = json.loads((tmp_path / "peers.json").read_text())["sections"]["peers"][0]["rows"]
    output = capsys.readouterr().out
    installed = importlib.util.find_spec("trl") is not None
    peers = ["TRL, DistillationTrainer", "TRL, GKDTrainer"]
    for name in peers:
        assert f"{name}: {'its loss' if installed else 'skipped'}" in output
    assert "Liger-Kernel's loss: skipped" in output  # on a processor
    names = ["ours", "ours, teacher's states cached", "published way", *(peers if installed else [])]
    assert [row["name"] for row in rows] == names
    assert rows[0]["ratio"] == 1


def test_predict(timing, tmp_path):
    predict = importlib.import_module("predict")
    predict.main(["--batch-size", "16", "--mfu", "0.5", "--bandwidth", "1", "--out", str(tmp_path)])
    sections = json.loads((tmp_path / "predict.json").read_text())["sections"]
    pair = predict.Pair(*predict.PAIRS["GPT-2 XL to GPT-2"])
    real, padded = pair.samples.real, pair.samples.padded
    for way, samples, teacher, cached in (
        ("published", padded, pair.teacher, False),
        ("ours", real, pair.teacher, False),
        ("cached", real, pair.teacher, True),
        ("sft", real, None, False),
    ):
        expected = costs.StepCost(pair.student, None, teacher, cached).flops(samples) / len(samples)
        assert pair.flops[way] == pytest.approx(expected)
        assert sections["operations"][0]["rows"][-1][way] == pytest.approx(expected / 1e9)
    published, ours, _, _ = sections["prediction"][0]["rows"]
    assert published["products"] == pytest.approx(pair.flops["published"] / (0.5 * 989e12))
    assert ours["optimizer"] == pytest.approx(40 * pair.student.parameters / 16 / 3.35e12)
    assert published["gigabytes"] > 10 * 512 * 50257 * 4 / 1e9  # of tensors in float32 that are written and read


def test_traffic_counts_what_operators_read_and_write(timing):
    predict = importlib.import_module("predict")
    a, b = torch.empty(3, 5, device="meta"), torch.empty(5, device="meta")
    with predict.Traffic() as traffic:
        (a + b).t().exp_()
    add, exp = 4 * (15 + 5 + 15), 4 * (15 + 15)
    assert traffic.bytes == add + exp


def test_document_fills_in_tables(timing, tmp_path):
    document = importlib.import_module("document")
    report = importlib.import_module("harness").Report(torch.device("cpu"), {})
    columns = {"name": ("", ""), "ratio": ("x", ".1f")}
    for title in ("first", "second"):
        report.table("part", title, [{"name": title, "ratio": 2}], columns)
    (tmp_path / "run").mkdir()
    report.save(tmp_path / "run" / "speed.json")
    page = "<!-- {} -->\nold\n<!-- end -->\ntext\n"
    table = "|  | x |\n| --- | --- |\n| second | 2.0 |\n"
    filled = document.fill(page.format("speed part: second"), tmp_path)
    assert filled.startswith("<!-- speed part: second -->\n**second** (")
    assert filled.endswith(f"\n\n{table}\n<!-- end -->\ntext\n")
    assert document.fill(filled, tmp_path) == filled
    assert document.fill(page.format("speed part"), tmp_path).count("| x |") == 2
    for absent in ("memory part", "speed@paper part", "speed part: third"):  # never measured, or otherwise
        assert document.fill(page.format(absent), tmp_path) == page.format(absent)


def test_document_has_places_for_tables_alone(timing):
    """Of results that some benchmark writes."""
    page = (BENCHMARKS.parent / "docs" / "performance.md").read_text()
    places = importlib.import_module("document").PLACE.findall(page)
    assert len(places) == page.count("<!-- end -->") == page.count("<!--") / 2
    assert {(name, section) for _, name, _, _, section, *_ in places} == {
        *(("predict", section) for section in ("operations", "scaling", "prediction")),
        *(("timing", section) for section in ("methods", "ways", "cache")),
        *(("profile", section) for section in ("kinds", "operators")),
        ("peers", "peers"),
    }


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


def test_evaluation_quick(tmp_path):
    run("evaluation.py", "--quick", "--out", tmp_path)
    content = json.loads((tmp_path / "evaluation.json").read_text())
    tables = {section: table["rows"] for section, (table,) in content["sections"].items()}
    assert tables.keys() == {"time", "scores", "scoring"}
    ours, published = tables["time"]
    assert published["ratio"] == published["seconds"] / ours["seconds"]
    # Responses of at most 8 words, some of which are the end token.
    assert all(4 < row["words"] < 8 for row in (ours, published))
    a, b, difference = tables["scores"]
    assert difference["rouge_l"] == pytest.approx(a["rouge_l"] - b["rouge_l"])
    assert difference["ratio"] == pytest.approx(abs(difference["rouge_l"]) / difference["error"])


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


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_losses_are_searched_trained_and_scored_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("ABKD_CACHE", str(tmp_path / "cache"))
    settings = {
        "teacher:data.train": "quickstart:small",
        "teacher:train.steps": 2,
        "init:train.steps": 1,
        "train.steps": 2,
        "eval.rouge_rows": 4,
        "eval.seeds": "[10,20]",
    }
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    arguments = ["--losses", "sft", "ab:0.2,0.7", "--rates", "1e-3", "2e-3", "--select", "dev_loss", "--rows", "4"]
    command = [sys.executable, BENCHMARKS / "losses.py", *overrides, *arguments, "--seeds", "1", "2", "--out", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    sections = json.loads((tmp_path / "losses.json").read_text())["sections"]
    (search,), (table,) = sections["search"], sections["losses"]
    *_, sft, abkd = table["rows"]
    assert [row["name"] for row in table["rows"]] == ["Teacher", "Initial student", "SFT", "ABKD (0.2,0.7)"]
    for losses, row in zip(search["rows"], (sft, abkd), strict=True):
        assert row["rate"] == min((0.001, 0.002), key=lambda rate: losses[str(rate)])
    folder = tmp_path / "runs" / f"ab-0.2,0.7-{abkd['rate']:g}-seed"
    means = []
    for seed in (1, 2):
        config = json.loads(pathlib.Path(f"{folder}{seed}", "config.json").read_text())
        assert (config["method"], config["loss"], config["optim"]["lr"]) == ("ab", "ab:0.2,0.7", abkd["rate"])
        scores = json.loads(pathlib.Path(f"{folder}{seed}", "eval", "scores.json").read_text())
        assert scores["sets"]["test"]["rows"] == 4
        means.append(scores["sets"]["test"]["rouge_l"]["mean"])
    assert abkd["runs"] == pytest.approx(means)
    assert (tmp_path / "rouge_l.png").read_bytes()[:4] == b"\x89PNG"


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def is_alive(group):
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_losses_end_their_workers_on_a_signal(tmp_path, monkeypatch):
    monkeypatch.setenv("ABKD_CACHE", str(tmp_path / "cache"))
    settings = {"teacher:data.train": "quickstart:small", "teacher:train.steps": 1, "init:train.steps": 1}
    settings |= {"train.steps": 100_000, "log.every_steps": 1}
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, BENCHMARKS / "losses.py", *overrides, "--losses", "sft", "fkl", "rkl", "--rates", "1e-3"]
    command += ["--rows", "1", "--jobs", "2", "--out", tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    logs = [tmp_path / "runs" / f"{loss}-0.001-seed1.log" for loss in ("sft", "fkl")]
    try:
        wait_until(lambda: all(log.exists() and "step 2/" in log.read_text() for log in logs))
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
        assert all("SIGTERM: the step is finished and saved" in log.read_text() for log in logs)
        assert not (tmp_path / "runs" / "rkl-0.001-seed1.log").exists()
        wait_until(lambda: not is_alive(process.pid))
    finally:
        if is_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
