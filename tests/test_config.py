import json
import subprocess
import sys
import time

import pytest

from abkd_fast.config import Config, ConfigError
from abkd_fast.recipe import RECIPES, load

GOOD = {
    "run": {"name": "test"},
    "tokenizer": "quickstart",
    "student": {"config": {"model_type": "llama"}},
    "teacher": {"path": "somewhere"},
    "data": {"train": "quickstart:small"},
}


@pytest.fixture
def write(tmp_path):
    def write(values):
        path = tmp_path / "recipe.json"
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return str(path)

    return write


def changed(**sections):
    values = json.loads(json.dumps(GOOD))
    for name, value in sections.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return values


def test_defaults_and_types(write):
    (loaded,) = load(write(changed(optim={"lr": 1, "betas": [0.9, 0.95]})))
    assert loaded.optim.lr == 1.0
    assert isinstance(loaded.optim.lr, float)
    assert loaded.optim.betas == (0.9, 0.95)
    assert loaded.method == "ab"
    assert loaded.to_dict()["train"]["batch_size"] == 32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed(optim={"lrr": 1}), "optim.lrr: unknown key; did you mean lr?"),
        (changed(optmi={"lr": 1}), "optmi: unknown key; did you mean optim?"),
        (changed(method="abb"), 'method: unknown method "abb"; did you mean ab?'),
        (changed(loss="ba:1,2"), 'unknown divergence "ba"; did you mean "ab"?'),
        (changed(loss="ab:x"), "expected numbers after the colon"),
        (changed(optim={"lr": "0.2x"}), 'optim.lr must be a number, got "0.2x"'),
        (changed(optim={"lr": True}), "optim.lr must be a number, got true"),
        (changed(optim={"lr": -0.1}), "optim.lr is -0.1, expected above 0"),
        (changed(optim={"schedule": "linear"}), 'optim.schedule is "linear", expected one of cosine, constant'),
        (changed(optim={"betas": [0.9]}), "optim.betas must be a list of 2 numbers"),
        (changed(optim={"betas": [0.9, 1.0]}), "betas are"),
        (changed(train={"epochs": 1.5}), "train.epochs must be a whole number, got 1.5"),
        (changed(train={"batch_size": 0}), "train.batch_size is 0, expected at least 1"),
        (changed(data={"max_length": 10000}), "train.max_tokens is 8192"),
        (changed(student={"path": "x"}), "student.give either path or config"),
        (changed(student={"dropout": 2}), "dropout is 2"),
        (changed(teacher=None), "teacher: missing"),
        ({**GOOD, "tokenizer": None}, "tokenizer: missing"),
        ({k: v for k, v in GOOD.items() if k != "run"}, "run: missing"),
        (changed(student=5), "student: expected an object, got 5"),
        ('{"run": {"name": "x",}}', "line 1: broken JSON"),
        ('{\n "run": 1\n "data": 2}', "line 3: broken JSON"),
        ("[1]", "expected a JSON object"),
    ],
)  # fmt: skip
def test_errors_name_the_key_and_the_way_out(write, values, message):
    with pytest.raises(ConfigError) as error:
        load(write(values))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match=r"quikstart.json: no such file; did you mean quickstart.json\?"):
        load("quikstart.json")


def test_overrides(write):
    path = write(changed())
    (loaded,) = load(
        path,
        [
            "optim.lr=1e-4",
            "run.name=other",
            "teacher.path=../models/t",
        ],
    )
    assert (loaded.optim.lr, loaded.run.name, loaded.teacher.path) == (1e-4, "other", "../models/t")
    with pytest.raises(ConfigError, match='no stage "other"'):
        load(path, ["other:train.steps=3"])
    with pytest.raises(ConfigError, match="expected key=value"):
        load(path, ["optim.lr"])
    with pytest.raises(ConfigError, match="name is not a section"):
        load(path, ["run.name.x=1"])


def test_stages_merge_and_take_their_own_overrides(write):
    stages = {"one": {"method": "sft", "optim": {"eps": 1e-6}}, "two": {"teacher": {"path": "stage:one"}}}
    one, two = load(write({**changed(optim={"lr": 1e-3}), "stages": stages}), ["two:train.steps=7", "run.seed=3"])
    assert (one.method, one.optim.lr, one.optim.eps, one.train.steps) == ("sft", 1e-3, 1e-6, None)
    assert (two.method, two.optim.lr, two.optim.eps, two.train.steps) == ("ab", 1e-3, 1e-8, 7)
    assert [c.run.seed for c in (one, two)] == [3, 3]
    assert str(two.run.folder) == "runs/test/two"
    # What a stage sets itself, above all "stage:NAME", is only changed by naming the stage.
    one, two = load(write({**changed(), "stages": stages}), ["teacher.path=x", "optim.eps=1e-7", "one:optim.eps=1e-5"])
    assert (one.teacher.path, two.teacher.path) == ("x", "stage:one")
    assert (one.optim.eps, two.optim.eps) == (1e-5, 1e-7)
    with pytest.raises(ConfigError, match='no stage "tow"; did you mean two'):
        load(write({**changed(), "stages": stages}), ["tow:optim.lr=1"])


@pytest.mark.parametrize("recipe", [path.name for path in sorted(RECIPES.glob("*.json"))])
def test_packaged_recipes_are_valid(recipe):
    assert all(isinstance(stage, Config) for stage in load(recipe))


def test_help_is_fast_and_complete():
    times = []
    for _ in range(3):
        started = time.perf_counter()
        command = [sys.executable, "-m", "abkd_fast.train", "--help"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        times.append(time.perf_counter() - started)
    assert min(times) < 1.0
    for key in ("run.name", "student.path", "teacher.config", "data.max_length", "optim.lr", "train.batch_size",
                "eval.every_steps", "log.every_steps", "method", "loss"):  # fmt: skip
        assert f"  {key} " in text
