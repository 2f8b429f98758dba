"""Atomic writes: a reader sees the old file or the new one; what a killed process left is no result."""

import os
import shutil

import pytest

from abkd_fast.files import LOCK, atomic_file, atomic_write, leftovers, locked
from runs import Run


@pytest.mark.parametrize("flush", [True, False])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, flush):
    path = tmp_path / "x.json"
    atomic_write(path, "ä\n", flush)
    assert path.read_bytes() == "ä\n".encode()
    atomic_write(path, b"\xff", flush)

    def fail():
        with atomic_file(path, flush) as temporary:
            assert str(os.getpid()) in temporary.name, "no other process writes to it"
            temporary.write_bytes(b"half")
            assert leftovers(path.parent, path.name) == [temporary]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_bytes() == b"\xff"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("left", ["config.json.tmp", "config.json.4242.tmp"])  # earlier versions wrote the first
def test_a_run_that_was_killed_in_its_first_write_can_be_resumed(tmp_path, left):
    run = Run(tmp_path, "train.steps=1", "data.dev=null")
    run.folder.mkdir(parents=True)
    (run.folder / left).write_text("{")
    (run.folder / LOCK).touch()
    assert run() == 2, "not without --resume"
    assert run("--resume") == 0
    assert not (run.folder / left).exists(), "whoever holds the lock clears up"


def vanish_and_fail(folder):
    with locked(folder):
        shutil.rmtree(folder)
        raise KeyError("what went wrong")


def test_a_folder_that_vanishes_hides_no_error(tmp_path):
    with pytest.raises(KeyError, match="what went wrong"):
        vanish_and_fail(tmp_path / "run")
