"""The first lines of a run say how well both models predict the data's responses; saying it changes nothing."""

import contextlib
import json
import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from abkd_fast.config.recipe import load
from abkd_fast.data import quickstart
from abkd_fast.training.likelihoods import ResponseLikelihoods
from abkd_fast.training.trainer import Trainer
from runs import GPT2, RECIPE, TIED, Killed, Run, assert_same, at_step, crash

LINE = re.compile(r"  responses  mean log-probability of a token: student (\S+), teacher (\S+)\n")
WARNING = "predicts the data's responses worse than the student does: are the two swapped (student.path, teacher.path)"
STILL = {"attention_dropout": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}\n{{ message.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders without dropout. The models of wide weights know nothing, and are sure of it."""
    root = tmp_path_factory.mktemp("models")
    for seed, (name, config, spread) in enumerate([("flat", TIED, 0.02), ("gpt2", GPT2, 0.1), ("wide", TIED, 0.3)]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(**{**config, **STILL, "initializer_range": spread})
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        quickstart.tokenizer().save_pretrained(root / name)
    return root


@pytest.fixture
def talks(tmp_path):
    """Rows whose samples have one to three trained spans."""
    words = ["one", "two and two", "three", "four or more", "five"]
    rows = []
    for row in range(24):
        turns = [("user", "assistant")[i % 2] for i in range(2 + 2 * (row % 3))]
        rows.append({"messages": [{"role": role, "content": words[(row + i) % 5]} for i, role in enumerate(turns)]})
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    return {
        "train": str(tmp_path / "talks.jsonl"),
        "chat_template": str(tmp_path / "template.jinja"),
        "max_length": 128,
    }


def pair(folders, student, teacher, method="kd", **sections):
    models = {"student": {"path": str(folders / student)}, "teacher": {"path": str(folders / teacher)}}
    return {"method": method, **models, "eval": {}, **sections}


def oracle(folder, samples):
    """The mean log-probability of the responses' tokens, by transformers in float64, one sample at a time."""
    model, values = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval(), []
    for sample in samples:
        ids = torch.tensor(sample["input_ids"])
        with torch.no_grad():
            log_probs = model(ids[None]).logits[0].log_softmax(-1)
        for start, stop in zip(sample["spans"][::2], sample["spans"][1::2], strict=True):
            values += [log_probs[place - 1, ids[place]] for place in range(start, stop)]
    return torch.stack(values).mean().item()


def told(text):
    (numbers,) = LINE.findall(text)
    return [float(number) for number in numbers]


@pytest.mark.parametrize("mode", ["off", "disk", "memory"])
@pytest.mark.parametrize(
    ("student", "teacher", "dtype", "tolerance"),
    [("flat", "wide", "float32", 1e-3), ("gpt2", "wide", "float64", 1e-3), ("flat", "gpt2", "bfloat16", 2e-2)],
)
def test_means_are_those_of_transformers(tmp_path, folders, talks, capsys, student, teacher, dtype, tolerance, mode):
    sections = pair(folders, student, teacher, data=talks, cache={"mode": mode, "dir": str(tmp_path / "cache")})
    run = Run(tmp_path / "run", "train.steps=6", f"train.dtype={dtype}", **sections)
    assert run() == 0
    batch = next(Trainer(load(run.arguments[1], [*run.arguments[3::2], "run.name=other"])[0]).batches())
    assert {len(sample["spans"]) for sample in batch.samples} >= {2, 4}
    expected = [oracle(folders / name, batch.samples) for name in (student, teacher)]
    assert told(capsys.readouterr().out) == pytest.approx(expected, abs=tolerance)


def test_a_teacher_that_is_worse_than_the_student_is_named(tmp_path, folders, capsys):
    for student, teacher, warned in (("flat", "wide", True), ("wide", "flat", False)):
        assert Run(tmp_path / student, "train.steps=1", **pair(folders, student, teacher))() == 0
        out = capsys.readouterr().out
        better, worse = told(out) if warned else reversed(told(out))
        assert better > worse
        assert (WARNING in out) == warned
        assert ("predicts them worse than a guess among its 1024 tokens would (-6.931)" in out) != warned


WAYS = {
    "kd": [],
    "kd live": ["cache.mode=off", "loss=alphanet:0.2,0.8,batch"],
    "kd bfloat16": ["train.dtype=bfloat16"],
    "kd lora": ['student.lora={"rank": 2}'],
    "kd text": ["data.pretrain.path=TEXT"],
    "gkd": ["on_policy.replay_rows=8", "sampling.max_new_tokens=6"],
    "distillm": ["on_policy.threshold=0.4", "on_policy.replay_rows=8", "sampling.max_new_tokens=6"],
}


@pytest.mark.parametrize("way", WAYS)
def test_telling_changes_no_bit_of_the_run(tmp_path, folders, capsys, monkeypatch, way):
    text = tmp_path / "text.txt"
    text.write_text("\n".join("the quick brown fox jumps over the lazy dog " * 9 for _ in range(99)))
    overrides = [override.replace("TEXT", str(text)) for override in WAYS[way]]
    sections = pair(folders, "flat", "wide", way.split()[0], eval=RECIPE["eval"])
    sections["student"]["dropout"] = 0.2
    told_of, silent = (Run(tmp_path / name, *overrides, **sections) for name in ("told", "silent"))
    assert told_of() == 0
    assert told(capsys.readouterr().out)
    monkeypatch.setattr(ResponseLikelihoods, "measured", lambda *_: contextlib.nullcontext())
    assert silent() == 0
    assert not LINE.search(capsys.readouterr().out)
    assert told_of.points() == silent.points()
    (name,) = (path.name for path in (silent.folder / "final").glob("*.safetensors"))
    assert (told_of.folder / "final" / name).read_bytes() == (silent.folder / "final" / name).read_bytes()


def test_responses_of_a_model_say_nothing(tmp_path, folders, capsys):
    """The first step of data tells, if one comes; a run without a teacher has nothing to compare."""
    short = ["sampling.max_new_tokens=4", "log.every_steps=1"]
    sections = pair(folders, "flat", "wide", "imitkd", on_policy={"replay_rows": 0})
    assert Run(tmp_path / "imitkd", *short, **sections)() == 0
    assert not LINE.search(capsys.readouterr().out)
    sections = pair(folders, "flat", "wide", "minillm", loss="rkl", minillm={"rollouts": 8})
    assert Run(tmp_path / "minillm", "train.steps=3", *short, **sections)() == 0
    assert not LINE.search(capsys.readouterr().out)
    assert Run(tmp_path / "sft", "train.steps=1")() == 0
    assert not LINE.search(capsys.readouterr().out)
    sections = pair(folders, "flat", "wide", "gkd", on_policy={"replay_rows": 0})
    assert Run(tmp_path / "gkd", "run.seed=1", *short, **sections)() == 0
    out = capsys.readouterr().out
    before = [line for line in out[: LINE.search(out).start()].splitlines() if line.startswith("step ")]
    assert len(before) > 0
    assert all("generating_share 1" in line for line in before if "samples/s" in line)


def test_a_resumed_run_has_trained_already(tmp_path, folders, capsys, monkeypatch):
    run = Run(tmp_path / "run", "checkpoint.every_steps=2", **pair(folders, "flat", "wide"))
    undisturbed = Run(tmp_path / "undisturbed", "checkpoint.every_steps=2", **pair(folders, "flat", "wide"))
    with monkeypatch.context() as patch:
        at_step(patch, 6, crash)
        with pytest.raises(Killed):
            run()
    assert told(capsys.readouterr().out)
    assert run("--resume") == 0
    assert not LINE.search(capsys.readouterr().out)
    assert undisturbed() == 0
    assert_same(run, undisturbed)
