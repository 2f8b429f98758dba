"""Two commands for one run at once: the second one looks again when it has the lock, and overwrites nothing."""

import contextlib
import json

import pytest

from abkd_fast import finished
from runs import Killed, Run, at_step, crash

SHORT = ("train.steps=2", "data.dev=null", "log.every_steps=1")
STAGES = {"a": {"method": "sft"}}


@pytest.fixture
def before_lock(monkeypatch):
    """Calls a function once when the next command has looked at its run's folder, and has not the lock yet."""

    def arrange(action):
        locked = finished.locked

        @contextlib.contextmanager
        def late(folder):
            monkeypatch.setattr(finished, "locked", locked)
            action()
            with locked(folder):
                yield

        monkeypatch.setattr(finished, "locked", late)

    return arrange


def files(run):
    """The content of every file of a run."""
    return {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file() and path.name != "lock"}


def test_fresh_start_while_another_with_other_values_finishes(tmp_path, before_lock, capsys):
    ours, theirs = Run(tmp_path, *SHORT, "optim.lr=1e-3"), Run(tmp_path, *SHORT, "optim.lr=2e-3")
    left = []
    before_lock(lambda: left.append(theirs()) or left.append(files(theirs)))
    assert ours() == 2
    assert "exists already: choose another run.name" in capsys.readouterr().err
    assert left == [0, files(ours)]
    assert json.loads((ours.folder / "config.json").read_text())["optim"]["lr"] == 2e-3


@pytest.mark.slow
def test_fresh_start_while_another_begins_and_dies(tmp_path, before_lock, monkeypatch, capsys):
    ours, theirs = Run(tmp_path, *SHORT), Run(tmp_path, *SHORT)

    def begin():
        with monkeypatch.context() as patch:
            at_step(patch, 1, crash)
            with pytest.raises(Killed):
                theirs()

    before_lock(begin)
    assert ours() == 2
    assert "was not finished: add --resume" in capsys.readouterr().err
    assert ours("--resume") == 0


def test_two_that_resume(tmp_path, before_lock, monkeypatch, capsys):
    run, left = Run(tmp_path, *SHORT, "checkpoint.every_steps=1"), []
    with monkeypatch.context() as patch:
        at_step(patch, 2, crash)
        with pytest.raises(Killed):
            run()
    before_lock(lambda: left.append(run("--resume")) or left.append(files(run)))
    assert run("--resume") == 0
    assert "is finished already: its result is used" in capsys.readouterr().out
    assert left == [0, files(run)]


@pytest.mark.parametrize(("rate", "status"), [("3e-3", 0), pytest.param("1e-3", 2, marks=pytest.mark.slow)])
def test_stages_while_another_command_finishes_them(tmp_path, before_lock, capsys, rate, status):
    """A stage of the same values is used, one of others is refused."""
    ours, theirs = (Run(tmp_path, *SHORT, f"optim.lr={each}", stage="a", stages=STAGES) for each in (rate, "3e-3"))
    left = []
    before_lock(lambda: left.append(theirs()) or left.append(files(theirs)))
    assert ours() == status
    text = capsys.readouterr()
    assert "optim.lr was 0.003, is 0.001" in text.err if status else "is finished already" in text.out
    assert left == [0, files(ours)]
