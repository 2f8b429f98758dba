"""What a build and a run refuse: teachers that are not finite, folders that hold anything, commands that can't be."""

import contextlib
import datetime
import json
import os
import re
import shlex
import shutil

import datasets
import filelock
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from test_cache import flip, only
from test_states_folder import build, change_index, given, index_with, replace_file, shard
from test_states_folder import recipe as recipe  # fixtures
from test_states_folder import small as small

from abkd_fast import cache
from abkd_fast.config.recipe import load
from abkd_fast.data import quickstart
from abkd_fast.errors import ConfigError
from abkd_fast.models.causal_lm import CausalLM
from abkd_fast.teacher.folder import StatesFolder
from abkd_fast.teacher.origin import date_note
from abkd_fast.teacher.shards import FLOAT8, Part
from abkd_fast.training.prepare import read_tokenizer
from abkd_fast.training.trainer import Trainer


def change_weight(folder, name, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights[name])
    save_file(weights, path, {"format": "pt"})


def test_states_that_are_not_finite_are_refused(small, tmp_path, cache_folder, capsys, monkeypatch):
    monkeypatch.setattr(CausalLM, "_check_weights", lambda model: None)  # numbers may also overflow on the way
    token = quickstart.tokenizer()("k")["input_ids"][0]
    change_weight(tmp_path / "teacher", "model.embed_tokens.weight", lambda w: w[token].fill_(torch.nan))
    assert cache.main(["--config", small]) == 2
    error = capsys.readouterr().err
    assert "error: teacher: teacher has hidden states that are not finite at " in error
    assert "its weights are damaged, or float32 has no room for its numbers" in error
    (line,) = error.splitlines()
    number = int(line.split("rows.jsonl line ")[1].split(":")[0])
    assert "k" in json.dumps(json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[number - 1])), line
    trainer = Trainer(load(small, ["cache.mode=memory", "cache.dir=/dev/null/x"])[0])
    with pytest.raises(ConfigError, match="has hidden states that are not finite at "):
        trainer.build()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return tmp_path_factory.mktemp("built")


@pytest.fixture
def folder(small, built, cache_folder):
    """The states of `small` in the cache. They are computed once: the teachers of all tests are the same."""
    if not [*built.iterdir()]:
        build(small)
        shutil.copytree(cache_folder, built, dirs_exist_ok=True)
    shutil.copytree(built, cache_folder, dirs_exist_ok=True)
    return only(cache_folder)


def refusal(path, folder, *overrides):
    with pytest.raises(ConfigError) as caught:
        Trainer(load(path, given(folder, *overrides))[0])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def deep(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    return value


def deep_identity(folder):
    """Python's own limit decides which depth can be read, but not written again: some of these are just that deep."""
    text = (folder / "index.json").read_text()
    for depth in range(900, 1000, 10):
        changed = text.replace('"identity": {', '"identity": {"z": ' + "[" * depth + "]" * depth + ", ", 1)
        (folder / "index.json").write_text(changed)
        with contextlib.suppress(ConfigError):
            StatesFolder(str(folder), "x").check()


def replaced(name, make):
    def damage(folder):
        (path,) = [*folder.glob(name)][:1]
        path.unlink()
        make(path)

    return damage


FOREIGN = {
    "huge number of seconds": (index_with("", seconds=10**400), "index.json makes no sense"),
    "huge number of a logit map": (index_with("states", logit_map=[10**400, 0]), "index.json makes no sense"),
    "list of settings": (index_with("origin", settings=[[1, 2]]), "settings of the data that are no values by name"),
    "deep settings": (index_with("origin", settings={"x": deep(300)}), "settings of the data that are no values"),
    "format that is none": (index_with("identity", format={"a": 1}), r"^teacher.hidden_states: \S+: has format {"),
    "pipe for a shard": (replaced("states-*", os.mkfifo), r"states-0000\d-of-0000\d.safetensors is no regular file"),
    "pipe for the samples": (replaced("samples*", os.mkfifo), "samples.safetensors is missing or damaged"),
    "pipe for the vocabulary": (replaced("vocab*", os.mkfifo), "vocabulary.json can't be read .*no regular file"),
    "pipe for the configuration": (replaced("config*", os.mkfifo), "has no config.json"),
    "pipe for the index": (replaced("index*", os.mkfifo), "has no index.json .it is no regular file"),
    "endless head": (replaced("head*", lambda p: p.symlink_to("/dev/zero")), "head.safetensors is missing or damaged"),
    "large index": (lambda f: os.truncate(f / "index.json", 10**9), "it has 1000000000 bytes, expected at most"),
    "more in the head": (
        replace_file("head.safetensors", lambda f: save({"weight": torch.zeros(1024, 48), "x": torch.zeros(9)})),
        r"its output projection is \[1024, 48\] with x, expected \[1024, 48\]",
    ),
    "numbers in the head": (
        replace_file("head.safetensors", lambda f: save({"weight": torch.zeros(1024, 48, dtype=torch.int8)})),
        "its output projection is in int8",
    ),
    "more samples than rows": (
        replace_file("samples.safetensors", lambda f: save({"hashes": torch.zeros(10**5, 16, dtype=torch.uint8)})),
        "samples.safetensors can't be read .*bytes, expected at most",
    ),
    "index without a vocabulary": (
        lambda f: change_index(f, lambda index: index["files"].pop("vocabulary.json")),
        "vocabulary.json is missing or damaged",
    ),
}


def check_info(folder, capsys):
    """Tries what --info says while files vanish."""
    assert cache.main(["--info", str(folder)]) == 0
    assert "complete     yes" in capsys.readouterr().out
    shard()(folder).unlink()
    assert cache.main(["--info", str(folder)]) == 0
    assert "complete     no: states-00001-of-" in capsys.readouterr().out
    (folder / "head.safetensors").unlink()
    assert cache.main(["--info", str(folder)]) == 0
    assert "complete     no: head.safetensors is missing or damaged" in capsys.readouterr().out


def test_foreign_files_give_one_line(small, folder, tmp_path, capsys):
    deep_identity(shutil.copytree(folder, tmp_path / "deep"))
    check_info(shutil.copytree(folder, tmp_path / "info"), capsys)
    for name, (damage, message) in FOREIGN.items():
        broken = shutil.copytree(folder, tmp_path / name.replace(" ", "_"))
        damage(broken)
        assert re.search(message, refusal(small, broken)), name
        status = cache.main(["--verify", str(broken)])
        assert status == (0 if "in the head" in name else 2), "what config.json says is for the run to compare"
        assert cache.main(["--info", str(broken)]) in (0, 2), name
        capsys.readouterr()


def test_copies_of_nodes_and_a_huge_id(small, folder, monkeypatch):
    copy = shutil.copytree(folder, folder / "copy")
    flip(shard()(copy), 400)
    assert "blocks are damaged" in refusal(small, copy)
    monkeypatch.setenv("LOCAL_RANK", "1")  # the first rank of its node has read the same files
    Trainer(load(small, given(copy))[0])
    tokens = json.loads((folder / "vocabulary.json").read_text())
    content = json.dumps({**tokens, "zz": 2**31 - 1}).encode()
    replace_file("vocabulary.json", lambda _: content)(folder)
    trainer = Trainer(load(small, given(folder))[0])
    vocabulary = trainer.teachers.vocabularies["teacher"]
    assert vocabulary.different == [2**31 - 1]
    assert len(vocabulary._is_unusable) <= len(trainer.tokenizer)


def test_float8_rows_of_the_smallest_numbers_are_finite():
    rows = torch.tensor([[1e-45, 0.0], [3e-43, -1e-44], [1e-38, 0.0], [0.0, 0.0]])
    decoded = Part.of(rows, FLOAT8).decode(torch.float32)
    assert torch.isfinite(decoded).all()
    assert (decoded - rows).abs().max() < 1e-38
    assert decoded[2, 0] == pytest.approx(1e-38, rel=1 / 16)


def test_a_later_build_mends_what_the_folder_tells(small, folder, tmp_path, capsys):
    (folder / "vocabulary.json").unlink()
    build(small)
    assert cache.main(["--verify", str(folder)]) == 0
    # the teacher's tokenizer changes in place, and other settings give the same tokens
    tokenizer = quickstart.tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "teacher")
    capsys.readouterr()
    build(small, "data.max_length=120")
    printed = capsys.readouterr().out
    assert "computing" not in printed
    assert "data.max_length: 120" in printed
    assert cache.main(["--verify", str(folder)]) == 0
    assert "<new>" in json.loads((folder / "vocabulary.json").read_text())
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join([lines[1], *lines[1:-1], lines[-1].replace("l", "m")]))
    assert "limits are the same, so the rows differ" in refusal(small, folder, "data.max_length=120")


def test_ranks_meet_while_rank_0_waits_for_another_builder(small, monkeypatch):
    trainer = Trainer(load(small)[0])
    file, meetings = trainer.teachers.caches["teacher"].file, []
    file.folder.mkdir(parents=True)
    other = filelock.FileLock(file.folder / "lock")
    other.acquire()

    def meet(function, *arguments):
        meetings.append(function)
        if len(meetings) == 6:
            other.release()
        return function(*arguments)

    monkeypatch.setattr("abkd_fast.teacher.cache.LOCK_SECONDS", 0.001)
    monkeypatch.setattr("abkd_fast.distributed.run_on_rank0", meet)
    with trainer.teachers.caches["teacher"]._locked():
        assert meetings == [file.lock] * 6
        with pytest.raises(filelock.Timeout):
            other.acquire(timeout=0)
    other.acquire(timeout=0)


def refused_build(capsys, path, *overrides, words=()):
    words = [*words, *(word for override in overrides for word in ("--set", override))]
    assert cache.main(["--config", path, *words]) == 2
    output = capsys.readouterr()
    assert "computing" not in output.out
    (line,) = output.err.splitlines()
    return line


def test_the_printed_command_is_one_that_trains(small, folder, capsys):
    build(small, "cache.mode=off")
    words = shlex.split(capsys.readouterr().out.split("to train     python -m abkd_fast.train --config ")[1])
    overrides = words[2::2]
    assert overrides[0] == "cache.mode=off"
    assert Trainer(load(words[0], overrides)[0]).teachers.caches["teacher"].is_found
    with pytest.raises(ConfigError, match=r"cache\.mode is off"):
        load(words[0], overrides[:-1])
    # a method that asks the teacher in training keeps it; limits of training are not those of a build
    build(small, "method=gkd", "cache.mode=off", "train.batch_size=50")
    printed = capsys.readouterr().out
    assert "method gkd also asks the teacher about responses that are written in training: its runs need" in printed
    assert (
        f"--config {small} --set method=gkd --set cache.mode=off --set train.batch_size=50 --set cache.mode=auto\n"
        in printed
    )


def test_what_the_command_refuses(small, tmp_path, capsys):
    assert "cache.dir: /dev/null is not a folder that can be written to; choose another" in (
        line := refused_build(capsys, small, "cache.dir=/dev/null/x")
    )
    assert "cache.mode" not in line
    assert "--stage x: the recipe has no stages; leave --stage out" in refused_build(
        capsys, small, words=("--stage", "x")
    )
    with pytest.raises(SystemExit) as left:
        cache.main(["--verify", str(tmp_path), "--set", "a=b"])
    assert left.value.code == 2
    assert "--set and --stage change a recipe: give them with --config" in capsys.readouterr().err
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    writer = {"method": "generate", "student": {**recipe["teacher"], "config": None}, "teacher": None}
    recipe["stages"] = {"gen": writer, "kd": {"data": {"train": "stage:gen"}}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert "data.train: stage:gen has no rows yet; run that stage first" in refused_build(capsys, small)


def test_a_template_that_writes_the_date_is_named(small, tmp_path, capsys, monkeypatch):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% if not day is defined %}{% set day = strftime_now('%d %B') %}{% endif %}"
        "{{ day }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    messages = [{"role": "user", "content": "Say a."}, {"role": "assistant", "content": "a"}]
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 4)
    named = f"data.chat_template={template}"
    build(small, named)
    printed = capsys.readouterr().out
    warning = "the chat template writes the date, so rows with messages become other tokens on another day; give it one"
    assert printed.index(warning) < printed.index("computing")
    states = printed.split("teacher.hidden_states=")[1].strip()
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    assert warning in refusal(small, states, named)
    (fixed,) = load(small, [named, 'data.chat_template_kwargs={"day": "1 May"}'])
    assert date_note(fixed, "teacher", tokenizer := read_tokenizer(fixed)) is None
    (own,) = load(small, [named, 'data.chat_template_kwargs={"day": "1 May"}', 'teacher.chat_template_kwargs={"x": 1}'])
    assert "give it one date in teacher.chat_template_kwargs" in date_note(own, "teacher", tokenizer)
    assert date_note(fixed, "teacher", tokenizer) is None, "a tokenizer stays as it is"


class Tomorrow(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.datetime(2001, 2, 3)


def test_float8_that_rounds_nothing_is_said(small, folder):
    trainer = Trainer(load(small, given(folder, "cache.dtype=float8"))[0])
    trainer.build()
    assert "in float32 (cache.dtype=float8 rounds nothing that is given)" in trainer.teachers["teacher"].note
