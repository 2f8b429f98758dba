"""What may not be read or written is one line and status 2, before anything is changed."""

import contextlib
import ctypes
import functools
import os
import pathlib
import shutil
import signal

import pytest

from abkd_fast import evaluate, generate, push, report, train
from abkd_fast.cli import INTERRUPTED
from runs import Run, at_step, send

VERSION, SETS = 0x20080522, ctypes.c_uint32 * 6  # of Linux's capabilities: effective, permitted, inheritable, twice
OVER_PERMISSIONS = 0b110  # the effective ones that permissions don't bind


@contextlib.contextmanager
def bound_by_permissions():
    """Takes from root, in this thread, what lets it read and write everything."""
    if os.geteuid():
        yield
        return
    libc, thread, before = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(VERSION, 0), SETS()
    if not hasattr(libc, "capset") or libc.capget(thread, before):
        pytest.skip("root has no capabilities here that could be taken away")
    libc.capset(thread, SETS(before[0] & ~OVER_PERMISSIONS, *before[1:]))
    try:
        yield
    finally:
        libc.capset(thread, before)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a finished run and of one that was interrupted, and their commands."""
    found = {name: Run(tmp_path_factory.mktemp(name), "train.steps=6") for name in ("finished", "interrupted")}
    assert found["finished"]() == 0
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 3, send(signal.SIGTERM))
        assert found["interrupted"]() == INTERRUPTED
    return found


def tree(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


RESUME, AGAIN = ("interrupted", train.main, ["--resume"]), ("finished", train.main, ["--resume"])
REPORT = "finished", report.main, ["{run}"]
PUSH = "finished", push.main, ["{run}", "somebody/model", "--dry-run"]
MODEL = ["--model", "{run}/final", "--batch-size", "2"]
EVALUATE = "finished", evaluate.main, [*MODEL, "--data", "x=quickstart:test", "--rows", "2", "--out", "{run}/out"]
GENERATE = "finished", generate.main, [*MODEL, "--data", "quickstart:test", "--rows", "2", "--out", "{run}/out.jsonl"]
STUDENT = "finished", train.main, ["--set", "student.path={run}/final", "--set", "student.config=null"]
NEWEST = "checkpoints/step-000003"


@pytest.mark.parametrize(
    ("command", "path", "mode"),
    [
        *((RESUME, "", mode) for mode in (0o000, 0o444, 0o555)),
        *((RESUME, "checkpoints", mode) for mode in (0o000, 0o444, 0o555)),
        *((RESUME, path, 0o000) for path in ("config.json", "metrics.jsonl", "lock", NEWEST)),
        *((RESUME, f"{NEWEST}/{name}", 0o000) for name in ("manifest.json", "model.safetensors", "trainer.json")),
        (RESUME, "metrics.jsonl", 0o444),
        *((AGAIN, path, 0o000) for path in ("", "config.json", "summary.json")),
        *((REPORT, path, 0o000) for path in ("", "config.json", "summary.json", "metrics.jsonl")),
        (REPORT, "", 0o555),
        *((PUSH, path, 0o000) for path in ("", "final")),
        *((EVALUATE, path, 0o000) for path in ("final", "final/config.json", "final/model.safetensors")),
        (EVALUATE, "", 0o555),
        *((GENERATE, path, 0o000) for path in ("final", "final/tokenizer.json")),
        (GENERATE, "", 0o555),
        *((STUDENT, path, 0o000) for path in ("final", "final/config.json", "final/model.safetensors")),
    ],
    ids=lambda value: value[1].__module__.rpartition(".")[2] if isinstance(value, tuple) else None,
)
def test_one_line_and_nothing_is_changed(tmp_path, monkeypatch, runs, capsys, command, path, mode):
    name, main, words = command
    shutil.copytree(runs[name].folder, tmp_path / "test")
    folder = tmp_path / "test"
    arguments = [word.format(run=folder) for word in words]
    if main is train.main:
        place = tmp_path if words == ["--resume"] else tmp_path / "new"
        arguments = [*runs[name].arguments, "--set", f"run.dir={place}", *arguments]
    before = tree(folder)
    monkeypatch.setattr(os, "access", functools.partial(os.access, effective_ids=True))
    (folder / path).chmod(mode)
    try:
        with bound_by_permissions():
            assert main(arguments) == 2
    finally:
        (folder / path).chmod(0o755)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert str(folder / path) in line
    assert "Permission denied" in line or "is not a folder that can be written to" in line
    changed = {path.name for path, content in tree(folder).items() if before.get(path) != content}
    assert changed <= {"lock", "config.json"}  # the latter has another run.dir now


def test_rows_that_may_not_be_read(tmp_path, write_jsonl, capsys):
    rows = pathlib.Path(write_jsonl([{"prompt": "Say 1.", "output": "1"}] * 20))
    rows.chmod(0)
    with bound_by_permissions():
        assert Run(tmp_path, f"data.train={rows}")() == 2
    assert capsys.readouterr().err == f"error: data.train: {rows}: can't be read (Permission denied)\n"
