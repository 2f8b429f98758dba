"""Which checkpoints stay, and whose weights are the run's result."""

import copy
import errno
import json
import os
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from abkd_fast import files, manifest
from abkd_fast.cli import INTERRUPTED
from abkd_fast.training import checkpoint
from abkd_fast.training.trainer import Trainer
from runs import Killed, Run, at_step, crash, send


def test_newest_and_best_stay_and_are_models(tmp_path, monkeypatch):
    losses = {0: 9.0, 2: 5.0, 4: 3.0, 6: 4.0, 8: 4.5, 10: 4.6, 12: 4.7}
    run = Run(tmp_path, "eval.every_steps=2", "checkpoint.every_steps=3", "checkpoint.keep=2")
    monkeypatch.setattr(Trainer, "dev_loss", lambda self: losses[self.state.step])
    assert run() == 0
    assert run.checkpoints() == ["step-000004", "step-000006", "step-000009"]
    folder = run.folder / "checkpoints" / "step-000004"
    model = AutoModelForCausalLM.from_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert torch.equal(model.model.norm.weight, file.get_tensor("model.norm.weight"))
    assert (folder / "tokenizer.json").exists()


def test_evaluation_that_was_interrupted_still_finds_the_best(tmp_path, monkeypatch):
    """The checkpoint of the signal, written before its loss was known, stays once a later process finds it the best."""
    losses = {0: 9.0, 2: 3.0, 4: 4.0, 6: 4.0, 8: 4.5, 10: 4.6, 12: 4.7}
    run = Run(tmp_path, "eval.every_steps=2", "checkpoint.every_steps=3", "checkpoint.keep=1")
    with monkeypatch.context() as patch:
        at_step(patch, 2, send(signal.SIGTERM))
        assert run() == INTERRUPTED
    monkeypatch.setattr(Trainer, "dev_loss", lambda self: losses[self.state.step])
    assert run("--resume") == 0
    assert run.checkpoints() == ["step-000002", "step-000009"]


LOSSES = {0: 1.0, 4: 3.0, 8: 2.0, 12: 4.0}  # that of the step before the first is never the best


def made_up_losses(patch, losses=LOSSES):
    patch.setattr(Trainer, "dev_loss", lambda self: losses[self.state.step])


def selected(run):
    summary = json.loads((run.folder / "summary.json").read_text())
    return summary["selected_step"], summary["dev_loss"]


@pytest.fixture
def stopped_at_8(tmp_path, monkeypatch):
    """The weights after step 8, saved as the last of a run that has the same 8 first steps."""
    run = Run(tmp_path / "eight")
    with monkeypatch.context() as patch:
        at_step(patch, 8, send(signal.SIGTERM))
        assert run() == INTERRUPTED
    return load_file(run.folder / "checkpoints" / "step-000008" / "model.safetensors")


def assert_final_is(run, weights):
    assert run.weights().keys() == weights.keys()
    assert all(torch.equal(run.weights()[name], tensor) for name, tensor in weights.items())
    AutoModelForCausalLM.from_pretrained(run.folder / "final")
    files = {path.name for path in (run.folder / "final").iterdir()}
    assert "tokenizer.json" in files
    assert not files & {manifest.NAME, checkpoint.STATE, checkpoint.TENSORS, checkpoint.OPTIMIZER}


def test_lowest_dev_loss_is_selected(tmp_path, monkeypatch, stopped_at_8, capsys):
    made_up_losses(monkeypatch)
    run = Run(tmp_path / "run", "eval.select=dev_loss", "checkpoint.keep=1")
    assert run() == 0
    assert selected(run) == (8, 2.0)
    assert "step 8 is taken, of the lowest dev loss, 2.0000" in capsys.readouterr().out
    assert_final_is(run, stopped_at_8)


def test_last_step_is_selected_where_it_is_the_best(tmp_path, monkeypatch, undisturbed):
    made_up_losses(monkeypatch, {**LOSSES, 12: 0.5})
    run = Run(tmp_path, "eval.select=dev_loss")
    assert run() == 0
    assert selected(run) == (12, 0.5)
    assert_final_is(run, undisturbed.weights())


@pytest.mark.parametrize("last", [1, 6, 9, 12])
def test_selection_after_a_crash(tmp_path, monkeypatch, stopped_at_8, last):
    made_up_losses(monkeypatch)
    run = Run(tmp_path / "run", "eval.select=dev_loss", "checkpoint.keep=1")
    with monkeypatch.context() as patch:
        at_step(patch, last, crash)
        with pytest.raises(Killed):
            run()
    assert run("--resume") == 0
    assert selected(run) == (8, 2.0)
    assert_final_is(run, stopped_at_8)


def test_selection_after_a_stop_at_the_last_step(tmp_path, monkeypatch, undisturbed):
    made_up_losses(monkeypatch, {**LOSSES, 12: 0.5})
    run = Run(tmp_path, "eval.select=dev_loss")
    with monkeypatch.context() as patch:
        at_step(patch, 12, send(signal.SIGTERM))
        assert run() == INTERRUPTED
    assert run("--resume") == 0
    assert selected(run) == (12, 0.5)
    assert_final_is(run, undisturbed.weights())


def test_step_that_could_not_be_saved_is_not_selected(tmp_path, monkeypatch, stopped_at_8, capsys):
    """Of those on the disk, or at hand at the end, the best."""

    def flush(path, original=files._flush):
        if "step-000004.tmp" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path)

    made_up_losses(monkeypatch, {**LOSSES, 4: 1.5})
    monkeypatch.setattr(files, "_flush", flush)
    run = Run(tmp_path / "run", "eval.select=dev_loss")
    assert run() == 0
    assert "no checkpoint at step 4" in capsys.readouterr().out
    assert selected(run) == (8, 2.0)
    assert_final_is(run, stopped_at_8)


def test_best_step_is_one_of_those_that_could_be_saved(tmp_path, monkeypatch):
    """Two in a row can't be; a worse one after them is still better than the first."""

    def flush(path, original=files._flush):
        if "step-000004.tmp" in str(path) or "step-000006.tmp" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path)

    made_up_losses(monkeypatch, {0: 9.0, 2: 5.0, 4: 3.0, 6: 2.0, 8: 4.0, 10: 6.0, 12: 7.0})
    monkeypatch.setattr(files, "_flush", flush)
    run = Run(tmp_path / "run", "eval.select=dev_loss", "eval.every_steps=2")
    assert run() == 0
    assert selected(run) == (8, 4.0)


def test_damaged_best_checkpoint_is_reported_and_the_last_step_taken(tmp_path, monkeypatch, undisturbed, capsys):
    made_up_losses(monkeypatch)
    run = Run(tmp_path, "eval.select=dev_loss")
    weights = run.folder / "checkpoints" / "step-000008" / "model.safetensors"
    at_step(monkeypatch, 12, lambda: weights.write_bytes(weights.read_bytes()[:-1]))
    assert run() == 0
    assert "step-000008 (model.safetensors differs from what was written), of the lowest" in capsys.readouterr().out
    assert selected(run) == (12, 4.0)
    assert_final_is(run, undisturbed.weights())


def test_loss_that_is_no_number_is_never_the_best(tmp_path, monkeypatch, stopped_at_8):
    made_up_losses(monkeypatch, {**LOSSES, 4: float("nan")})
    run = Run(tmp_path / "run", "eval.select=dev_loss")
    assert run() == 0
    assert selected(run) == (8, 2.0)
    assert_final_is(run, stopped_at_8)


def test_evaluations_once_an_epoch_by_default(tmp_path):
    run = Run(tmp_path, eval={})
    assert run() == 0
    assert [line["step"] for line in run.points() if line.get("kind") == "dev"] == [0, 5, 10, 12]


def test_chat_templates_in_a_folder_of_their_own(tmp_path, monkeypatch):
    """transformers writes a second chat template into a folder: checkpoints and final have it, and are whole."""
    from abkd_fast.data import quickstart

    tokenizer = copy.deepcopy(quickstart.tokenizer())
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    run = Run(tmp_path / "run", f"tokenizer={tmp_path / 'tokenizer'}", "eval.select=dev_loss")
    with monkeypatch.context() as patch:
        made_up_losses(patch)
        at_step(patch, 9, crash)
        with pytest.raises(Killed):
            run()
        saved = run.folder / "checkpoints" / "step-000008"
        assert {path.name for path in saved.iterdir() if path.is_dir()} == {"additional_chat_templates", "optimizer"}
        assert checkpoint.damage(saved) is None
        assert run("--resume") == 0
    assert (run.folder / "final" / "additional_chat_templates" / "tools.jinja").exists()
