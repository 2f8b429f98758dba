"""Rubbish of every kind, by hypothesis: exit status 0 or 2 and one line, and no file that was there is changed."""

import json
import random
import shutil

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from abkd_fast import evaluate, generate, report, train
from chaos import SHORTER, SLOW, account, contents, count, models, said
from finished_runs import write_run
from runs import TIED

pytestmark = SLOW


def rubbish(short, whole):
    """The same tries each time; a failure is an entry of the account, so nothing is shrunk."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    options = {"derandomize": True, "database": None, "deadline": None, "phases": [Phase.generate]}
    return settings(max_examples=count(short, whole), suppress_health_check=checks, **options)


@pytest.fixture
def held(capsys, tmp_path, models):
    """Runs a command that has to end well or with status 2, and to change nothing."""

    def run(main, arguments):
        before = contents(tmp_path, models)
        status, text = said(capsys, main, arguments)
        assert status in (0, 2), text
        after = contents(tmp_path, models)
        assert before.items() <= after.items(), "a file is changed"

    return run


def nested(values, keys):
    return st.one_of(st.lists(values, max_size=3), st.dictionaries(keys, values, max_size=3))


RECIPE = {**SHORTER, "run": {"name": "x"}, "student": {"config": TIED}}
WORDS = ["", "x", "../x", "a\0b", "[/red]", "\x1b[2J", "é" * 200, "x" * 300, "quickstart:small", "stage:x"]
TEXTS = st.sampled_from(WORDS)
NUMBERS = st.sampled_from([0, 1, -1, 2**31, 2**63, 10**400, 0.5, 1e308, 1e-320, float("nan"), float("inf")])
SMALL = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, st.text(max_size=8))
VALUES = st.recursive(SMALL, lambda v: nested(v, TEXTS), max_leaves=6)


def checked(recipe, *sets):
    """The arguments of a command that checks a recipe and trains nothing."""
    sets = (f"run.dir={recipe.parent}", *sets)
    return ["--config", str(recipe), *(part for each in sets for part in ("--set", each)), "--dry-run"]


def places(value, path=()):
    """The ways to all values within a value."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from places(inner, (*path, key))


def changed(recipe, path, value, removes):
    """A recipe with another value at a place, or none."""
    recipe = json.loads(json.dumps(recipe))
    if not path:
        return value
    inner = recipe
    for key in path[:-1]:
        inner = inner[key]
    if removes:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return recipe


def test_recipes(account, tmp_path, held):
    with account("mutated recipes") as tries:

        @rubbish(15, 500)
        @given(st.sampled_from([*places(RECIPE)]), VALUES, st.booleans(), TEXTS)
        def run(path, value, removes, key):
            recipe = changed(RECIPE, path, value, removes)
            if isinstance(recipe, dict) and not removes and key == "x":
                recipe["x"] = value
            with tries.attempt(json.dumps(recipe)[:300]):
                (tmp_path / "recipe.json").write_text(json.dumps(recipe))
                held(train.main, checked(tmp_path / "recipe.json"))

        run()


KEYS = [".".join(path) for path in places(RECIPE) if path and "config" not in path]


def test_set_arguments(account, tmp_path, held):
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    with account("--set arguments") as tries:

        @rubbish(10, 150)
        @given(st.one_of(st.sampled_from(KEYS), TEXTS), st.one_of(TEXTS, VALUES.map(json.dumps), st.text(max_size=20)))
        def run(key, value):
            with tries.attempt(f"--set {key}={value}"):
                held(train.main, checked(tmp_path / "recipe.json", f"{key}={value}"))

        run()


ROW_KEYS = ["prompt", "output", "messages", "instruction", "input", "text", "input_ids", "role", "content", "tools"]
PARTS = st.one_of(SMALL, st.sampled_from(["Hello.", "user", "assistant", "system", [1, 2, 3]]))
ROWS = st.recursive(PARTS, lambda v: nested(v, st.sampled_from(ROW_KEYS)), max_leaves=8)
NAMES = st.sampled_from([f"rows.{end}" for end in ("jsonl", "json", "csv", "tsv", "parquet", "arrow", "jsonl.gz", "x")])


def test_data_files(account, tmp_path, held):
    recipe = tmp_path / "recipe.json"
    with account("data files") as tries:

        @rubbish(10, 200)
        @given(st.lists(ROWS, max_size=4), NAMES, st.binary(max_size=8), st.integers(0, 200), st.booleans())
        def run(rows, name, added, place, is_binary):
            text = "\n".join(json.dumps(row) for row in rows).encode()
            content = text[:place] + added + text[place:] if is_binary else text
            file = tmp_path / name
            recipe.write_text(json.dumps({**RECIPE, "data": {"train": str(file), "max_length": 128}}))
            with tries.attempt(f"{name}: {content[:300]}"):
                file.write_bytes(content)
                held(train.main, checked(recipe))
            file.unlink(missing_ok=True)

        run()


def test_binary_files(account, tmp_path, held, write_indexed):
    """Megatron's .bin and .idx, with bytes of either changed."""
    recipe, file = tmp_path / "recipe.json", write_indexed([[5, 6, 65535, 7, 0]] * 12)
    recipe.write_text(json.dumps({**RECIPE, "data": {"train": file, "max_length": 128}}))
    files = [tmp_path / "train_0.bin", tmp_path / "train_0.idx"]
    whole = [path.read_bytes() for path in files]
    with account("binary .bin and .idx files") as tries:

        @rubbish(10, 100)
        @given(st.sampled_from([0, 1, 1]), st.integers(0, 400), st.binary(max_size=9), st.booleans())
        def run(which, place, added, cuts):
            content = bytearray(whole[which])
            content[place : place + len(added)] = added
            with tries.attempt(f"{files[which].name}: {added!r} at {place}{', cut there' if cuts else ''}"):
                files[which].write_bytes(content[:place] if cuts else content)
                held(train.main, checked(recipe))
            files[which].write_bytes(whole[which])

        run()


OPTIONS = ["model", "data", "out", "rows", "temperature", "top-p", "seed", "seeds", "prompt", "device", "batch-size"]
OPTIONS += ["max-new-tokens", "tokenizer", "chat-template", "paper", "dtype", "x"]


def test_calls(account, tmp_path, held, models):
    write_run(tmp_path, "run", sets={"x": {"mean": 1.0, "std": None, "seeds": {"1": 1.0}}})
    good = {
        generate.main: ["--model", str(models / "student"), "--data", "quickstart:dev", "--rows", "1"],
        evaluate.main: ["--model", str(models / "student"), "--data", "x=quickstart:dev", "--rows", "1"],
        report.main: [str(tmp_path / "run")],
    }
    with account("calls of generate, evaluate and report") as tries:

        @rubbish(10, 100)
        @given(st.sampled_from([*good]), st.lists(st.tuples(st.sampled_from(OPTIONS), PARTS), min_size=1, max_size=2))
        def run(main, options):
            out = tmp_path / f"out{tries.tries}"
            added = [part for option, value in options for part in (f"--{option}", str(value))]
            length = [] if main is report.main else ["--out", str(out), "--max-new-tokens", "2"]
            with tries.attempt(f"{main.__module__} {added}"):
                held(main, [*good[main], *length, *added])

        run()


FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
WAYS = ("bytes", "removed", "value")


def test_model_and_tokenizer_folders(account, tmp_path, held, models):
    """A value of one of the files of JSON is another one, or the file has other bytes."""
    with account("model and tokenizer folders") as tries:

        @rubbish(6, 100)
        @given(st.sampled_from(FILES), st.integers(0, 10**6), VALUES, st.binary(max_size=5), st.sampled_from(WAYS))
        def run(name, number, value, added, way):
            source, folder = models / "student", tmp_path / f"model{tries.tries}"
            content = (source / name).read_bytes()
            if way == "bytes" or not name.endswith(".json"):
                place = number % len(content)
                how, content = f"{added!r} at {place}", content[:place] + added + content[place + len(added) :]
            else:
                values = json.loads(content)
                path = random.Random(number).choice([*places(values)][1:])
                how = f"{path} {'removed' if way == 'removed' else value!r}"
                content = json.dumps(changed(values, path, value, way == "removed")).encode()
            with tries.attempt(f"{name}: {how}"[:300]):
                shutil.copytree(source, folder)
                (folder / name).write_bytes(content)
                recipe = folder / "recipe.json"
                recipe.write_text(json.dumps({**RECIPE, "tokenizer": None, "student": {"path": str(folder)}}))
                held(train.main, checked(recipe))
                held(generate.main, ["--model", str(folder), "--prompt", "Hello.", "--max-new-tokens", "1"])
            shutil.rmtree(folder)

        run()
