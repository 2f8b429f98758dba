"""Finished stages and checkpoints: what differs from what was written is noticed before it is used."""

import json
import shutil

import pytest

from abkd_fast import manifest
from abkd_fast.cache import main as build_cache
from abkd_fast.json_shape import problem
from runs import TIED, Run, assert_same

STAGES = {
    "teacher": {"method": "sft", "train": {"steps": 4}, "eval": {"every_steps": None}},
    "student": {"method": "kd", "teacher": {"path": "stage:teacher"}, "train": {"steps": 4}},
}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "final"
    (folder / "templates").mkdir(parents=True)
    for name in ("model.safetensors", "templates/chat.jinja"):
        (folder / name).write_text(name)
    manifest.write(folder, folder / manifest.NAME)
    return folder


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda folder: flip(folder / "templates" / "chat.jinja"),
            "templates/chat.jinja differs from what was written",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "FileNotFoundError: "),
        (lambda folder: (folder / "model.bin").write_text("x"), "model.bin is not in manifest.json"),
        (lambda folder: (folder / manifest.NAME).unlink(), "FileNotFoundError: "),
        *(
            (lambda folder, text=text: (folder / manifest.NAME).write_bytes(text), reason)
            for text, reason in {
                b"{}": "manifest.json names no files",
                b"[]": "manifest.json names no files",
                b'{"model.safetensors": 1}': "templates/chat.jinja is not in manifest.json",
                b'{"model.safetensors": 1, "templates/chat.jinja": 2}': "model.safetensors differs",
                b"\xff": "UnicodeDecodeError: ",
                b"{": "JSONDecodeError: ",
                b"[" * 99999: "RecursionError: ",
            }.items()
        ),
    ],
)
def test_damage(folder, damage, reason):
    assert manifest.damage(folder, folder / manifest.NAME) is None
    damage(folder)
    assert manifest.damage(folder, folder / manifest.NAME).startswith(reason)


def test_a_file_that_somebody_adds_to_a_result_is_no_damage(folder):
    (folder / "README.md").write_text("")
    assert manifest.damage(folder, folder / manifest.NAME, may_have_more=True) is None
    flip(folder / "model.safetensors")
    assert "differs" in manifest.damage(folder, folder / manifest.NAME, may_have_more=True)


def test_a_changed_teacher_of_an_earlier_stage_is_not_used(tmp_path, capsys):
    run = Run(tmp_path, student={"config": TIED}, stages=STAGES, stage="student")
    assert run() == 0
    teacher, student = tmp_path / "test" / "teacher", run.folder
    kept = run.weights()
    shutil.rmtree(student)
    flip(teacher / "final" / "model.safetensors")
    capsys.readouterr()
    for command in (run, lambda: build_cache(run.arguments)):
        assert command() == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"{teacher / 'final'} is damaged (model.safetensors differs from what was written): move final/" in error
    assert not student.exists()
    (teacher / "final").rename(tmp_path / "aside")
    assert run("--resume") == 0
    assert all(tensor.equal(kept[name]) for name, tensor in run.weights().items())
    flip(teacher / "final" / "tokenizer.json")
    (teacher / manifest.NAME).unlink()  # it was changed on purpose
    assert run("--resume") == 0


def test_a_damaged_line_of_the_log_costs_no_other(tmp_path, monkeypatch, undisturbed):
    folder = tmp_path / "test"
    shutil.copytree(undisturbed.folder, folder)
    run = Run(tmp_path)
    shutil.rmtree(folder / "final")
    log = folder / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    damaged = b'{"kind": "train", "st\xff\n'
    log.write_bytes(b"".join([lines[0], damaged, *lines[1:], b'{"kind": "tr']))
    assert run("--resume") == 0
    after = log.read_bytes().splitlines(keepends=True)
    assert after[1] == damaged
    log.write_bytes(b"".join([after[0], *after[2:]]))
    assert_same(run, undisturbed)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"name": "x", "size": 1, "best": None}, None),
        ({"name": "x", "size": 1.5, "best": {"step": 3}, "more": []}, None),
        ([], "it is a list, expected an object"),
        (7, "it is 7, expected an object"),
        ({"name": "x"}, "size is missing"),
        ({"name": 3, "size": 1}, "name is 3, expected text"),
        ({"name": "x", "size": True}, "size is true, expected a number"),
        ({"name": "x", "size": 10**400}, f"size is {str(10**400)[:60]}…, expected a number"),
        ({"name": "x", "size": 1, "best": {"step": 1.0}}, "best.step is 1.0, expected a whole number"),
        ({"name": "x", "size": 1, "best": {}}, "best.step is missing"),
        ({"name": "x", "size": 1, "all": {"a": 1, "b": "c"}}, 'all.b is "c", expected a number'),
    ],
)
def test_shapes(value, expected):
    shape = {"name": str, "size": float, "best?": ({"step": int}, None), "all?": {"*": float}}
    assert problem(json.loads(json.dumps(value)), shape) == expected
