"""How learning rates fall, and runs that end before their last step."""

import json

import pytest
import torch

from abkd_fast import distill
from abkd_fast.config.training import OptimConfig
from abkd_fast.errors import ConfigError
from abkd_fast.training import trainer
from abkd_fast.training.checkpoint_policy import CheckpointPolicy
from abkd_fast.training.optim import build_scheduler
from abkd_fast.training.state import TrainState
from runs import RECIPE, Killed, Run, crash


def rates(steps, **optim):
    config = OptimConfig(lr=1.0, min_lr=0.1, **optim)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=config.lr)
    scheduler, values = build_scheduler(config, optimizer, steps), []
    for _ in range(steps + 1):
        values.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return values


def test_schedules():
    line = [1.0 - 0.9 * step / 8 for step in range(9)]
    assert rates(8, schedule="linear") == pytest.approx(line)
    assert rates(8, schedule="constant") == [1.0] * 9
    cosine = rates(8, schedule="cosine")
    assert [cosine[0], cosine[4], cosine[8]] == pytest.approx([1.0, 0.55, 0.1])
    for name in ("linear", "constant", "cosine"):
        assert rates(10, schedule=name, warmup_ratio=0.2) == rates(10, schedule=name, warmup_steps=2)
        assert rates(10, schedule=name, warmup_ratio=0.2)[:3] == pytest.approx([0.0, 0.5, 1.0])
        assert rates(3, schedule=name, warmup_ratio=1.0) == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0])
    with pytest.raises(ConfigError, match="warmup_ratio: there is warmup_steps, too"):
        OptimConfig(warmup_steps=2, warmup_ratio=0.1)


def test_equal_ends_of_a_line():
    config = OptimConfig(lr=0.5, min_lr=0.5, schedule="linear")
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=0.5)
    assert build_scheduler(config, optimizer, 4).get_last_lr() == [0.5]


def test_rates_of_an_optimizer_of_ones_own():
    """They may lie below optim.min_lr: no rate rises then."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-6)
    for schedule in ("linear", "cosine"):
        config = OptimConfig(lr=1e-3, min_lr=1e-4, schedule=schedule)
        scheduler = build_scheduler(config, optimizer, 3)
        for _ in range(3):
            optimizer.step()
            scheduler.step()
            assert scheduler.get_last_lr() == pytest.approx([1e-6])


WORSE = {"optim": {"lr": 3.0, "schedule": "constant"}, "eval": {"every_steps": 2, "patience": 2}}  # it diverges at once


def test_patience(tmp_path, capsys):
    """The run ends after two evaluations without a better one. Its folder is complete."""
    run = Run(tmp_path, "train.steps=40", **WORSE)
    assert run() == 0
    points = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    dev = [(point["step"], point["loss"]) for point in points if point["kind"] == "dev"]
    best = min(range(1, len(dev)), key=lambda place: dev[place][1])
    assert len(dev) - 1 == best + 2
    last = dev[-1][0]
    assert last < 40
    assert points[-2]["step"] == points[-1]["step"] == last, "the last window is logged, too"
    summary = json.loads((run.folder / "summary.json").read_text())
    assert (summary["steps"], summary["selected_step"]) == (last, last)
    assert f"ended after step {last}: the last 2 evaluations were no better than one before" in capsys.readouterr().out
    assert run("--resume") == 0, "it is finished"

    chosen = Run(tmp_path / "chosen", "train.steps=40", "eval.select=dev_loss", **WORSE)
    assert chosen() == 0
    assert json.loads((chosen.folder / "summary.json").read_text())["selected_step"] == dev[best][0]


def test_patience_that_is_not_exhausted_changes_nothing(undisturbed, tmp_path):
    run = Run(tmp_path, "eval.patience=100")
    assert run() == 0
    assert run.points() == undisturbed.points()


def test_patience_needs_rows(tmp_path, capsys):
    assert Run(tmp_path, "eval.patience=2", "data.dev=null")() == 2
    assert "eval.patience: there is no data.dev" in capsys.readouterr().err


def test_patience_counts_better_steps_that_could_not_be_saved(tmp_path):
    """On a disk that stays full, a run that gets better and better does not end for that."""

    class FullDisk:
        def begin(self, *arguments):
            raise OSError("no room")

    state = TrainState(step=2)
    state.record_eval(1.0, None, by_rouge=False)
    saved = state.best
    for state.step, loss in ((4, 1.5), (6, 0.9)):
        state.record_eval(loss, None, by_rouge=False)
    CheckpointPolicy(FullDisk(), state, 2, None, print).begin({}, {}, saved, print)
    assert (state.best, state.evaluations_since_best) == (saved, 0)


def test_a_run_that_a_function_has_ended_stays_ended(tmp_path, monkeypatch):
    """A crash while its result is written: the resumed run takes no more steps."""
    own = {**RECIPE, "checkpoint": {"every_steps": 4}, "on_eval": lambda point: point["step"] == 4}
    whole = distill(**{**own, "run": {"name": "whole", "dir": str(tmp_path)}})
    own["run"] = {"name": "cut", "dir": str(tmp_path)}
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "write_result", lambda trainer: crash())
        with pytest.raises(Killed):
            distill(**own)
    again = distill(**own, resume=True)
    assert again.summary["steps"] == whole.summary["steps"] == 4
    assert [point["step"] for point in again.history] == [point["step"] for point in whole.history]
