"""An interrupted run, resumed, is the undisturbed one: weights to the last bit, log and summary too."""

import contextlib
import errno
import gc
import json
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import threading
import time

import pytest
import torch
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.multiprocessing.reductions import StorageWeakRef

from abkd_fast import files
from abkd_fast.cli import INTERRUPTED
from abkd_fast.config.recipe import load
from abkd_fast.data.batches import shuffled_batches
from abkd_fast.signals import StopSignals
from abkd_fast.train import main
from abkd_fast.training import checkpoint, checkpoint_writer
from abkd_fast.training.trainer import Trainer
from conftest import needs_proc
from runs import GPT2, TIED, Killed, Run, assert_same, at_step, crash, crash_and_resume, poison, send


@pytest.fixture(scope="module")
def forked():
    """Processes from a server that has imported everything once, so that a run begins at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["abkd_fast.pipeline", "torch.utils.tensorboard", "test_resume"])
    return context


@pytest.mark.parametrize(
    ("step", "saved"),
    [(1, None), (4, None), (5, "step-000004"), (6, "step-000005"), (8, "step-000005"), (12, "step-000010")],
    ids=["first step", "before the first checkpoint", "epoch's last step", "epoch's first", "middle", "last step"],
)
def test_crash(tmp_path, monkeypatch, undisturbed, capsys, step, saved):
    run = Run(tmp_path)
    with monkeypatch.context() as patch:
        at_step(patch, step, crash)
        with pytest.raises(Killed):
            run()
    assert run() == 2
    assert "was not finished: add --resume" in capsys.readouterr().err
    assert run("--resume") == 0
    assert (f"from {run.folder / 'checkpoints' / saved}" if saved else "from the start") in capsys.readouterr().out
    assert_same(run, undisturbed)


def test_checkpoint_is_of_its_step_however_late_it_is_written(tmp_path, monkeypatch, undisturbed, capsys):
    run, save, crashed = Run(tmp_path), checkpoint.Checkpoints.save, threading.Event()

    def late(self, step, *arguments):
        assert step < 5 or crashed.wait(60), "training waits for the checkpoint"
        return save(self, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", late)
        at_step(patch, 7, lambda: (crashed.set(), crash()))
        with pytest.raises(Killed):
            run()
    assert run("--resume") == 0
    assert "checkpoints/step-000005" in capsys.readouterr().out
    assert_same(run, undisturbed)


@needs_proc
def test_copies_are_gone_with_their_checkpoint():
    weights = {"weights": torch.ones(1000)}
    gc.disable()  # it would find, in time, what keeps them
    try:
        copies = [checkpoint_writer._copied({"model": weights})["model"]["weights"] for _ in range(5)]
        assert all(torch.equal(copy, weights["weights"]) for copy in copies)
        storages = [StorageWeakRef(copy.untyped_storage()) for copy in copies]
        del copies
        assert all(storage.expired() for storage in storages)
    finally:
        gc.enable()


def test_missing_parts_are_noticed(tmp_path):
    """torch.distributed.checkpoint would put zeros where another process's file is not to be seen."""
    save_file({"moment": torch.ones(4, 3), "step": torch.tensor(1.0)}, tmp_path / "shard-00001.safetensors")
    own = {"step": torch.tensor(1.0)}
    checkpoint_writer._check_parts(tmp_path, {**own, "moment": torch.ones(4, 3)})
    with pytest.raises(OSError, match="parts of moment are missing: all processes have to see the same folders"):
        checkpoint_writer._check_parts(tmp_path, {**own, "moment": torch.ones(8, 3)})


def test_tensorboard_has_every_point_once(tmp_path, monkeypatch):
    run = Run(tmp_path)
    with monkeypatch.context() as patch:
        at_step(patch, 9, crash)
        with pytest.raises(Killed):
            run()
    time.sleep(1)  # TensorBoard orders its files by the second
    assert run("--resume") == 0
    board = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    assert [point.step for point in board.Scalars("train/loss")] == [3, 6, 9, 12]
    assert [point.step for point in board.Scalars("dev/loss")] == [0, 4, 8, 12]


@pytest.mark.parametrize("sections", [{"dtype": "float64"}, {"model": GPT2}, {"untied": True}], ids=str)
def test_stopped_after_every_step(tmp_path, sections):
    """Stopped after every single step, in float64 too, with all kinds of dropout, tied and untied weights."""
    model = sections.get("model", {**TIED, "tie_word_embeddings": "untied" not in sections})
    overrides = [f"train.dtype={sections.get('dtype', 'float32')}", "train.steps=4", "checkpoint.every_steps=1"]
    runs = [Run(tmp_path / name, *overrides, student={"config": model}) for name in ("once", "pieces")]
    assert runs[0]() == 0
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 1, send(signal.SIGTERM))
        assert runs[1]() == INTERRUPTED
    for _ in range(3):
        random.seed()
        torch.rand(3)
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, 1, send(signal.SIGTERM))
            assert runs[1]("--resume") == INTERRUPTED
    assert runs[1]("--resume") == 0
    assert_same(runs[1], runs[0])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_saves_and_the_printed_command_continues(tmp_path, monkeypatch, undisturbed, capsys, name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    run = Run(tmp_path)
    at_step(monkeypatch, 7, send(number))
    assert run() == INTERRUPTED == 75
    assert signal.getsignal(number) is before
    message, command = capsys.readouterr().err.splitlines()
    assert message == f"{name} after step 7 of 12; {run.folder}/checkpoints/step-000007 is saved; continue with:"
    if name == "SIGTERM":
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        assert main(shlex.split(command)[3:]) == 0
    assert_same(run, undisturbed)


def test_signal_ends_an_evaluation_which_is_done_again(tmp_path, monkeypatch, undisturbed, capsys):
    for moment in (0, 8):  # before the first step, and after step 8
        run = Run(tmp_path / str(moment))
        evaluate = Trainer.dev_loss

        def interrupted(self, moment=moment, evaluate=evaluate):
            if self.state.step == moment:
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(self)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "dev_loss", interrupted)
            assert run() == INTERRUPTED
        assert f"step-{moment:06d} is saved" in capsys.readouterr().err
        assert run("--resume") == 0
        assert_same(run, undisturbed)


def test_second_signal_leaves_at_once(forked):
    child = forked.Process(target=_two_signals)
    child.start()
    child.join(30)
    assert child.exitcode == -signal.SIGTERM


def _two_signals():
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == "SIGINT"
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)


def _train(arguments, log):
    with open(log, "w", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        raise SystemExit(main(arguments))


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, undisturbed, forked):
    """SIGKILL, until 20 have struck a run at work; saving at every step, so that many strike a checkpoint."""
    dice, kills, unfinished, number = random.Random(5), 0, 0, 0
    while kills < 20:
        number += 1
        run = Run(tmp_path / f"run{number}", "checkpoint.every_steps=1")
        code, attempt = None, 0
        while code != 0:
            log = tmp_path / f"{number}-{attempt}.log"
            more = ["--resume"] if run.folder.exists() else []
            child = forked.Process(target=_train, args=([*run.arguments, *more], log))
            child.start()
            if dice.random() < 0.7:  # from the first step on, so that a run gets ahead; the others strike its start
                while child.is_alive() and not (log.exists() and "  steps  " in log.read_text()):
                    time.sleep(0.002)
            child.join(dice.uniform(0, 0.5) if kills < 20 else None)
            child.kill()
            child.join()
            code, attempt = child.exitcode, attempt + 1
            assert code in (0, -signal.SIGKILL), log.read_text()
            kills += code != 0
            folder = run.folder / "checkpoints"
            unfinished += folder.exists() and any(path.suffix == ".tmp" for path in folder.iterdir())
        assert_same(run, undisturbed)
        assert not [name for name in run.checkpoints() if name.endswith(".tmp")]
    assert unfinished > 0, "no kill struck the writing of a checkpoint"


def test_damaged_newest_checkpoint_is_reported_and_the_one_before_used(tmp_path, monkeypatch, undisturbed, capsys):
    run = Run(tmp_path)
    with monkeypatch.context() as patch:
        at_step(patch, 7, send(signal.SIGTERM))
        assert run() == INTERRUPTED
    assert run.checkpoints() == ["step-000004", "step-000005", "step-000007"]  # best, and the newest two
    newest = run.folder / "checkpoints" / "step-000007"
    content = bytearray((newest / checkpoint.TENSORS).read_bytes())
    content[-5] ^= 1
    (newest / checkpoint.TENSORS).write_bytes(content)
    shutil.copytree(tmp_path / "test", tmp_path / "all" / "test")
    assert run("--resume") == 0
    assert "step-000007 (trainer.safetensors differs" in capsys.readouterr().out
    assert "step-000007.damaged" in run.checkpoints()
    assert_same(run, undisturbed)

    broken = Run(tmp_path / "all")
    for folder in (broken.folder / "checkpoints").iterdir():
        (folder / "model.safetensors").unlink()
    for _ in range(2):
        assert broken("--resume") == 2
        assert "is damaged (FileNotFoundError" in capsys.readouterr().err


def test_full_disk_keeps_the_last_checkpoint_and_training_goes_on(tmp_path, monkeypatch, undisturbed, capsys):
    run = Run(tmp_path)

    def flush(path, original=files._flush):
        if "step-000010.tmp" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path)

    monkeypatch.setattr(files, "_flush", flush)
    assert run() == 0
    assert "no checkpoint at step 10 ([Errno 28] No space left on device); training goes on" in capsys.readouterr().out
    assert run.checkpoints() == ["step-000005", "step-000008"]
    assert_same(run, undisturbed)


def test_writes_that_fail_in_every_library(tmp_path, monkeypatch, undisturbed, capsys):
    """A limit on the size of a file stands for a full disk: the real error of safetensors, and of the final save."""
    run = Run(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(monkeypatch, 7, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard)))
    try:
        assert run() == INTERRUPTED
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    output = capsys.readouterr()
    assert "no checkpoint at step 8 (" in output.out
    assert "final can't be written" in output.err
    assert "continue with" in output.err
    assert run.checkpoints() == ["step-000004", "step-000005"]
    assert not (run.folder / "final.tmp").exists()
    assert run("--resume") == 0
    assert_same(run, undisturbed)


def test_changed_configuration_is_refused_by_key(tmp_path, monkeypatch, capsys):
    run = Run(tmp_path)
    with monkeypatch.context() as patch:
        at_step(patch, 6, send(signal.SIGTERM))
        assert run() == INTERRUPTED
    before = (run.folder / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert run("--resume", "--set", "optim.lr=0.1", "--set", "train.batch_size=5") == 2
    error = capsys.readouterr().err
    assert "(optim.lr was 0.003, is 0.1; train.batch_size was 4, is 5): undo that" in error
    assert (run.folder / "metrics.jsonl").read_bytes() == before
    moved = tmp_path / "elsewhere"
    shutil.copytree(run.folder, moved / "test")
    free = ["log.every_steps=2", "checkpoint.keep=1", f"run.dir={moved}", "train.on_nonfinite=skip"]
    assert run("--resume", *(part for key in free for part in ("--set", key))) == 0


def test_changed_data_are_refused(tmp_path, monkeypatch, write_jsonl, capsys):
    rows = [{"prompt": f"Say {number}. ", "output": str(number)} for number in range(20)]
    run = Run(tmp_path, f"data.train={write_jsonl(rows)}")
    with monkeypatch.context() as patch:
        at_step(patch, 6, send(signal.SIGTERM))
        assert run() == INTERRUPTED
    rows[3]["output"] = "another"
    write_jsonl(rows)
    assert run("--resume") == 2
    assert "data.train: its text or the tokenizer has changed since" in capsys.readouterr().err


def test_state_of_an_earlier_version_is_refused(tmp_path, monkeypatch, capsys):
    """Its samples have other columns. Its rows, stored in another format, have another fingerprint."""
    run = Run(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("abkd_fast.data.token_store.FORMAT", 1)
        at_step(patch, 6, send(signal.SIGTERM))
        assert run() == INTERRUPTED
    capsys.readouterr()
    assert run("--resume") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: data.train: its text or the tokenizer has changed since ")
    assert line.endswith(", or another version of abkd_fast saved it: begin again in another folder")


def test_stop_while_models_load(tmp_path, monkeypatch, undisturbed, capsys):
    """Outside of the loop, Ctrl-C has no step to finish: it prints how to continue, and no traceback."""
    run = Run(tmp_path)

    def load(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("abkd_fast.models.loading.load", load)
        assert [run(), run("--resume")] == [INTERRUPTED, INTERRUPTED]
    message, command, *again = capsys.readouterr().err.splitlines()
    assert message == "interrupted; continue with:"
    assert again == [message, command]
    assert not run.folder.exists()
    assert main(shlex.split(command)[3:]) == 0
    assert_same(run, undisturbed)


def test_stages_resume(tmp_path, monkeypatch, capsys):
    """The finished one is used again, the one that was interrupted goes on, the last begins."""
    stages = {
        "teacher": {"method": "sft"},
        "student": {"method": "ab", "teacher": {"path": "stage:teacher"}},
        "after": {"method": "sft", "student": {"path": "stage:student", "config": None}},
    }
    whole, parts = (Run(tmp_path / name, stage="after", stages=stages) for name in ("whole", "parts"))
    assert whole() == 0
    with monkeypatch.context() as patch:
        at_step(patch, 12 + 7, send(signal.SIGTERM))
        assert parts() == INTERRUPTED
    capsys.readouterr()
    assert parts() == 2
    assert "student exists, but was not finished: add --resume" in capsys.readouterr().err
    assert parts("--resume") == 0
    output = capsys.readouterr().out
    assert output.count("is finished already") == 1
    assert output.count("step-000007") == 1
    for stage in stages:
        whole.folder, parts.folder = tmp_path / "whole" / "test" / stage, tmp_path / "parts" / "test" / stage
        assert_same(parts, whole)
    (tmp_path / "parts").rename(tmp_path / "moved")  # results are found again wherever the folder of all runs is
    assert parts("--set", f"run.dir={tmp_path / 'moved'}", "--config", str(tmp_path / "moved" / "recipe.json")) == 0
    assert capsys.readouterr().out.count("is finished already") == 3


def test_resuming_a_finished_run_says_so(undisturbed, capsys):
    before = (undisturbed.folder / "metrics.jsonl").read_bytes()
    assert undisturbed("--resume") == 0
    assert "is finished already" in capsys.readouterr().out
    assert (undisturbed.folder / "metrics.jsonl").read_bytes() == before
    assert undisturbed() == 2


def test_resume_never_takes_a_folder_that_is_no_run(tmp_path, capsys):
    run = Run(tmp_path)
    run.folder.mkdir()
    (run.folder / "precious").write_text("x")
    assert run("--resume") == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in run.folder.iterdir()] == ["precious"]


def test_non_finite_gradient_stops_and_no_checkpoint_is_poisoned(tmp_path, monkeypatch, capsys):
    run = Run(tmp_path, "checkpoint.every_steps=2", "log.every_steps=100")
    poison(monkeypatch, 7)
    assert run() == 1
    error = capsys.readouterr().err
    rows = ", ".join(str(row + 1) for row in sorted(shuffled_batches(20, 4, 10, 1)[1]))
    assert error.startswith("error: step 7: loss ")
    assert f"gradient norm inf, samples quickstart:small row {rows}; last good checkpoint: " in error
    assert "step-000006; resume with train.on_nonfinite=skip" in error
    assert run.checkpoints() == ["step-000004", "step-000006"]
    assert run("--resume", "--set", "train.on_nonfinite=skip") == 0
    assert "skipped 1 steps that were not finite, the first: step 7: " in capsys.readouterr().out
    assert json.loads((run.folder / "summary.json").read_text())["skipped_steps"] == 1


def test_skipped_step_changes_no_weight_moment_or_count(tmp_path, monkeypatch):
    run = Run(tmp_path, "train.on_nonfinite=skip", "log.every_steps=1", "optim.warmup_steps=0")
    trainer = Trainer(load(run.arguments[1], run.arguments[3::2])[0])
    trainer.build()

    def everything():
        weights = {name: p.detach().clone() for name, p in trainer.student.named_parameters()}
        moments = checkpoint_writer.optimizer_tensors(trainer.optimizer, trainer.student)
        return weights | {name: tensor.clone() for name, tensor in moments.items()}

    poison(monkeypatch, 2)
    for batch in trainer.batches(9):
        trainer.state.step += 1
        before = everything()
        trainer.train_step(batch)
        after = everything()
        same = [torch.equal(after[name], tensor) for name, tensor in before.items()]
        assert all(same) if trainer.state.step == 2 else not any(same)
    assert {tensor.item() for name, tensor in after.items() if name.startswith("step.")} == {2.0}

    assert run() == 0
    points = [line for line in run.points() if line.get("kind") == "train"]
    assert [(point["loss"], point["grad_norm"], point["skipped_steps"]) for point in points[1:2]] == [(None, None, 1)]
    assert sum(point["skipped_steps"] for point in points) == 1


def test_method_state_is_kept(tmp_path, monkeypatch):
    from abkd_fast.methods import METHODS
    from abkd_fast.methods.sft import SupervisedFineTuning

    class Counting(SupervisedFineTuning):
        calls = 0

        def loss(self, *arguments, **keywords):
            self.calls += 1
            return super().loss(*arguments, **keywords)

        def state_dict(self):
            return {"calls": self.calls}

        def load_state_dict(self, state):
            self.calls = state["calls"]

    monkeypatch.setitem(METHODS, "sft", Counting)
    run = Run(tmp_path, "train.max_tokens=8192")
    with monkeypatch.context() as patch:
        at_step(patch, 6, send(signal.SIGTERM))
        assert run() == INTERRUPTED
    trainer = Trainer(load(run.arguments[1], run.arguments[3::2])[0], resume=True)
    trainer.build()
    assert trainer.method.calls == 6


def test_earlier_alphanet_without_a_last_word_was_per_batch(tmp_path, monkeypatch, capsys):
    """So a run that an earlier version began goes on per batch or not at all. Runs now write the word."""
    sections = {"method": "kd", "teacher": {"config": TIED}, "cache": {"mode": "off"}}
    run = Run(tmp_path, "loss=alphanet:0.2,0.9,batch", **sections)
    with monkeypatch.context() as patch:
        at_step(patch, 7, send(signal.SIGTERM))
        assert run() == INTERRUPTED
    file = run.folder / "config.json"
    values = json.loads(file.read_text())
    assert values["loss"] == "alphanet:0.2,0.9,batch"
    file.write_text(json.dumps({**values, "loss": "alphanet:0.2,0.9"}))
    message = 'loss was "alphanet:0.2,0.9,batch", is "alphanet:0.2,0.9,token"): undo that to resume it'
    for loss in ("alphanet:0.2,0.9", "alphanet:0.2,0.9,token"):
        assert run("--resume", "--set", f"loss={loss}") == 2
        assert message in capsys.readouterr().err
    assert run("--resume") == 0
    assert json.loads(file.read_text())["loss"] == "alphanet:0.2,0.9,batch"
    assert run("--resume", "--set", "loss=alphanet:0.2,0.9") == 2


def test_teacher_of_random_weights_is_the_same_one_on_resume(tmp_path, monkeypatch):
    sections = {"method": "kd", "teacher": {"config": {**TIED, "num_hidden_layers": 1}}, "cache": {"mode": "off"}}
    (undisturbed := Run(tmp_path / "undisturbed", **sections))()
    run = Run(tmp_path / "run", **sections)
    crash_and_resume(run, monkeypatch, 7)
    assert_same(run, undisturbed)


def test_tensorboard_without_room_costs_nothing_else(tmp_path, monkeypatch, undisturbed, capsys):
    """Its writer repeats its first error at every call: checkpoints and the result have to do without it."""
    from torch.utils.tensorboard import SummaryWriter

    def fails(self, *arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("add_scalar", "flush", "close"):
        monkeypatch.setattr(SummaryWriter, name, fails)
    run = Run(tmp_path)
    assert run() == 0
    assert "no checkpoint" not in capsys.readouterr().out
    assert run.checkpoints() == undisturbed.checkpoints()
    assert_same(run, undisturbed)
