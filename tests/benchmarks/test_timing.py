import dataclasses
import importlib
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from abkd_fast.data.rows import read_rows
from abkd_fast.data.tokenize import tokenize
from abkd_fast.models.tokenizers import read_tokenizer

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def timing(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("timing")


@pytest.fixture
def workload(timing):
    return importlib.import_module("workload")


@pytest.fixture
def profiling(timing):
    return importlib.import_module("profiling")


@pytest.fixture
def benchmark(timing, tmp_path):
    """Of the tiny scale, with every method that generates."""
    on_policy = [name for name, method in timing.METHODS.items() if method.is_on_policy]
    options = ["--scale", "tiny", "--device", "cpu", "--methods", *on_policy, "--repeats", "1", "--out", str(tmp_path)]
    return timing.Benchmark(timing.parse(options), tmp_path)


def test_timing_tiny(timing, tmp_path):
    command = [sys.executable, BENCHMARKS / "timing.py", "--device", "cpu", "--scale", "tiny", "--repeats", "1"]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    result = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    output = result.stdout
    content = json.loads((tmp_path / "timing.json").read_text())
    assert content["sections"].keys() == {"methods", "ways", "cache"}
    rows = {row["name"]: row for row in content["sections"]["methods"][0]["rows"]}
    assert list(rows) == ["SFT", "KD", "MiniLLM", "GKD", "DISTILLM", "AlphaNet", "ABKD"]
    for name, row in rows.items():
        assert row["same"], row
        assert row["difference"] < 1e-5
        assert row["published_over_ours"] > 0
        assert ("cached" in row) == ("data" in timing.METHODS[name].parts and name != "SFT")
        assert row["published_over_sft"] == pytest.approx(row["published"] / rows["SFT"]["published"])  # of one round
    assert rows["SFT"]["ours_over_sft"] == 1
    assert rows["ABKD"]["paper"] == 0.768
    assert rows["ABKD"]["paper_over_sft"] == 0.768 / 0.344
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
    assert "| paper, on its GPUs | paper / its SFT | published / its SFT | ours / SFT | cached / SFT |" in markdown
    assert f" | 0.768 | 2.23 | {rows['ABKD']['published_over_sft']:.2f} | " in markdown
    orders = [note.partition(".")[0] for note in content["notes"] if note.startswith("Order, ")]
    assert [order.count(" > ") for order in orders] == [6, 6, 5]  # MiniLLM has no cached row
    assert all(order in content["sections"]["methods"][0]["markdown"] for order in orders)
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
    turn, sides = benchmark.turns[1], {"ours": benchmark.ours, "published": benchmark.baseline}
    for name in benchmark.methods:
        for way, side in sides.items() if benchmark.methods[name].is_on_policy else ():
            side.run((name, way, "rollout"), turn)
            written = side.written[name]
            if name == "MiniLLM" and side is benchmark.baseline:
                lengths, expected = written.mask.sum(1).tolist(), workload.response_lengths(turn.prompts[:16])
            else:
                lengths, expected = workload.response_lengths(written), workload.response_lengths(turn.samples)
                assert [s["input_ids"][: s["spans"][0]] for s in written] == [
                    s["input_ids"][: s["spans"][0]] for s in turn.samples
                ]
            assert lengths == expected
            assert max(lengths) <= 256


def test_published_mixture_is_of_student_and_teacher(benchmark, timing):
    benchmark.build()
    baseline = importlib.import_module("baseline")
    student, teacher = benchmark.baseline.student.eval(), benchmark.baseline.teacher
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    ids, mask = baseline.pad(prompts, 256, "cpu", left=True)
    mix = baseline.TeacherMix(teacher, mask, 0.2)
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
    benchmark.timing()
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
    wrong = dataclasses.replace(right, baseline_loss=lambda *logits: factor * right.baseline_loss(*logits))
    monkeypatch.setitem(timing.METHODS, "ABKD", wrong)
    options = ["--scale", "tiny", "--device", "cpu", "--methods", "ABKD", "--repeats", "1", "--out", str(tmp_path)]
    assert timing.main(options) == 1
    sft, ab = json.loads((tmp_path / "timing.json").read_text())["sections"]["methods"][0]["rows"]
    assert sft["same"]
    assert not ab["same"]
    assert ab["check"].startswith("FAILED")
    # No ratio of steps that do different things, and no place in an order.
    assert [key for key in ab if "_over_" in key] == ["paper_over_sft"]
    assert "Order, " not in (tmp_path / "timing.md").read_text()


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
        for model in (benchmark.trainer.student.model, benchmark.baseline.student)
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


def test_profile_finds_what_work_is_for(profiling):
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
    trace = profiling.profile(run, torch.device("cpu"))
    kinds = {}
    for path, name, _ in trace:
        kinds.setdefault(name, []).append(profiling.kind_of(path))
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


def test_profile_of_a_gpu_counts_kernels_once(profiling):
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
    found = [(profiling.kind_of(path), milliseconds) for path, _, milliseconds in profiling.spent(events, on_gpu=True)]
    assert found == expected


def test_timing_overhead(timing, profiling, tmp_path):
    options = ["--scale", "tiny", "--device", "cpu", "--methods", "ABKD", "--overhead", "--out", str(tmp_path)]
    assert timing.main(options) == 0
    tables = json.loads((tmp_path / "overhead.json").read_text())["sections"]["overhead"]
    assert [table["title"].partition(":")[0] for table in tables] == ["SFT", "ABKD, teacher's states cached"]
    for table in tables:
        rows = {row["name"]: row["ratio"] for row in table["rows"]}
        own = rows.pop("the trainer itself")
        assert sum(rows.values()) == pytest.approx(100)
        assert own == pytest.approx(100 - sum(rows[name] for name in profiling.WORK))
        # Every function is found in the profile, and none counts twice.
        assert all(value > 0 for name, value in rows.items() if name != "teacher's states")
    assert rows["teacher's states"] > 0


def test_timing_lengths_are_dollys(workload, shared):
    tokenizer = read_tokenizer(str(shared / "tokenizers/gpt2"), "tokenizer")
    dataset = tokenize(read_rows(str(shared / "data/dolly/train.jsonl")), tokenizer, max_length=1 << 20).dataset
    prompts = np.array([start for start, _ in dataset["spans"]])
    responses = np.array([len(ids) for ids in dataset["input_ids"]]) - prompts
    for lengths, expected in ((prompts, workload.PROMPTS), (responses, workload.RESPONSES)):
        quantiles = np.quantile(lengths.clip(max=workload.LENGTH), np.linspace(0, 1, len(expected)))
        assert tuple(quantiles.round().astype(int)) == expected
    means = prompts.mean(), np.minimum(responses, workload.LENGTH - prompts).mean()
    assert means == pytest.approx((workload.MEAN_PROMPT, workload.MEAN_RESPONSE), abs=0.05)


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
    train = {"steps": 1, "batch_size": 4, "device": "cpu"}
    workload.write_recipe(tmp_path, workload.SCALES["tiny"], 5, train, {})
    rows = read_rows(str(tmp_path / "rows.jsonl"))
    dataset = tokenize(rows, read_tokenizer(str(tmp_path / "tokenizer"), "tokenizer"), 512).dataset
    for row, ids, (prompt, _) in zip(rows, dataset["input_ids"], dataset["spans"], strict=True):
        whole = [*map(int, (row.values["prompt"] + row.values["output"]).split()), 0]
        assert ids == whole[:512]
        assert prompt == len(row.values["prompt"].split())
    assert len(rows) == 20
    assert np.mean([prompt for prompt, _ in dataset["spans"]]) == pytest.approx(71.3, rel=0.1)
