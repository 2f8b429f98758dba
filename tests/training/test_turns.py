"""Samples with several trained turns, from the loss of a step to a resumed run."""

import json
import pathlib

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import chat
from abkd_fast.config.recipe import load
from abkd_fast.teacher.teacher import CachedTeacher, Teacher
from abkd_fast.training.trainer import Trainer
from conftest import LLAMA
from runs import Run, assert_same, crash_and_resume, step_and_gradients

MODEL = {**LLAMA, "vocab_size": 1024, "eos_token_id": 0, "bos_token_id": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher with a chat template, and rows of one to three turns."""
    folder = tmp_path_factory.mktemp("chat")
    torch.manual_seed(0)
    config = AutoConfig.for_model(**MODEL, initializer_range=0.1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "teacher")
    chat.write_tokenizer(folder / "teacher")
    chat.write_conversations(folder / "rows.jsonl", 20)
    chat.write_conversations(folder / "dev.jsonl", 4)
    return folder


@pytest.fixture
def make(folder, tmp_path):
    def make(method, *overrides, name="run"):
        teacher = f"{folder}/teacher"
        data = f"data.train={folder}/rows.jsonl", f"data.dev={folder}/dev.jsonl"
        needs = () if method == "sft" else (f"teacher.path={teacher}",)
        return Run(tmp_path / name, f"method={method}", f"tokenizer={teacher}", *data, *needs, *overrides)

    return make


def trainer_of(run):
    trainer = Trainer(load(run.arguments[1], run.arguments[3::2])[0])
    trainer.build()
    return trainer


def test_samples_have_a_span_for_each_turn(make):
    trainer = trainer_of(make("sft"))
    assert {len(spans) // 2 for spans in trainer.data.train_set["spans"]} == {1, 2, 3}
    tokenizer = AutoTokenizer.from_pretrained(trainer.config.tokenizer)
    rows = [json.loads(line)["messages"] for line in pathlib.Path(trainer.config.data.train).read_text().splitlines()]
    for sample in trainer.data.train_set:
        pairs = zip(sample["spans"][::2], sample["spans"][1::2], strict=True)
        texts = [tokenizer.decode(sample["input_ids"][start:stop]) for start, stop in pairs]
        answers = [message["content"] for message in rows[sample["row"]][1::2]]
        if sample["row_length"] <= trainer.config.data.max_length:
            assert texts == [f"{answer}<|im_end|>" for answer in answers]


LOSSES = {
    "sft": lambda q, p, labels: -q.log_softmax(1).gather(1, labels[:, None])[:, 0],
    "kd": lambda q, p, labels: (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1),
}


@pytest.mark.parametrize("method", LOSSES)
def test_loss_gradient_and_dev_loss_are_those_of_marked_tokens_alone(make, method):
    """By autograd, in float64, one conversation at a time: nothing packed, nothing padded."""
    exact = "train.dtype=float64", "student.dropout=0", "optim.clip_norm=1e9", "loss=fkl"
    trainer = trainer_of(make(method, *exact, "train.max_tokens=200"))
    batch = next(trainer.batches())
    assert any(len(sample["spans"]) > 2 for sample in batch.samples)
    value, gradients = step_and_gradients(trainer, batch)
    signals = type("Signals", (), {"received": None, "of_any_rank": lambda self: None})()
    dev_loss = trainer.data.dev.loss(trainer.student, trainer.device, signals)

    teacher = AutoModelForCausalLM.from_pretrained(trainer.config.tokenizer, dtype=torch.float64)
    student = trainer.student.model.eval()
    student.set_attn_implementation("sdpa")

    def mean(samples, loss):
        values = []
        for sample in samples:
            ids, marked = torch.tensor(sample["input_ids"]), torch.zeros(len(sample["input_ids"]), dtype=torch.bool)
            for start, stop in zip(sample["spans"][::2], sample["spans"][1::2], strict=True):
                marked[start:stop] = True
            logits = [model(ids[None], use_cache=False).logits[0, :-1][marked[1:]] for model in (student, teacher)]
            values.append(loss(logits[0], logits[1].detach(), ids[marked]))
        return torch.cat(values).mean()

    expected = mean(batch.samples, LOSSES[method])
    student.zero_grad()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-11)
    for name, parameter in trainer.student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        assert dev_loss == pytest.approx(mean(trainer.data.dev.dev_set, LOSSES["sft"]).item(), rel=1e-11)


def test_cached_states_give_the_same_bits(make):
    losses = {}
    for mode in ("off", "disk", "memory"):
        trainer = trainer_of(make("ab", f"cache.mode={mode}", name=mode))
        assert isinstance(trainer.teachers["teacher"], Teacher if mode == "off" else CachedTeacher)
        losses[mode] = [trainer.train_step(batch)[0].item() for batch in trainer.batches()]
    assert losses["disk"] == losses["memory"] == losses["off"]
    assert len({*losses["off"]}) == 12


@pytest.mark.parametrize("method", ["ab", "gkd"])
def test_resumed_run_is_the_undisturbed_one(make, method, monkeypatch):
    more = ["loss=jsd:0.1", "on_policy.replay_rows=8", "sampling.max_new_tokens=6"] if method == "gkd" else []
    undisturbed, run = (make(method, "checkpoint.every_steps=3", *more, name=name) for name in ("whole", "resumed"))
    assert undisturbed() == 0
    crash_and_resume(run, monkeypatch, 8)
    assert_same(run, undisturbed)


def test_generated_answers_are_to_the_last_turn(make):
    trainer = trainer_of(make("gkd", "loss=jsd:0.1", "on_policy.fraction=1", "sampling.max_new_tokens=6"))
    batch = next(trainer.batches())
    written = trainer.rollouts.write(batch.samples, 0)
    for sample, answer in zip(batch.samples, written, strict=True):
        start, stop = answer["spans"]
        assert answer["input_ids"][:start] == sample["input_ids"][: sample["spans"][-2]]
        assert start < stop == len(answer["input_ids"]) <= trainer.config.data.max_length


def test_dry_run_counts_labels_of_all_turns(make, capsys):
    run = make("ab")
    assert run("--dry-run") == 0
    out = capsys.readouterr().out
    train_set = Trainer(load(run.arguments[1], run.arguments[3::2])[0]).data.train_set
    labels = [sum(spans[1::2]) - sum(spans[::2]) for spans in train_set["spans"]]
    assert f"responses  mean {sum(labels) / len(labels):.1f}, " in out
    assert f"longest {max(labels)} tokens" in out
