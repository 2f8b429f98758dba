"""Methods that write all responses themselves need no response in the data."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from abkd_fast.config.recipe import load
from abkd_fast.data import quickstart
from abkd_fast.training.trainer import Trainer
from conftest import LLAMA
from runs import Run, assert_same

TEACHER = {**LLAMA, "vocab_size": 1024, "eos_token_id": 0, "bos_token_id": 0}
WRITERS = {
    "imitkd": ["loss=fkl", "on_policy.replay_rows=8"],
    "gkd": ["loss=jsd:0.1", "on_policy.fraction=1", "on_policy.replay_rows=0"],
    "distillm": ["loss=srkl:0.1", "on_policy.threshold=1", "on_policy.replay_rows=8"],
    "minillm": ["loss=rkl", "minillm.rollouts=8", "student.dropout=0"],
}
READERS = {
    "ab": [],
    "gkd": ["loss=jsd:0.1", "on_policy.fraction=0.9"],
    "distillm": ["loss=srkl:0.1", "on_policy.threshold=0.5"],
}


def write_model(folder, tokenizer, vocab=1024):
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**TEACHER, "vocab_size": vocab}, initializer_range=0.1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("teacher"), quickstart.tokenizer())


@pytest.fixture
def make(tmp_path, teacher, write_jsonl):
    rows = [row for row, _ in zip(quickstart.rows("small"), range(20), strict=False)]
    prompts = [{name: text for name, text in row.items() if name != "output"} for row in rows]
    files = {True: write_jsonl(rows, "rows.jsonl"), False: write_jsonl(prompts, "prompts.jsonl")}

    def make(method, *overrides, answered=False, name="run"):
        settings = f"method={method}", f"teacher.path={teacher}", "sampling.max_new_tokens=6"
        return Run(tmp_path / name, *settings, f"data.train={files[answered]}", *overrides)

    return make


@pytest.mark.parametrize("method", WRITERS)
def test_responses_of_the_data_play_no_part(make, method):
    with_responses, without = (
        make(method, *WRITERS[method], answered=answered, name=str(answered)) for answered in (True, False)
    )
    assert with_responses() == without() == 0
    assert_same(without, with_responses)


@pytest.mark.parametrize("method", READERS)
def test_other_methods_refuse_rows_without_a_response(make, method, capsys):
    run = make(method, *READERS[method])
    assert run() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "prompts.jsonl line 1" in error
    assert "output" in error
    assert not run.folder.exists()


def test_dev_rows_need_a_response(make, capsys, tmp_path):
    run = make("imitkd", *WRITERS["imitkd"], f"data.dev={tmp_path}/prompts.jsonl")
    assert run() == 2
    assert "data.dev: " in capsys.readouterr().err


@pytest.mark.parametrize("method", WRITERS)
@pytest.mark.parametrize("mode", ["auto", "disk", "memory"])
@pytest.mark.parametrize("answered", [True, False])
def test_no_cache_is_built(make, method, mode, answered, cache_folder, capsys):
    """Not for rows that have responses either: no step trains on them."""
    run = make(method, *WRITERS[method], f"cache.mode={mode}", "train.steps=1", answered=answered)
    assert run("--dry-run") == 0
    assert "  cache      none: the run trains on no response of the data" in capsys.readouterr().out
    assert run() == 0
    assert "never runs (the run trains on no response of the data)" in capsys.readouterr().out
    assert not cache_folder.exists()


def test_a_small_share_of_the_steps_still_has_a_cache(make):
    run = make("gkd", "loss=jsd:0.1", "on_policy.fraction=0.999", "train.steps=2", "cache.mode=disk", answered=True)
    trainer = Trainer(load(run.arguments[1], run.arguments[3::2])[0])
    assert trainer.teachers.caches["teacher"].samples == 1
    assert trainer.teachers.caches["teacher"].choose(1 << 40)[0]


@pytest.mark.parametrize("method", WRITERS)
def test_dry_run_assumes_responses_as_long_as_allowed(make, method, capsys, write_jsonl):
    """What it says is what it says of a sequence of that length in the data, for work and for memory."""
    prompt = {"prompt": "Add 1 and 2. " * 3}
    long = write_jsonl([{**prompt, "output": "a" * 500}] * 4, "long.jsonl")
    short = write_jsonl([prompt] * 4, "short.jsonl")
    dev = write_jsonl([{"prompt": "Add.", "output": "1"}] * 4, "dev.jsonl")
    tokens = len(quickstart.tokenizer()(prompt["prompt"])["input_ids"])
    for new_tokens, length in ((9, tokens + 9), (500, 128)):
        common = f"data.max_length={length}", f"data.dev={dev}", "student.dropout=0", "cache.mode=off"
        more = ["minillm.rollouts=4"] if method == "minillm" else []
        limit = f"sampling.max_new_tokens={new_tokens}"
        assert make(method, *WRITERS[method], f"data.train={short}", limit, *common, *more)("--dry-run") == 0
        out = capsys.readouterr().out
        assert "responses  none: the run writes them" in out
        assert f"prompts    mean {tokens}.0, " in out
        assert make("kd", f"data.train={long}", *common)("--dry-run") == 0
        expected = capsys.readouterr().out
        assert line_of(out, "work") == line_of(expected, "work")
        ours, theirs = (line_of(text, "memory").partition("with")[2] for text in (out, expected))
        assert ours.partition("; while it generates")[0] == theirs


def line_of(out, name):
    (line,) = (line for line in out.splitlines() if line.startswith(f"  {name} "))
    return line


@pytest.mark.parametrize("method", ["imitkd", "gkd", "minillm"])
def test_dollys_prompts_alone(tmp_path, shared, method, write_jsonl, capsys):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    lines = (shared / "data" / "dolly" / "train.jsonl").read_text().splitlines()[:40]
    rows = [{name: text for name, text in json.loads(line).items() if name != "output"} for line in lines]
    folder = write_model(tmp_path / "teacher", tokenizer, vocab=len(tokenizer))
    shape = "hidden_size=8", "intermediate_size=16", "num_hidden_layers=1", f"vocab_size={len(tokenizer)}"
    student = [f"student.config.{part}" for part in shape]
    data = f"data.train={write_jsonl(rows)}", "data.train_rows=null", "data.max_prompt_length=96", "data.dev=null"
    settings = (
        f"method={method}",
        f"teacher.path={folder}",
        f"tokenizer={folder}",
        "sampling.max_new_tokens=8",
        "train.steps=4",
    )
    run = Run(tmp_path / "run", *settings, *student, *data, *WRITERS[method])
    assert run("--dry-run") == 0
    assert "responses  none: the run writes them" in capsys.readouterr().out
    assert run() == 0
    (point,) = (point for point in run.points() if point.get("step") == 3)
    assert point["loss"] > 0
    assert 1 <= point["generated_length"] <= 8
