"""A full disk: one line and status 75, or no end at all; `/dev/full` and a limit on the size of files stand for it."""

import argparse
import errno
import io
import os
import pathlib
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from abkd_fast.cli import INTERRUPTED, run
from abkd_fast.console import console
from abkd_fast.errors import ConfigError, Interrupted, disk_errors, library_errors, of_stage
from abkd_fast.files import atomic_folder, exclusive, locked
from abkd_fast.info import main as info
from runs import Run, assert_same, at_step

FULL = pathlib.Path("/dev/full")


@pytest.fixture
def limit():
    """Limits the bytes that a file may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def no_room(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(5000)),
        lambda path: save_file({"weight": torch.ones(5000)}, path),
        lambda path: Tokenizer(WordLevel({f"word{number}": number for number in range(500)}, "word0")).save(str(path)),
    ],
    ids=["Python", "safetensors", "tokenizers"],
)
def test_every_library_reports_it_alike(tmp_path, limit, write):
    limit(1000)

    def fill():
        with atomic_folder(tmp_path / "final") as folder:
            write(folder / "file")

    with pytest.raises(OSError, match="File too large"):
        fill()
    with pytest.raises(Interrupted, match=r"it can't be written \(File too large\): make room"), disk_errors("it"):
        fill()
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), Interrupted, "x can't be written (No space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), Interrupted, "a file can't be written (Disk quota"),
        (Exception("IoError(Os { code: 28, kind: StorageFull })"), Interrupted, "a file can't be written (No space"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), ConfigError, "x can't be used (Permission"),
        (OSError(errno.EROFS, "Read-only file system", "x"), ConfigError, "x can't be used (Read-only"),
        (Exception("Permission denied (os error 13)"), ConfigError, "a file can't be used (Permission denied)"),
    ],
    ids=repr,
)
def test_errors_of_the_disk_are_one_line(error, raised, message):
    for context, stage in ((disk_errors(), ""), (of_stage("teacher"), "stage teacher: ")):
        with pytest.raises(raised) as caught, context:
            raise error
        assert str(caught.value).startswith(stage + message)


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("no model there (os error 13)"),
        Interrupted("not sent (os error 28)"),
        OSError("no such model"),
        ConnectionError("rank 1 is lost"),
        TimeoutError("the lock is held"),
        KeyError("x"),
    ],
    ids=repr,
)
def test_other_errors_stay_what_they_are(error):
    for context in (disk_errors(), library_errors()):
        with pytest.raises(type(error)) as caught, context:
            raise error
        assert caught.value is error


@pytest.mark.parametrize("enter", [locked, lambda path: exclusive(path, "busy")], ids=["folder", "lock"])
def test_folders_and_locks(tmp_path, monkeypatch, enter):
    monkeypatch.setattr(os, "mkdir", no_room)
    monkeypatch.setattr(os, "open", no_room)
    with pytest.raises(Interrupted, match=r"No space left on device.*make room"), disk_errors(), enter(tmp_path / "x"):
        pass


@pytest.mark.parametrize("method", ["add_scalar", "__init__"])
def test_tensorboard_alone_fails_and_metrics_go_on(tmp_path, monkeypatch, undisturbed, capsys, method):
    """Its thread prints a traceback of its own; its writer repeats its first error at every point."""
    from torch.utils.tensorboard import SummaryWriter

    run = Run(tmp_path, "log.samples=1")
    monkeypatch.setattr(SummaryWriter, method, no_room)
    assert run() == 0
    text = capsys.readouterr().out
    assert text.count("no TensorBoard from here on ([Errno 28] No space left on device); training goes on") == 1
    assert "no log" not in text
    assert "no samples" not in text
    assert_same(run, undisturbed)


def test_metrics_alone_fail(tmp_path, monkeypatch, limit, capsys):
    """The real errors of files that are open: one line a point, and no traceback of TensorBoard's thread."""
    run = Run(tmp_path, "data.dev=null", "train.steps=6")
    at_step(monkeypatch, 2, lambda: limit(300))
    assert run() == INTERRUPTED
    out, err = capsys.readouterr()
    assert "no log of step 3 ([Errno 27] File too large); training goes on" in out
    assert out.count("no TensorBoard from here on") == 1
    first, command = err.splitlines()
    assert first.endswith("test/final can't be written (File too large): make room; continue with:")
    assert command.endswith("--resume")


class FullFile(io.StringIO):
    write = flush = no_room


@pytest.mark.parametrize("full", [("stdout",), ("stderr",), ("stdout", "stderr")], ids="+".join)
def test_a_line_that_cannot_be_printed_ends_no_command(monkeypatch, capsys, full):
    def work(_):
        for _ in range(3):
            console.print("a line")
            print("another", file=sys.stderr)

    with monkeypatch.context() as patch:
        for name in full:
            patch.setattr(sys, name, FullFile())
        streams = sys.stdout, sys.stderr
        assert run("x", argparse.ArgumentParser, work, []) == 0
        assert (sys.stdout, sys.stderr) == streams
    text = "".join(capsys.readouterr())
    assert text.count("can't be written to (No space left on device): lines are lost") == 2 - len(full)
    assert text.count("a line") == (0 if "stdout" in full else 3)
    assert text.count("another") == (0 if "stderr" in full else 3)


def test_a_command_whose_output_is_its_result_has_not_done_its_work(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", FullFile())
        assert info([]) == INTERRUPTED
    _, message, command = capsys.readouterr().err.splitlines()
    assert message == "standard output can't be written to (No space left on device): make room; continue with:"
    assert command.endswith("-m abkd_fast.info")


@pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("streams", [("stdout",), ("stderr",), ("stdout", "stderr")], ids="+".join)
def test_pythons_end_makes_no_error_of_it(streams):
    """It flushes both streams, and leaves with status 120 where that fails."""
    for arguments, status in (["-m", "abkd_fast.train", "--help"], 0), (["-m", "abkd_fast", "unknown"], 2):
        with FULL.open("w") as file:
            kept = {name: file if name in streams else subprocess.PIPE for name in ("stdout", "stderr")}
            assert subprocess.run([sys.executable, *arguments], **kept, text=True).returncode == status
