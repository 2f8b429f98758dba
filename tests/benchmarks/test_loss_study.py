import importlib
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


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
    arguments += ["--search-seeds", "10"]
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
    assert abkd["runs"]["test"] == pytest.approx(means)
    ((against,),) = (table["rows"] for table in sections["first"])
    assert against["gap"] == pytest.approx(sum(means) / 2 - sum(sft["runs"]["test"]) / 2)
    assert (tmp_path / "rouge_l.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--losses", "fkl", "nosuch"], 'loss "nosuch": unknown'),
        (["--losses", "foo/fkl"], 'unknown method "foo"'),
        (["--losses", "sft/fkl"], "learns from no teacher"),
        (["--losses", "ab:0.2,0.7", "ab:0.20,0.7"], "losses: one is given twice"),
        (["--seeds", "1", "1"], "seeds: one is given twice"),
        (["--seeds", "10"], "seeds: 10 is one of the search, too"),
        (["--rates", "1e-3", "0.001"], "rates: one is given twice"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(monkeypatch, capsys, tmp_path, arguments, words):
    monkeypatch.syspath_prepend(BENCHMARKS)
    study = importlib.import_module("losses")
    monkeypatch.setattr(sys, "argv", ["losses.py", "--out", str(tmp_path / "out"), *arguments])
    monkeypatch.setattr(signal, "signal", lambda *handler: None)
    with pytest.raises(SystemExit, match=re.escape(words)):
        study.main()
    assert not (tmp_path / "out").exists()


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


@pytest.mark.slow
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
