"""Weights & Biases and trackio: what they get, and that a resumed run continues the run there."""

import importlib.machinery
import importlib.util
import json
import sys
import types

import pytest
import torch

from abkd_fast.config.recipe import load
from abkd_fast.errors import ConfigError
from abkd_fast.training.metrics import RunLog
from runs import RECIPE, Run, crash_and_resume

SHORT = {"train": {**RECIPE["train"], "steps": 6}, "log": {"every_steps": 1}, "checkpoint": {"every_steps": 2}}


class FakeRun:
    """A run at either tracker."""

    def __init__(self, number, options):
        self.id, self.name = f"id{number}", f"name{number}"
        self.options, self.points, self.finished = options, [], 0

    def log(self, values, step):
        self.points.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture(params=[("wandb", "id"), ("trackio", "name")], ids=lambda param: param[0])
def tracker(request, monkeypatch):
    """The module's name, the option that says which run goes on, and the runs."""
    name, identity = request.param
    runs = []
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.init = lambda **options: runs.append(FakeRun(len(runs), options)) or runs[-1]
    monkeypatch.setitem(sys.modules, name, module)
    return name, identity, runs


def configure(folder, *sets):
    (config,) = load(Run(folder).arguments[1], [*sets])
    config.run.folder.mkdir(exist_ok=True)
    return config


def log_steps(config, done, steps):
    """What a process logs that begins after step `done`."""
    with RunLog(config, 6, torch.device("cpu"), done, 0.0, {}) as log:
        for step in steps:
            log.evaluation(step, step / 10, None, [])


def test_a_resumed_run_continues(tmp_path, tracker):
    """The second process takes step 3 again, whose point the tracker has: steps never go back there."""
    name, identity, runs = tracker
    config = configure(tmp_path, f"log.{name}=mine")
    log_steps(config, -1, [1, 2, 3])
    log_steps(config, 2, [3, 4, 5])
    first, second = runs
    assert first.options["project"] == second.options["project"] == "mine"
    assert first.options["config"]["optim"]["lr"] == 3e-3
    assert first.options["name"] == str(config.run.folder)
    assert "resume" not in first.options
    assert (second.options["resume"], second.options[identity]) == ("allow", getattr(first, identity))
    assert first.points == [(step, {"dev/loss": step / 10}) for step in (1, 2, 3)]
    assert second.points == [(step, {"dev/loss": step / 10}) for step in (4, 5)]
    assert [run.finished for run in runs] == [1, 1]


@pytest.mark.parametrize("kept", ['{"PLACE": [3]}', "[]", "{", None])
def test_a_run_that_is_not_known_there_gets_all_points(tmp_path, tracker, kept):
    name, _, runs = tracker
    log_steps(configure(tmp_path), -1, [1, 2, 3])
    config = configure(tmp_path, f"log.{name}=mine")
    if kept:
        (config.run.folder / "trackers.json").write_text(kept.replace("PLACE", f"{name}/mine"))
    log_steps(config, 2, [3, 4])
    assert "resume" not in runs[0].options
    assert [step for step, _ in runs[0].points] == [3, 4]


def test_a_tracker_that_fails_costs_its_points_alone(tmp_path, monkeypatch, capsys, tracker):
    name, _, runs = tracker

    def fail(run, values, step):
        raise TimeoutError("no network")

    monkeypatch.setattr(FakeRun, "log", fail)
    config = configure(tmp_path, f"log.{name}=mine")
    log_steps(config, -1, [1])
    assert f"not at {name}: step 1 (no network); training goes on" in capsys.readouterr().out
    assert runs[0].finished == 1
    assert json.loads((config.run.folder / "metrics.jsonl").read_text())["step"] == 1


def test_a_tracker_that_fails_at_the_end_fails_no_run(tmp_path, monkeypatch, capsys, tracker):
    name, *_ = tracker

    def fail(run):
        raise TimeoutError("no network")

    monkeypatch.setattr(FakeRun, "finish", fail)
    config = configure(tmp_path, f"log.{name}=mine")
    log_steps(config, -1, [1])
    assert f"not all at {name} (no network)" in capsys.readouterr().out
    assert json.loads((config.run.folder / "metrics.jsonl").read_text())["step"] == 1


def test_a_tracker_that_can_not_begin(tmp_path, monkeypatch, tracker):
    name, *_ = tracker

    def init(**options):
        raise ValueError("no login")

    monkeypatch.setattr(sys.modules[name], "init", init)
    with pytest.raises(ConfigError, match=rf"^log\.{name}: no login"):
        log_steps(configure(tmp_path, f"log.{name}=mine"), -1, [1])


def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trackio", None)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "trackio" else find(name, *more)
    )
    run = Run(tmp_path, "log.trackio=mine")
    assert run() == 2
    assert 'log.trackio is "mine", but trackio is not installed: pip install trackio' in capsys.readouterr().err
    assert not run.folder.exists()


@pytest.mark.slow
def test_the_real_wandb(tmp_path, monkeypatch):
    """Without a network each process writes a folder of its own. Both have the same id."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = Run(tmp_path, "log.wandb=mine", **SHORT)
    crash_and_resume(run, monkeypatch, 4)
    first, second = sorted(run.folder.glob("wandb/offline-run-*"))
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2]


@pytest.mark.slow
def test_the_real_trackio(tmp_path, monkeypatch):
    """One run, with each point once."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    run = Run(tmp_path, "log.trackio=mine", **SHORT)
    crash_and_resume(run, monkeypatch, 4)
    (name,) = SQLiteStorage.get_runs("mine")
    logged = [point for point in SQLiteStorage.get_logs("mine", name) if "train/loss" in point]
    assert [point["step"] for point in logged] == [1, 2, 3, 4, 5, 6]
    assert trackio
