"""SIGTERM and Ctrl-C end a command at any moment with status 75 and one line: from its first imports to its exit."""

import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys

import pytest

import abkd_fast
from abkd_fast import cache, evaluate, generate, info, report, train
from abkd_fast.cli import INTERRUPTED
from abkd_fast.signals import interruptible
from runs import Run, send

GENERATE = ["--model", "none", "--data", "quickstart:dev", "--out", "answers.jsonl"]
EVALUATE = ["--model", "none", "--data", "dolly=quickstart:dev", "--out", "eval"]
COMMANDS = {
    train: ["--config", "quickstart"],
    cache: ["--config", "quickstart"],
    generate: GENERATE,
    evaluate: EVALUATE,
    report: ["runs/none"],
    info: [],
}
NAMES = {module.__name__: arguments for module, arguments in COMMANDS.items()}


def then(number):
    """Stands in for a function: the process gets the signal there."""
    return lambda *_, **__: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("command", "moment"),
    [
        (train, "config.options.describe"),
        (train, "config.recipe.load"),
        (train, "pipeline.check_all"),
        (train, "training.trainer.read_train_data"),
        (train, "models.loading.load"),
        (cache, "config.recipe.load"),
        (cache, "stages.as_begun"),
        (generate, "config.options.add_options"),
        (generate, "models.loading.model_spec"),
        (evaluate, "evaluation.evaluator.Generator"),
        (report, "evaluation.runs.read_runs"),
        (info, "info.describe"),
    ],
)
def test_moments_outside_of_the_loop(tmp_path, monkeypatch, capsys, command, moment, number):
    arguments = Run(tmp_path).arguments if command is train else COMMANDS[command]
    monkeypatch.setattr(f"abkd_fast.{moment}", then(number))
    assert command.main(arguments) == INTERRUPTED
    line, again = capsys.readouterr().err.splitlines()
    assert line == "interrupted; continue with:"
    assert again.startswith(f"{sys.executable} -m {command.__name__}")
    assert not (tmp_path / "test").exists()


@pytest.mark.parametrize("error", [ImportError("initialization failed"), RuntimeError("library")])
def test_an_error_that_a_library_makes_of_a_signal(tmp_path, monkeypatch, capsys, error):
    def load(*_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise error from None

    monkeypatch.setattr("abkd_fast.models.loading.load", load)
    assert Run(tmp_path)() == INTERRUPTED
    assert capsys.readouterr().err.startswith("interrupted; continue with:\n")


def test_a_signal_that_a_library_loses_ends_the_run_at_its_next_step(tmp_path, monkeypatch, capsys):
    from abkd_fast.training import optim, trainer

    def build(*arguments):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            return optim.build_optimizer(*arguments)

    monkeypatch.setattr(trainer, "build_optimizer", build)
    run = Run(tmp_path)
    assert run() == INTERRUPTED
    assert "SIGTERM after step 0 of 12" in capsys.readouterr().err
    assert run.checkpoints() == ["step-000000"]


def test_a_signal_in_a_finalizer_is_no_traceback(tmp_path, monkeypatch, capsys):
    """Python can't raise anything there, and would print what it ignores."""
    from abkd_fast.training import optim, trainer

    class Finalized:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)  # pytest has its own
    monkeypatch.setattr(trainer, "build_optimizer", lambda *given: Finalized() and optim.build_optimizer(*given))
    assert Run(tmp_path)() == INTERRUPTED
    message, _ = capsys.readouterr().err.splitlines()
    assert message.startswith("SIGTERM after step 0 of 12")


def test_second_signal_ends_a_command_at_once():
    child = multiprocessing.get_context("fork").Process(target=_two_signals)
    child.start()
    child.join(30)
    assert child.exitcode == INTERRUPTED


def _two_signals():
    with interruptible():
        try:
            send(signal.SIGINT)()
        except KeyboardInterrupt:
            send(signal.SIGTERM)()
    os._exit(3)


def python(tmp_path, arguments, stand_in=None):
    """Runs Python. The process gets a SIGINT while it imports the module `stand_in`, and then waits there."""
    if stand_in:
        text = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
        (tmp_path / f"{stand_in}.py").write_text(text)
    paths = [str(tmp_path), str(pathlib.Path(abkd_fast.__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=100
    )


SLOW = {"abkd_fast.report"}  # it imports much before torch


@pytest.mark.parametrize(
    ("name", "stand_in"),
    [
        ("abkd_fast.train", "yaml"),
        *(pytest.param(name, "torch", marks=[pytest.mark.slow] * (name in SLOW)) for name in NAMES),
    ],
)
def test_signal_while_modules_are_imported(tmp_path, name, stand_in):
    done = python(tmp_path, ["-m", name, *NAMES[name]], stand_in)
    assert done.returncode == INTERRUPTED, done.stderr
    line, again = done.stderr.splitlines()
    assert line == "interrupted; continue with:"
    assert f"-m {name}" in again


def test_signal_at_the_exit_leaves_the_status_as_it_is(tmp_path):
    script = "import atexit, os; from abkd_fast.cli import leave; atexit.register(os.kill, os.getpid(), {}); leave(0)"
    for number in (signal.SIGTERM, signal.SIGINT):
        done = python(tmp_path, ["-c", script.format(int(number))])
        assert (done.returncode, done.stderr) == (0, "")
