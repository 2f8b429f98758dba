"""States that are built alone and used elsewhere: `python -m abkd_fast.cache`, `teacher.hidden_states`."""

import json
import os
import shutil
import signal
import zlib

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from safetensors import safe_open
from test_cache import flip, losses, make_teacher, only
from test_cache import recipe as recipe  # a fixture

from abkd_fast import cache
from abkd_fast.config.recipe import load
from abkd_fast.errors import ConfigError
from abkd_fast.teacher import shards, store
from abkd_fast.teacher.shards import FLOAT8, Part
from abkd_fast.train import main
from abkd_fast.training.trainer import Trainer

ROWS = [{"prompt": f"Repeat {word}.", "output": f"{word} " * 5} for word in "abcdefghijkl"]


@pytest.fixture
def small(recipe, write_jsonl, monkeypatch):
    """A recipe with a dozen rows in a file, in small blocks and shards of two blocks or so."""
    monkeypatch.setattr(store, "BLOCK_TOKENS", 64)
    monkeypatch.setattr(shards, "SHARD_BYTES", 8000)
    data = {"train": write_jsonl(ROWS), "max_length": 128}
    return recipe(data=data, train={"epochs": 1, "batch_size": 4, "max_tokens": 256, "device": "cpu"})


def trainer_of(path, *overrides):
    trainer = Trainer(load(path, overrides)[0])
    trainer.build()
    return trainer


def build(path, *overrides):
    words = [word for override in overrides for word in ("--set", override)]
    assert cache.main(["--config", path, *words]) == 0


def contents(folder):
    """The bytes of a folder's files, without the seconds in its index."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {"index.json": {**json.loads(files["index.json"]), "seconds": None}}


def given(folder, *more):
    return "teacher.path=null", f"teacher.hidden_states={folder}", *more


@pytest.fixture
def elsewhere(small, cache_folder, tmp_path):
    """Builds the states, copies them, and takes away the teacher and the first folder."""

    def move(*overrides):
        build(small, *overrides)
        folder = tmp_path / "copy"
        shutil.copytree(only(cache_folder), folder)
        shutil.rmtree(cache_folder)
        (tmp_path / "teacher").rename(tmp_path / "away")
        return folder

    return move


def test_a_copy_trains_to_the_same_bits_without_the_teacher(small, elsewhere, capsys, tmp_path):
    expected = losses(trainer_of(small, "cache.mode=off"))
    folder = elsewhere()
    printed = capsys.readouterr().out
    files = sorted(path.name for path in folder.glob("states-*"))
    assert len(files) > 2
    assert f"in {len(files)} files" in printed
    assert "of 12 samples, 48 numbers each in float32" in printed
    assert f"--config {small} --set teacher.path=null --set teacher.hidden_states=" in printed
    for path in folder.rglob("*"):
        path.chmod(0o444)
    folder.chmod(0o555)
    trainer = trainer_of(small, *given(folder))
    folder.chmod(0o755)
    assert losses(trainer) == expected
    assert f"mapped from {folder}" in trainer.teachers["teacher"].note
    assert not (tmp_path / "cache").exists(), "such a run builds nothing"
    # any library for safetensors reads the shards
    parts = []
    for path in sorted(folder.glob("states-*")):
        with safe_open(path, "pt") as file:
            parts.append(file.get_tensor("hidden_states"))
        assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 64 == 0
    rows = torch.cat(parts)
    for index in range(12):
        place = trainer.teachers["teacher"].places.sample(index)
        assert torch.equal(trainer.teachers["teacher"].rows[place], rows[place])
    # a part of the rows, in another order, finds its samples, too
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[7:2:-1]))
    part = trainer_of(small, *given(folder))
    whole = trainer.teachers["teacher"].rows
    for index in range(5):
        mine = part.teachers["teacher"].rows[part.teachers["teacher"].places.sample(index)]
        assert torch.equal(mine, whole[trainer.teachers["teacher"].places.sample(7 - index)])
    assert cache.main(["--verify", str(folder)]) == 0
    assert cache.main(["--info", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "is complete and undamaged" in told
    assert "complete     yes" in told


def test_bfloat16_states_in_a_float32_run(small, elsewhere):
    expected = losses(trainer_of(small, "cache.mode=off"))
    folder = elsewhere("train.dtype=bfloat16")
    trainer = trainer_of(small, *given(folder))
    assert "in bfloat16, converted to float32" in trainer.teachers["teacher"].note
    assert trainer.teachers["teacher"].weight.dtype == torch.float32
    assert losses(trainer) == pytest.approx(expected, rel=0.05)


@pytest.mark.gpu
def test_states_of_a_gpu_train_on_a_processor(small, elsewhere, cache_folder):
    exact = trainer_of(small)
    batch = next(exact.batches()).micro_batches[0]
    expected = exact.teachers["teacher"].linear_head(batch).hidden
    shutil.rmtree(cache_folder)
    trainer = trainer_of(small, *given(elsewhere("train.device=cuda")))
    assert "in bfloat16, converted to float32" in trainer.teachers["teacher"].note
    assert (trainer.teachers["teacher"].linear_head(batch).hidden - expected).norm() < 0.03 * expected.norm()


def test_float8_is_the_same_in_every_mode_and_close(small, elsewhere, cache_folder):
    exact = trainer_of(small)
    key = exact.teachers.caches["teacher"].file.key
    in_memory = trainer_of(small, "cache.dtype=float8", "cache.mode=memory", "cache.dir=/dev/null/x")
    shutil.rmtree(cache_folder)
    folder = elsewhere("cache.dtype=float8")
    on_disk = trainer_of(small, *given(folder))
    assert f"fingerprint  {key}" not in "\n".join(on_disk.teachers.caches["teacher"].file.describe()), (
        "the type is part of it"
    )
    for trainer in (in_memory, on_disk):
        assert "in float8, which rounds them" in trainer.teachers["teacher"].note
    batch = next(exact.batches()).micro_batches[0]
    expected, *rounded = (each.teachers["teacher"].linear_head(batch).hidden for each in (exact, in_memory, on_disk))
    assert torch.equal(*rounded)
    assert 0 < (rounded[0] - expected).norm() < 0.04 * expected.norm()
    flip(sorted(folder.glob("states-*"))[0], 250)  # a scale
    with pytest.raises(ConfigError, match=r"1 of .* blocks are damaged"):
        Trainer(load(small, given(folder))[0])


def test_float8_rows_have_a_scale_each():
    torch.manual_seed(0)
    rows = torch.randn(50, 64) * torch.logspace(-30, 30, 50)[:, None]
    rows[7] = 0
    part = Part.of(rows, FLOAT8)
    assert part.scales.shape == (50, 1)
    error = (part.decode(torch.float32) - rows).abs()
    assert (error <= rows.abs() / 16 + rows.abs().amax(1, keepdim=True) * 2**-18).all()
    assert Part.of(rows, torch.float32).decode(torch.float32) is not None


def test_a_result_of_other_states_is_another_result(small, capsys):
    assert main(["--config", small, "--set", "train.steps=1"]) == 0
    assert main(["--config", small, "--set", "train.steps=1", "--set", "cache.dtype=float8", "--resume"]) == 2
    assert 'is the result of another configuration (cache.dtype was null, is "float8")' in capsys.readouterr().err


def change_index(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def replace_file(name, content):
    """A file with other content, and an index that agrees."""

    def damage(folder):
        new = content(folder)
        (folder / name).write_bytes(new)
        change_index(folder, lambda index: index["files"].update({name: zlib.crc32(new)}))

    return damage


def other_samples(**changes):
    def content(folder):
        tensors = safetensors.numpy.load_file(folder / "samples.safetensors")
        return safetensors.numpy.save(tensors | {name: change(tensors[name]) for name, change in changes.items()})

    return replace_file("samples.safetensors", content)


def shard(number=0):
    return lambda folder: sorted(folder.glob("states-*"))[number]


def index_with(section, **values):
    def change(index):
        (index[section] if section else index).update(values)

    return lambda folder: change_index(folder, change)


DAMAGE = {
    "flipped bit": (lambda f: flip(shard()(f), 400), "1 of {n} blocks are damaged, the first in states-00001"),
    "flipped last bit": (lambda f: flip(shard(-1)(f), os.path.getsize(shard(-1)(f)) - 1), "1 of {n} blocks"),
    "flipped header": (lambda f: flip(shard()(f), 20), "has another header than its index says"),
    "shortened": (lambda f: os.truncate(shard(1)(f), 300), "states-00002-of-0000\\d.safetensors has 300 bytes"),
    "longer": (lambda f: shard()(f).open("ab").write(b"x"), "bytes, expected"),
    "no shard": (lambda f: shard()(f).unlink(), "can't be read"),
    "no head": (lambda f: (f / "head.safetensors").unlink(), "head.safetensors is missing or damaged"),
    "flipped head": (lambda f: flip(f / "head.safetensors", 5000), "head.safetensors is missing or damaged"),
    "no index": (lambda f: (f / "index.json").unlink(), "has no index.json"),
    "torn index": (lambda f: os.truncate(f / "index.json", 100), "index.json is damaged"),
    "deep index": (lambda f: (f / "index.json").write_text("[" * 100_000), "index.json is damaged"),
    "list for an index": (lambda f: (f / "index.json").write_text("[1]"), "index.json makes no sense"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "other configuration": (
        replace_file("config.json", lambda f: (f / "config.json").read_bytes().replace(b"1024", b"1030")),
        r"its output projection is \[1024, 48\], expected \[1030, 48\]",
    ),
    "format 1": (index_with("identity", format=1), "has format 1, expected 2; build it again"),
    "not complete": (
        index_with("", blocks=[None] * 3),
        "is not complete: 3 of 3 blocks are missing; the command that builds it",
    ),
    "too few checksums": (index_with("", blocks=[1]), "index.json makes no sense"),
    "negative rows": (index_with("states", shards=[[-1, 5]]), "index.json makes no sense"),
    "endless rows": (index_with("states", shards=[[2**60]], width=2**40), "index.json makes no sense"),
    "too many rows": (index_with("states", width=4800), "bytes, expected"),
    "type without meaning": (index_with("states", dtype="object"), "index.json makes no sense"),
    "other type": (index_with("states", dtype="float8"), "bytes, expected"),
    "logit map": (index_with("states", logit_map=[float("nan"), 0]), "index.json makes no sense"),
    "rows outside": (other_samples(rows=lambda rows: rows + 1), "names rows that are not there"),
    "rows before": (other_samples(rows=lambda rows: rows - 1), "names rows that are not there"),
    "rows of others": (
        other_samples(rows=lambda rows: np.stack([rows[:, 0], rows[:, 0] + 1], 1)),
        "has 1 rows for .*rows.jsonl line 1, expected",
    ),
    "hashes of another shape": (other_samples(hashes=lambda hashes: hashes[:, :8].copy()), "no hashes and rows"),
    "no samples": (replace_file("samples.safetensors", lambda f: b"{}"), "samples.safetensors can't be read"),
    "other head": (
        replace_file("head.safetensors", lambda f: safetensors.torch.save({"weight": torch.zeros(3)})),
        r"its output projection is \[3\]",
    ),
    "no vocabulary": (replace_file("vocabulary.json", lambda f: b'{"a": -1}'), "holds no tokens and their ids"),
}


def test_damaged_and_foreign_folders_give_one_line(small, elsewhere, tmp_path, capsys):
    folder = elsewhere()
    blocks = len(json.loads((folder / "index.json").read_text())["blocks"])
    for name, (damage, message) in DAMAGE.items():
        broken = tmp_path / name.replace(" ", "_")
        shutil.copytree(folder, broken)
        damage(broken)
        with pytest.raises(ConfigError, match=message.replace("{n}", str(blocks))) as caught:
            Trainer(load(small, given(broken))[0])
        assert "\n" not in str(caught.value), name
        assert str(broken) in str(caught.value), name
    capsys.readouterr()
    for name in ("flipped bit", "shortened", "no head", "torn index"):
        assert cache.main(["--verify", str(tmp_path / name.replace(" ", "_"))]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_other_data_are_named(small, elsewhere, tmp_path):
    folder = elsewhere()

    def refused(*overrides):
        with pytest.raises(ConfigError) as caught:
            Trainer(load(small, given(folder, *overrides))[0])
        return str(caught.value)

    assert "data.max_length is 128 there and 6 here" in refused("data.max_length=6", "data.max_prompt_length=4")
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}|{% endfor %}")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Something else", "output": "c"}) + "\n")
    rows = [*ROWS[:3], {"prompt": "Something else", "output": "c"}, *ROWS[4:]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = refused()
    assert "1 of 12 samples are not in it, the first: " in message
    assert "rows.jsonl line 4; tokenizer, template and limits are the same, so the rows differ" in message
    assert "the chat template is another one there" in refused(f"data.chat_template={template}")


def test_the_teachers_own_prompt_counts(small, elsewhere, capsys):
    expected = trainer_of(small, "teacher.system=Be kind.", "cache.mode=off")
    batch = next(expected.batches()).micro_batches[0]
    hidden = expected.teachers["teacher"].linear_head(batch).hidden
    folder = elsewhere("teacher.system=Be kind.")
    assert "teacher.system=null" not in capsys.readouterr().out
    trainer = trainer_of(small, *given(folder, "teacher.system=Be kind."))
    assert torch.equal(trainer.teachers["teacher"].linear_head(batch).hidden, hidden)
    for other in ("teacher.system=Be brief.", "teacher.system=null"):
        with pytest.raises(ConfigError, match=r"12 of 12 samples .*; teacher\.system is another one there; undo that"):
            Trainer(load(small, given(folder, other))[0])


def test_what_can_be_asked_of_given_states(small, tmp_path, capsys):
    def refused(*overrides):
        with pytest.raises(ConfigError) as caught:
            load(small, ["teacher.path=null", "teacher.hidden_states=x", *overrides])
        return str(caught.value)

    for method in ("imitkd", "gkd", "distillm", "minillm"):
        more = ["loss=rkl"] if method == "minillm" else ["data.dev=x"]
        assert "asks the teacher about responses that are written in training" in refused(f"method={method}", *more)
    load(small, [*given("x"), "method=gkd", "on_policy.fraction=0"])
    assert "cache.mode is off" in refused("cache.mode=off")
    assert "give null for quantize" in refused("teacher.quantize=4bit")
    with pytest.raises(ConfigError, match=r"give null for path"):
        load(small, ["teacher.hidden_states=x"])
    assert main(["--config", small, *(word for each in given("nowhere") for word in ("--set", each))]) == 2
    assert "teacher.hidden_states: nowhere has no config.json" in capsys.readouterr().err
    assert cache.main(["--config", small, "--set", "method=sft"]) == 2
    assert "has no teacher whose states could be built" in capsys.readouterr().err
    assert cache.main(["--config", small, "--set", "method=imitkd"]) == 2
    assert "there is nothing to build" in capsys.readouterr().err
    served = ["teacher.path=null", "teacher.top_k=x"]
    assert cache.main(["--config", small, *(word for each in served for word in ("--set", each))]) == 2
    assert "no model whose states could be computed" in capsys.readouterr().err
    assert cache.main(["--info", str(tmp_path)]) == 2
    assert "has no index.json" in capsys.readouterr().err


def test_random_teachers_and_stages(small, tmp_path, cache_folder, capsys):
    make_teacher(tmp_path / "teacher")
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    recipe["teacher"] = {"config": {**recipe["student"]["config"], "hidden_size": 48}}
    begun = {"path": "stage:first", "config": None}
    recipe["stages"] = {"first": {"method": "sft"}, "taught": {"student": begun}, "last": {"method": "sft"}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    build(small)
    printed = capsys.readouterr().out
    assert "teacher      random weights (llama)" in printed
    folder = only(cache_folder)
    assert f"--set taught:teacher.config=null --set taught:teacher.hidden_states={folder}" in printed
    assert cache.main(["--config", small, "--set", "teacher.path=stage:first", "--set", "teacher.config=null"]) == 2
    assert "teacher.path: stage:first has no result yet; train that stage first" in capsys.readouterr().err
    assert cache.main(["--config", small, "--stage", "last"]) == 2
    assert "stage last has no teacher whose states could be built; stages with one: taught" in capsys.readouterr().err


def test_an_interrupted_build_goes_on(small, cache_folder, capsys, monkeypatch):
    build(small)
    folder = only(cache_folder)
    whole = contents(folder)
    (folder / "config.json").unlink()
    shard()(folder).open("ab").write(b"x")
    capsys.readouterr()
    build(small)
    assert "computing" not in capsys.readouterr().out, "what is not computed is just written again"
    assert contents(folder) == whole
    shutil.rmtree(cache_folder)
    write, calls = store.HiddenStateStore.write, iter(range(100))

    def interrupted(self, number, rows):
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return write(self, number, rows)

    monkeypatch.setattr(store.HiddenStateStore, "write", interrupted)
    assert cache.main(["--config", small]) == 75
    assert f"-m abkd_fast.cache --config {small}" in capsys.readouterr().err
    assert cache.main(["--verify", str(folder)]) == 2
    blocks = len(json.loads((folder / "index.json").read_text())["blocks"])
    message = f"is not complete: {blocks - 1} of {blocks} blocks are missing"
    assert message in capsys.readouterr().err
    assert cache.main(["--info", str(folder)]) == 0
    assert f"complete     no: {blocks - 1} of {blocks}" in capsys.readouterr().out
    build(small)
    assert f"computing {blocks - 1} of {blocks} blocks" in capsys.readouterr().out
    assert contents(folder) == whole
