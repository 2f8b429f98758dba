"""Errors that one stage of a recipe causes name it, once, with the values, before the first stage and in training."""

import json
import pickle

import pytest

from abkd_fast.errors import ConfigError, Interrupted, of_stage
from abkd_fast.train import main
from abkd_fast.training.trainer import Trainer
from bad_recipes import GOOD, SMALL

FIRST_STUDENT = {"path": "stage:one", "config": None}
KINDS = {  # the words of the message, --set values, keys of the second stage
    "key": ("recipe.json stage two: optim.lrr: unknown key", [], {"optim": {"lrr": 1}}),
    "shared value that this stage can't have": (
        'stage two: recipe.json: hard_weight is 0.2, but method "gkd"',
        ["hard_weight=0.2"],
        {"method": "gkd", "teacher": {"config": SMALL}},
    ),
    "value of --set": ("error: --set two:optim.lr=high: optim.lr must be a number", ["two:optim.lr=high"], {}),
    "section that is missing": ("recipe.json stage two: teacher: missing, and method", [], {"method": "ab"}),
    "device": ("error: stage two: train.device is cuda, but PyTorch sees no GPU", [], {"train": {"device": "cuda"}}),
    "reference": ("error: stage two: student.path: stage:tow: no such stage", [], {"student": {"path": "stage:tow"}}),
    "rows": ("error: stage two: data.train: nowhere.jsonl: no such file", [], {"data": {"train": "nowhere.jsonl"}}),
    "model": ("error: stage two: student.path: ./nowhere", [], {"student": {"path": "./nowhere", "config": None}}),
    "test set": ("error: stage two: eval.sets.x: nowhere.jsonl", [], {"eval": {"sets": {"x": "nowhere.jsonl"}}}),
}


def write(folder, second, **sections):
    """A recipe of two stages, of which the first has no fault."""
    second = {"student": FIRST_STUDENT, **second}
    values = {**GOOD, "run": {"name": "test", "dir": str(folder)}, **sections}
    values["data"] = {**values["data"], "dev": None}
    students = {"one": {"student": {"config": SMALL}}, "two": second}
    (folder / "recipe.json").write_text(json.dumps({**values, "student": {}, "stages": students}))


@pytest.mark.parametrize("kind", KINDS)
def test_the_stage_is_named_once(tmp_path, monkeypatch, capsys, kind):
    words, sets, second = KINDS[kind]
    monkeypatch.chdir(tmp_path)
    write(tmp_path, second)
    words = words.replace("recipe.json: hard_weight", "--set hard_weight=0.2: hard_weight")
    options = [part for override in sets for part in ("--set", override)]
    assert main(["--config", "recipe.json", *options]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("stage two") + message.count("--set two:") == 1
    assert not (tmp_path / "test").exists()


@pytest.mark.parametrize("arguments", [["--dry-run"], ["--show-rows", "1"]])
def test_the_stage_is_named_without_training(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"data": {"train": "nowhere.jsonl"}})
    assert main(["--config", "recipe.json", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: stage two: ")


def test_a_value_that_all_stages_share_is_no_stages_fault(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {}, optim={"lrr": 1})
    assert main(["--config", "recipe.json"]) == 2
    assert capsys.readouterr().err.startswith("error: recipe.json: optim.lrr: unknown key")


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (FloatingPointError("step 1: loss nan"), 1, "error: stage one: step 1: loss nan\n"),
        (Interrupted("SIGTERM after step 1 of 9"), 75, "stage one: SIGTERM after step 1 of 9; continue with:\n"),
    ],
)
def test_failures_of_a_running_stage(tmp_path, monkeypatch, capsys, error, status, words):
    def train(trainer):
        raise error

    write(tmp_path, {})
    monkeypatch.setattr(Trainer, "train", train)
    assert main(["--config", str(tmp_path / "recipe.json")]) == status
    assert capsys.readouterr().err.startswith(words)


def test_a_folder_that_is_there_already(tmp_path, capsys):
    write(tmp_path, {})
    folder = tmp_path / "test" / "two"
    folder.mkdir(parents=True)
    (folder / "notes.txt").touch()
    assert main(["--config", str(tmp_path / "recipe.json")]) == 2
    assert capsys.readouterr().err.startswith(f"error: stage two: {folder} exists")


def test_errors_stay_what_they_are():
    """Kind and key are kept, also by pickle, which sends an error to the other processes."""
    with pytest.raises(ConfigError, match=r"^stage one: optim\.lr is 0$") as caught, of_stage("one"), of_stage("one"):
        raise ConfigError("optim.lr is 0", "optim.lr")
    assert caught.value.key == "optim.lr"
    sent = pickle.loads(pickle.dumps(caught.value))
    assert (str(sent), sent.key) == ("stage one: optim.lr is 0", "optim.lr")
    with pytest.raises(ConfigError, match=r"^optim\.lr is 0$"), of_stage(None):
        raise ConfigError("optim.lr is 0")
