"""Packaged recipes as a user runs them, at reduced size, on real rows: all stages, also killed and resumed."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from abkd_fast.train import main
from conftest import SHARED
from runs import Run

GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 512, "n_layer": 2, "n_head": 2}


def command(folder, shared, text, row="abkd", recipe="gpt2.json"):
    dolly, tokenizer = shared / "data" / "dolly", shared / "tokenizers" / "gpt2"
    student, teacher = ({"path": None, "config": {**GPT2, "n_embd": width}} for width in (16, 32))
    overrides = [
        *(f"run.dir={folder}", f"tokenizer={tokenizer}", f"cache.dir={folder / 'cache'}", "cache.mode=disk"),
        *(f"data.train={dolly / 'train.jsonl'}", f"data.dev={dolly / 'dev.jsonl'}", f"data.pretrain.path={text}"),
        *("data.train_rows=24", "data.dev_rows=4", "train.device=cpu", "train.max_tokens=1024", "log.every_steps=1"),
        *(f"teacher:student={json.dumps(teacher)}", f"init:student={json.dumps(student)}"),
        *("teacher:train.epochs=1", "init:train.batch_size=8", "init:train.epochs=2"),
        *("train.batch_size=4", f"{row}:train.epochs=2", "sampling.max_new_tokens=8"),
    ]
    options = (part for override in overrides for part in ("--set", override))
    return [sys.executable, "-m", "abkd_fast.train", "--config", recipe, *options]


def run(arguments):
    return subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def kill_at_step(arguments, log, step):
    """SIGKILL once a run's log tells of a step. False where the run was faster."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None:
        if log.exists() and f'"step": {step},' in log.read_text():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.005)
    return False


def points(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    dolly = SHARED / "data" / "dolly" / "train.jsonl"
    if not dolly.exists():
        pytest.skip(f"no data at {dolly}; set ABKD_TEST_DATA to a folder with some")
    with dolly.open(encoding="utf-8") as rows:
        outputs = [json.loads(row)["output"] for row in itertools.islice(rows, 40)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(outputs), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory):
    """The folder of a whole recipe: teacher, initial student, ABKD."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = run(command(folder, SHARED, text))
    assert result.returncode == 0, result.stderr
    assert "states cached" in result.stdout
    return folder


@pytest.mark.slow  # tests/chaos kills smaller recipes with stages
def test_gpt2_recipe_killed_in_its_last_stage(shared, text, undisturbed, tmp_path):
    killed = tmp_path / "killed"
    init = undisturbed / "gpt2" / "init"
    dev = {point["step"]: point["loss"] for point in points(init) if point["kind"] == "dev" and point["step"]}
    assert sorted(dev) == [3, 6]
    assert json.loads((init / "summary.json").read_text())["selected_step"] == min(dev, key=dev.get)

    arguments = command(killed, shared, text)
    assert kill_at_step(arguments, killed / "gpt2" / "abkd" / "metrics.jsonl", 8), "it was over before it was killed"
    assert not (killed / "gpt2" / "abkd" / "final").exists()
    resumed = run([*arguments, "--resume"])
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("is finished already") == 2
    assert "resumed    from " in resumed.stdout

    ours, theirs = (load_file(root / "gpt2" / "abkd" / "final" / "model.safetensors") for root in (killed, undisturbed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    final = killed / "gpt2" / "abkd" / "final"
    prompt = AutoTokenizer.from_pretrained(final)("Name a color.", return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(final)
    assert model.generate(prompt, max_new_tokens=2, pad_token_id=0).shape[1] > prompt.shape[1]
    steps = [point for point in points(killed / "gpt2" / "abkd") if point["kind"] == "train"]
    assert [point["step"] for point in steps] == list(range(1, 13))
    assert all(point["loss_pretrain"] > 0 for point in steps)


ON_POLICY = {
    "distillm": ["distillm:on_policy.threshold=0.6"],
    "gkd": [],
    "imitkd": [],
    "minillm": ["minillm:minillm.rollouts=8"],
}


@pytest.mark.parametrize(
    "rows",
    [("seqkd", "minillm"), pytest.param(("distillm", "gkd", "imitkd"), marks=pytest.mark.slow)],
    ids=" and ".join,
)
def test_rows_on_generated_text_share_teacher_and_initial_student(shared, text, undisturbed, tmp_path, capsys, rows):
    for stage in ("teacher", "init"):
        shutil.copytree(undisturbed / "gpt2" / stage, tmp_path / "gpt2" / stage)
    for row in rows:
        own = ON_POLICY.get(row, [])
        arguments = command(tmp_path, shared, text, row, f"gpt2-{row}.json")[3:]
        own = [f"{row}:train.steps=5", f"{row}:train.batch_size=4", *own]
        assert main([*arguments, *(part for override in own for part in ("--set", override))]) == 0
        assert capsys.readouterr().out.count("is finished already") == 2
        steps = [point for point in points(tmp_path / "gpt2" / row) if point["kind"] == "train"]
        assert len(steps) == 5
        assert all((point.get("loss_pretrain", 0) > 0) == (row != "gkd") for point in steps)
        if row in ON_POLICY:
            assert (0 < sum(point["generating_share"] for point in steps) < 5) == (row != "imitkd")
    if "seqkd" in rows:
        lines = (tmp_path / "gpt2" / "answers" / "final" / "answers.jsonl").read_text().splitlines()
        assert len(lines) == 24


@pytest.mark.parametrize(
    ("section", "key", "loss", "message"),
    [
        ("data", "train_on", "fkl", 'data.train_on was "last", is "all"'),
        ("data", "begin_token", "fkl", 'data.begin_token was false, is "auto"'),
        (None, "loss", "alphanet:0.2,0.8", 'loss was "alphanet:0.2,0.8,batch", is "alphanet:0.2,0.8,token"'),
    ],
)
def test_a_value_that_an_earlier_version_left_out_is_what_it_meant(tmp_path, section, key, loss, message, capsys):
    run = Run(tmp_path, f"loss={loss}")
    assert run() == 0
    path = run.folder / "config.json"
    config = json.loads(path.read_text())
    if section:
        del config[section][key]
    else:
        config[key] = loss
    path.write_text(json.dumps(config))
    shutil.rmtree(run.folder / "final")
    assert run("--resume") == 2
    assert f"is the result of another configuration ({message})" in capsys.readouterr().err
