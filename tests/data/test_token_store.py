"""Tokenized data on the disk: what is missing, cut or changed is made again, and never trained on."""

import errno
import json
import os
import pathlib
import shutil

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abkd_fast.data.rows import read_rows
from abkd_fast.data.token_store import stored
from abkd_fast.data.tokenize import SAMPLE
from abkd_fast.errors import ConfigError, Interrupted
from runs import Run, assert_same

IDS, NOTES = [[1, 2, 3], [4, 5]], {"bad": {"3": "is empty"}}


def write(path, ids=IDS):
    table = pyarrow.table({"input_ids": ids, "spans": [[1, 3], [1, 2]]}, schema=SAMPLE.arrow_schema)
    with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    return NOTES


def refuse(_):
    raise AssertionError("it is there already")


def files():
    """The Arrow file and the record beside it."""
    folder = pathlib.Path(datasets.config.HF_DATASETS_CACHE) / "abkd_fast"
    return folder / "key.arrow", folder / "key.json"


def assert_whole(dataset, notes):
    assert dataset["input_ids"][:] == IDS
    assert notes == NOTES


def test_it_is_made_once(capsys):
    assert_whole(*stored("key", write, "tokenizing"))
    assert capsys.readouterr().out == f"tokenizing; later runs find the result in {files()[0].parent}\n"
    assert_whole(*stored("key", refuse, "tokenizing"))
    assert capsys.readouterr().out == ""


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.data())
def test_any_changed_bit_and_any_cut_is_noticed(data):
    for file in files():
        file.unlink(missing_ok=True)  # the example before may have left a harmless cut
    stored("key", write)
    path = data.draw(st.sampled_from(files()))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[place:]
    path.write_bytes(content)
    assert_whole(*stored("key", write))
    assert_whole(*stored("key", refuse))


@pytest.mark.parametrize("record", ["", "[]", "1", "{}", '{"notes": {}}', '{"notes": [], "checksum": 1}', "[" * 9999])
def test_odd_records(record):
    stored("key", write)
    files()[1].write_text(record)
    assert_whole(*stored("key", write))


@pytest.mark.parametrize("number", [0, 1])
def test_a_missing_file_and_another_files_record(capsys, number):
    stored("key", write)
    files()[number].unlink()
    assert_whole(*stored("key", write))
    stored("other", lambda path: write(path, IDS[::-1]))
    shutil.copy(files()[number].with_stem("other"), files()[number])
    capsys.readouterr()
    assert_whole(*stored("key", write))
    assert capsys.readouterr().out == f"{files()[0]} is damaged, or of an earlier version: it is made again\n"


def test_one_changed_token_is_not_trained(tmp_path, undisturbed, capsys):
    run, again = Run(tmp_path), Run(tmp_path / "again")
    assert run() == 0
    arrows = [*pathlib.Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow")]
    for path in arrows:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    capsys.readouterr()
    assert again() == 0
    assert capsys.readouterr().out.count("it is made again") == len(arrows) == 2
    assert_same(again, undisturbed)


def no_room(path):
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("make", ["folder is a file", "read-only", "full", "folder of locks is full"])
def test_a_folder_that_cannot_be_used_is_one_line(tmp_path, monkeypatch, make):
    folder = tmp_path / "folder"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    raised, reason, function = ConfigError, "Not a directory", write
    if make == "folder is a file":
        folder.write_text("")
    elif make == "read-only":
        refused = OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))
        monkeypatch.setattr(os, "mkdir", lambda *_: (_ for _ in ()).throw(refused))
        reason = "Read-only file system"
    else:
        raised, reason, function = Interrupted, "No space left on device", no_room
        if make == "folder of locks is full":
            monkeypatch.setattr(os, "open", lambda *_, **__: no_room(tmp_path / "x"))
    with pytest.raises(raised) as caught:
        stored("key", function)
    way_out = "set HF_DATASETS_CACHE to another folder"
    also = "make room; " if raised is Interrupted else ""
    assert str(caught.value) == f"{folder}/abkd_fast/key.arrow can't be written ({reason}): {also}{way_out}"
    assert not [*tmp_path.rglob("*.tmp")]
    monkeypatch.undo()


def test_a_read_only_folder_that_has_the_data_is_used(monkeypatch):
    stored("key", write)
    monkeypatch.setattr(os, "open", no_room)
    assert_whole(*stored("key", refuse))


def test_the_record_is_json_for_people():
    stored("key", write)
    assert json.loads(files()[1].read_text())["notes"] == NOTES


@pytest.mark.parametrize(
    ("error", "raised", "reason"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), Interrupted, "No space left on device): make room; "),
        (FileExistsError(errno.EEXIST, "File exists", "{cache}"), ConfigError, "File exists): "),
        (PermissionError(errno.EACCES, "Permission denied", "{cache}/x.lock"), ConfigError, "Permission denied): "),
    ],
    ids=repr,
)
def test_the_same_folder_while_a_library_reads_rows(tmp_path, monkeypatch, error, raised, reason):
    """`datasets` makes Arrow files of Parquet there."""
    path, cache = tmp_path / "rows.parquet", str(datasets.config.HF_DATASETS_CACHE)
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["Say 1."], "output": ["1"]}), path)

    def fail(*_, **__):
        raise RuntimeError("generation failed") from type(error)(
            *error.args, *([error.filename.format(cache=cache)] if error.filename else [])
        )

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(raised) as caught:
        read_rows(str(path))
    assert str(caught.value) == f"{cache} can't be written ({reason}set HF_DATASETS_CACHE to another folder"
