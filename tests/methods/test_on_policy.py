"""Methods that train on generated text: which samples a step gets, their labels and losses, what is logged and kept."""

import json
import random
import signal
import subprocess
import sys
import time

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from abkd_fast import generate, methods
from abkd_fast.cli import INTERRUPTED
from abkd_fast.config.recipe import load
from abkd_fast.console import format_bytes
from abkd_fast.data import quickstart
from abkd_fast.data.batches import pack
from abkd_fast.data.rows import read_rows
from abkd_fast.data.tokenize import tokenize
from abkd_fast.errors import ConfigError
from abkd_fast.generation import sampling
from abkd_fast.generation.answers import Answers
from abkd_fast.methods import rollouts
from abkd_fast.methods.distillm import DistiLLM
from abkd_fast.methods.replay import ReplayBuffer
from abkd_fast.stages import resolve
from abkd_fast.teacher.teacher import Teacher
from abkd_fast.training.trainer import Trainer
from conftest import LLAMA
from runs import Killed, Run, assert_same, at_step, crash, poison, send, step_and_gradients

TEACHER = {**LLAMA, "vocab_size": 1024, "eos_token_id": 0, "bos_token_id": 0}
OVERRIDES = ["sampling.max_new_tokens=6", "log.every_steps=4", "data.max_length=96"]
METHODS = {
    "gkd": ["loss=jsd:0.1", "on_policy.replay_rows=8"],
    "imitkd": ["loss=fkl", "on_policy.replay_rows=8"],
    # A threshold that grows at every evaluation, so that all of its ways are taken.
    "distillm": ["loss=srkl:0.1", "on_policy.replay_rows=8", "on_policy.threshold=0.4", "on_policy.schedule=constant"],
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TEACHER, initializer_range=0.1))
    model.save_pretrained(folder)
    quickstart.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make(tmp_path, teacher):
    """A run of a method with this teacher; later overrides win."""

    def make(method, *more, name="run"):
        overrides = [f"method={method}", f"teacher.path={teacher}", *OVERRIDES, *METHODS[method], *more]
        return Run(tmp_path / name, *overrides)

    return make


def trainer_of(run):
    trainer = Trainer(load(run.arguments[1], run.arguments[3::2])[0])
    trainer.build()
    return trainer


def test_dry_run_counts_the_memory_of_generation(make, capsys, monkeypatch):
    run = make("gkd", "data.max_length=128")
    assert run("--dry-run") == 0
    longest = max(spans[-2] for spans in trainer_of(run).data.train_set["spans"]) + 6
    held = 4 * longest * 2 * 2 * 2 * 4 * 4  # sequences, tokens, keys and values, layers, key heads, their width, bytes
    out = capsys.readouterr().out
    assert f"while it generates, instead of the last two, keys and values of 4 sequences {format_bytes(held)}" in out
    monkeypatch.setattr("abkd_fast.training.costs.generation_memory", lambda *_: [("keys", 8 * 10**12)])
    assert run("--dry-run") == 0
    assert "memory     about 8000.0 GB with" in capsys.readouterr().out


# Labels and losses


def test_labels_of_generated_text_are_the_next_tokens_end_included(make, monkeypatch):
    """Against hand-made ones: the first token of a response counts, and so does an end token that came."""
    responses = [[8, 9, 0], [8], [0], [5, 5]]
    monkeypatch.setattr(rollouts, "sample", lambda model, prompts, *rest: responses[: len(prompts)])
    trainer = trainer_of(make("gkd", "on_policy.fraction=1", "on_policy.replay_rows=0"))
    lengths = [3, 2, 4, 1]
    samples = [
        {"input_ids": [*range(20, 20 + length), 11, 12], "spans": [length, length + 2], "row": number, "index": number}
        for number, length in enumerate(lengths)
    ]
    written = trainer.method.select_batch(0, 0.1, samples, trainer.rollouts)
    assert written == [
        {"input_ids": [20, 21, 22, 8, 9, 0], "spans": [3, 6], "row": 0},
        {"input_ids": [20, 21, 8], "spans": [2, 3], "row": 1},
        {"input_ids": [20, 21, 22, 23, 0], "spans": [4, 5], "row": 2},
        {"input_ids": [20, 5, 5], "spans": [1, 3], "row": 3},
    ]
    monkeypatch.setattr(trainer.method, "select_batch", lambda *arguments: written)
    (batch,) = trainer.select_batch(next(trainer.batches())).micro_batches
    assert batch.positions.tolist() == [2, 3, 4, 7, 12, 14, 15]
    assert batch.labels.tolist() == [8, 9, 0, 8, 0, 5, 5]


def kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


LOSSES = {
    "jsd:0.1": lambda p, q, m: 0.1 * kl(q, m(0.9)) + 0.9 * kl(p, m(0.9)),
    "srkl:0.1": lambda p, q, m: kl(q, m(0.9)),
    "sfkl:0.1": lambda p, q, m: kl(p, m(0.1)),
    "fkl": lambda p, q, m: kl(p, q),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("method", ["imitkd", "distillm"])
def test_loss_and_gradient_of_generated_text_are_those_of_a_padded_batch(make, method, loss):
    """The definitions, by autograd, in float64, from transformers' own padded logits."""
    more = ["on_policy.threshold=1"] if method == "distillm" else []
    exact = "train.dtype=float64", "student.dropout=0", "optim.clip_norm=1e9"
    overrides = f"loss={loss}", "train.max_tokens=128", *exact, *more
    trainer = trainer_of(make(method, *overrides))
    batch = trainer.select_batch(next(trainer.batches()))
    assert len(batch.micro_batches) > 1
    samples = batch.samples
    assert all("index" not in sample for sample in samples), "all of them are generated"
    value, gradients = step_and_gradients(trainer, batch)

    longest = max(len(sample["input_ids"]) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    mask, counts = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        ids[row, :length] = torch.tensor(sample["input_ids"])
        mask[row, :length] = 1
        counts[row, sample["spans"][0] - 1 : length - 1] = True
    models = trainer.student.model, trainer.teachers["teacher"].live.model.model
    for model in models:
        model.set_attn_implementation("sdpa")
    logits = [model(input_ids=ids, attention_mask=mask, use_cache=False).logits[counts] for model in models]
    q, p = (x.softmax(1) for x in logits)
    expected = LOSSES[loss](p.detach(), q, lambda share: share * p.detach() + (1 - share) * q).mean()
    trainer.student.zero_grad()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-11)
    for name, parameter in trainer.student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-10, atol=1e-12)


def test_replay_costs_no_teacher(make, monkeypatch):
    """The teacher reads every sample once: of the data from the cache, generated ones when they are new."""
    read, states = [], Teacher.linear_head
    monkeypatch.setattr(
        Teacher, "linear_head", lambda self, batch: read.extend(s["row"] for s in batch.samples) or states(self, batch)
    )
    trainer = trainer_of(make("distillm", "on_policy.threshold=1", "cache.mode=memory"))
    read.clear()  # what building the cache took
    coins = iter([0.9, 0.9, 0.9, 0.9, 0.2])  # filling the buffer, two replays, and a new one
    monkeypatch.setattr(trainer.method.buffer, "coin", lambda: next(coins))
    counts = []
    for batch in trainer.batches():
        trainer.train_step(trainer.select_batch(batch))
        trainer.state.step += 1
        counts.append(len(read))
        if len(counts) == 5:
            break
    assert counts == [4, 8, 8, 8, 12]
    fresh = [dict(sample) for sample in trainer.method.buffer.samples]
    kept = [sample.pop("hidden_states") for sample in fresh]
    states_again = [trainer.teachers["teacher"].live.linear_head(pack([sample], 1000)[0]).hidden for sample in fresh]
    assert all(torch.equal(a, b) for a, b in zip(kept, states_again, strict=True))


# Which samples a step gets


class Writer:
    """Stands for Rollouts."""

    def __init__(self):
        self.steps = []

    def write(self, samples, step):
        self.steps.append(step)
        return [{"input_ids": [1, 2], "spans": [1, 2], "row": sample, "step": step} for sample in samples]


def method_of(make, name, *overrides):
    run = make(name, *overrides)
    (config,) = load(run.arguments[1], run.arguments[3::2])
    return methods.METHODS[name](config)


@pytest.mark.parametrize("schedule", ["decreasing", "constant", "increasing"])
def test_distillm_chooses_as_published(make, schedule):
    """Its pseudo-code, step by step: phi the threshold, r the coin, g the step from 1, G all steps."""
    method = method_of(make, "distillm", "on_policy.replay_rows=6", f"on_policy.schedule={schedule}")
    writer, coins = Writer(), torch.rand(400, generator=torch.Generator().manual_seed(1)).tolist()
    stored, total, seen = 0, len(coins), set()
    for g, r in enumerate(coins, 1):
        method.threshold = phi = 0.3 + 0.4 * (g % 3 == 0)
        method.buffer.coin = lambda r=r: r
        gen_p = phi * {"decreasing": 1 - g / total, "constant": 0.5, "increasing": g / total}[schedule]
        data = [1, 2, 3]
        got = method.select_batch(g - 1, g / total, data, writer)
        if r < gen_p or (r < phi and stored < 6):
            expected, stored = "new", min(6, stored + 3)
            assert [(sample["row"], sample["step"]) for sample in got] == [(1, g - 1), (2, g - 1), (3, g - 1)]
        elif r < phi:
            expected = "replay"
            assert len({(sample["row"], sample["step"]) for sample in got}) == 3
            assert {sample["step"] for sample in got} <= set(writer.steps[-2:]), "the newest six are there"
        else:
            expected = "data"
            assert got is data
        assert (writer.steps[-1:] == [g - 1]) == (expected == "new")
        seen.add(expected)
    assert seen == {"new", "replay", "data"}


def test_distillms_threshold_follows_the_dev_loss(make):
    """Compared with the loss when it last grew, at first with that before step 1; not with the lowest."""
    method = method_of(make, "distillm", "on_policy.threshold=0.75", "on_policy.loss_margin=0.5")
    expected = [(5.0, 0.75), (3.0, 0.75), (4.0, 0.75), (5.5, 0.85), (5.9, 0.85), (6.0, 0.95), (6.5, 1.0), (9.0, 1.0)]
    for loss, threshold in expected:
        method.on_eval(loss)
        assert method.metrics() == {"threshold": pytest.approx(threshold)}


def test_gkd_takes_its_share_and_without_a_buffer_the_new_ones(make):
    method, writer = method_of(make, "gkd", "on_policy.fraction=0.3", "on_policy.replay_rows=0"), Writer()
    for step in range(1000):
        got = method.select_batch(step, step / 1000, [1, 2, 3], writer)
        assert got == [1, 2, 3] or {sample["step"] for sample in got} == {step}
    assert len(writer.steps) == pytest.approx(300, abs=4 * (1000 * 0.3 * 0.7) ** 0.5)
    assert method.off_policy_fraction == 0.7


def test_imitkd_replays_what_is_in_the_buffer_at_random(make):
    method, writer = method_of(make, "imitkd", "on_policy.replay_rows=30"), Writer()
    ages = []
    for step in range(200):
        got = method.select_batch(step, step / 200, [1, 2, 3], writer)
        assert len({(sample["row"], sample["step"]) for sample in got}) == 3
        ages += [step - sample["step"] for sample in got]
    assert writer.steps == list(range(200))
    assert set(ages) == set(range(10)), "the newest ten steps' samples, and no older ones"
    assert method.off_policy_fraction == 0


def test_empty_buffer_cannot_be_replayed():
    with pytest.raises(ConfigError, match="4 samples are asked of a replay buffer that holds 0"):
        ReplayBuffer(8, seed=1).draw(4)


# Runs


@pytest.mark.parametrize("method", METHODS)
def test_method_lowers_its_objective_and_logs_what_it_does(make, method):
    run = make(method, "train.steps=40", "optim.lr=1e-2", "on_policy.replay_rows=4", "eval.every_steps=10")
    assert run() == 0
    points = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    points = [point for point in points if point["kind"] == "train"]
    losses = [point["loss"] for point in points]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    shares = [point["generating_share"] for point in points]
    assert set(shares) == {1.0} if method == "imitkd" else 0 < sum(shares) < len(shares)
    for point in points:
        assert ("generated_length" in point) == (point["generating_share"] > 0)
        assert 1 <= point.get("generated_length", 1) <= 6
        assert ("threshold" in point) == (method == "distillm")


def test_without_generation_it_is_word_level_kd(make, monkeypatch):
    """A share of 0, or a threshold of 0 that the loss never raises: the very steps of kd."""
    runs = [
        make("gkd", "on_policy.fraction=0", "loss=fkl", name="gkd"),
        make("distillm", "on_policy.threshold=0", "on_policy.loss_margin=100", "loss=fkl", name="distillm"),
        make("gkd", "method=kd", "on_policy.replay_rows=1000", "loss=fkl", name="kd"),
    ]
    for run in runs:
        assert run() == 0
    for run in runs[:2]:
        assert all(torch.equal(tensor, runs[2].weights()[name]) for name, tensor in run.weights().items())


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_run_resumes_to_the_same_bits(make, monkeypatch, method):
    """A crash, which goes back to a checkpoint, then a signal; buffer, threshold, generators and counts are kept."""
    loss = Trainer.dev_loss
    monkeypatch.setattr(Trainer, "dev_loss", lambda self: loss(self) + 0.2 * self.state.step)
    undisturbed, run = make(method, name="once"), make(method, name="pieces")
    assert undisturbed() == 0
    with monkeypatch.context() as patch:
        at_step(patch, 7, crash)
        with pytest.raises(Killed):
            run()
    with monkeypatch.context() as patch:
        at_step(patch, 4, send(signal.SIGTERM))  # after step 9
        assert run("--resume") == INTERRUPTED
    assert run.checkpoints()[-1] == "step-000009"
    assert run("--resume") == 0
    assert_same(run, undisturbed)
    if method == "distillm":
        thresholds = [point["threshold"] for point in run.points() if "threshold" in point]
        assert thresholds[0] < thresholds[-1]


def test_student_writes_no_token_that_the_teacher_cannot_read(make, monkeypatch):
    """A student whose vocabulary is padded further: an untrained one would often write what is padding."""
    written, write = [], rollouts.Rollouts.write
    monkeypatch.setattr(rollouts.Rollouts, "write", lambda *arguments: written.append(write(*arguments)) or written[-1])
    assert make("imitkd", "student.config.vocab_size=1400", "train.steps=3")() == 0
    tokens = {token for samples in written for sample in samples for token in sample["input_ids"]}
    assert 840 < max(tokens) < 1024


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_again_and_again(make, method):
    """SIGKILL, at random moments after a new checkpoint."""
    undisturbed, run = (make(method, "checkpoint.every_steps=1", name=name) for name in ("once", "pieces"))
    assert undisturbed() == 0
    command, dice = [sys.executable, "-m", "abkd_fast.train", *run.arguments], random.Random(3)
    for least in (1, 4, 6, 9):
        child = subprocess.Popen([*command, *(["--resume"] if run.folder.exists() else [])], stdout=subprocess.DEVNULL)
        newest = run.folder / "checkpoints" / f"step-{least:06d}"
        while child.poll() is None and not newest.exists():
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.05))
        child.kill()
        assert child.wait() == -signal.SIGKILL
    assert run("--resume") == 0
    assert_same(run, undisturbed)


def test_rows_of_a_bad_step_are_those_behind_its_samples(make, monkeypatch, capsys):
    rows, sequences = {}, DistiLLM.select_batch

    def noted(self, step, *arguments):
        got = sequences(self, step, *arguments)
        rows[step + 1] = sorted({sample["row"] + 1 for sample in got}), {sample.get("index") for sample in got}
        return got

    monkeypatch.setattr(DistiLLM, "select_batch", noted)
    run = make("distillm", "on_policy.threshold=1", "train.on_nonfinite=skip", "log.every_steps=12")
    poison(monkeypatch, 6)
    at_step(monkeypatch, 8, send(signal.SIGTERM))
    assert run() == INTERRUPTED
    assert run("--resume") == 0
    expected, indices = rows[6]
    assert indices == {None}, "generated, or replayed"
    text = f"step 6: loss {{}}, gradient norm inf, samples quickstart:small row {', '.join(map(str, expected))}"
    before, after = text.split("{}")
    output = capsys.readouterr().out
    assert before in output
    assert after in output


# SeqKD


@pytest.fixture
def seqkd(tmp_path, teacher):
    """A recipe with a stage that answers and one that trains on the answers."""

    def make(name, *overrides):
        stages = {
            "answers": {"method": "generate", "student": {"path": teacher, "config": None}},
            "student": {"method": "seqkd", "data": {"train": "stage:answers"}},
        }
        return Run(tmp_path / name, *OVERRIDES, *overrides, stage="student", stages=stages)

    return make


def answers_of(run):
    path = run.folder.parent / "answers" / "final" / "answers.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_seqkd_trains_on_the_teachers_text(seqkd, teacher, tmp_path, capsys):
    run = seqkd("run")
    assert run("--dry-run") == 0
    out = capsys.readouterr().out
    assert f"answers    to 20 prompts, by {teacher}, each of at most 6 tokens" in out
    assert "stage:answers is not written yet" in out
    assert run() == 0
    command = ["--model", teacher, "--data", "quickstart:small", "--rows", "20", "--max-new-tokens", "6"]
    assert generate.main([*command, "--device", "cpu", "--out", str(tmp_path / "answers.jsonl")]) == 0
    answers = answers_of(run)
    assert answers == [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]

    tokenizer = quickstart.tokenizer()
    (_, config) = (resolve(config) for config in load(run.arguments[1], run.arguments[3::2]))
    trainer = Trainer(config, resume=True)
    assert trainer.data.train_set["input_ids"][:] == [answer["prompt_ids"] + answer["output_ids"] for answer in answers]
    for answer in answers:
        assert tokenizer.decode(answer["prompt_ids"]) == answer["prompt"]
        assert tokenizer.decode(answer["output_ids"], skip_special_tokens=True) == answer["output"]
        assert (answer["output_ids"][-1] == tokenizer.eos_token_id) == answer["ended"]
    originals = read_rows("quickstart:small", 20)
    assert [answer["prompt"] for answer in answers] == [row.values["prompt"] for row in originals]
    assert all(answer["output"] != row.values["output"] for answer, row in zip(answers, originals, strict=True))
    dev = tokenize(read_rows("quickstart:dev", 4), tokenizer, 96).dataset
    assert trainer.data.dev.dev_set["input_ids"][:] == dev["input_ids"][:]

    losses = [point["loss"] for point in run.points() if point.get("kind") == "train"]
    assert losses[-1] < losses[0]
    before = run.weights()
    capsys.readouterr()
    assert run() == 0
    assert capsys.readouterr().out.count("is finished already") == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.weights().items())


def test_seqkd_resumes_within_the_answers_and_after_them(seqkd, monkeypatch, capsys):
    undisturbed, run = seqkd("once"), seqkd("pieces")
    assert undisturbed() == 0
    add, count = Answers.add, iter(range(1, 1000))

    def add_and_be_stopped(self, *arguments):
        add(self, *arguments)
        if next(count) == 5:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Answers, "add", add_and_be_stopped)
        assert run() == INTERRUPTED
    assert run() == 2
    assert "answers exists, but was not finished: add --resume" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        at_step(patch, 7, send(signal.SIGTERM))
        assert run("--resume") == INTERRUPTED
    assert run("--resume") == 0
    assert answers_of(run) == answers_of(undisturbed)
    assert_same(run, undisturbed)


def test_prompts_that_are_too_long_are_not_answered(seqkd, write_jsonl):
    rows = [{"prompt": "Add 1 and 2. " * (9 if number % 2 else 1), "output": "3"} for number in range(10)]
    run = seqkd(
        "run", f"answers:data.train={write_jsonl(rows)}", "data.max_prompt_length=20", "data.dev=null", "train.steps=1"
    )
    assert run() == 0
    assert {answer["row"] for answer in answers_of(run)} <= set(range(0, 10, 2))


def test_adapters_answer_and_learn_from_their_own_text(tmp_path, teacher):
    """As the Llama recipes do: a teacher that is an adapter answers, and students are adapters."""
    plain = {"config": None, "path": teacher, "dropout": 0}
    stages = {
        "teacher": {"student": {**plain, "lora": {"rank": 4}}, "optim": {"lr": 0.1}},
        "answers": {"method": "generate", "student": {**plain, "adapter": "stage:teacher"}},
        "seqkd": {"method": "seqkd", "student": {**plain, "lora": {"rank": 4}}, "data": {"train": "stage:answers"}},
        "student": {
            "method": "distillm",
            "loss": "sfkl:0.1",
            "student": {**plain, "adapter": "stage:seqkd"},
            "teacher": {"path": teacher, "adapter": "stage:teacher"},
            "on_policy": {"threshold": 0.5, "replay_rows": 8},
        },
    }
    run = Run(tmp_path, *OVERRIDES, stage="student", stages=stages)
    assert run("--dry-run") == 0
    assert run() == 0
    adapter = peft.AutoPeftModelForCausalLM.from_pretrained(run.folder.parent / "teacher" / "final")
    tokenizer = quickstart.tokenizer()
    answers = answers_of(run)
    settings = sampling.SamplingParams(max_new_tokens=6, eos_token_ids=(tokenizer.eos_token_id,))
    prompts = [tokenizer(answer["prompt"])["input_ids"] for answer in answers]
    seeds = [(10 << 32) + answer["row"] for answer in answers]
    ours, theirs = (
        [
            tokenizer.decode(tokens, skip_special_tokens=True)
            for tokens in sampling.sample(model, prompts, settings, seeds)
        ]
        for model in (adapter.merge_and_unload(), AutoModelForCausalLM.from_pretrained(teacher))
    )
    assert [answer["output"] for answer in answers] == ours
    assert ours != theirs
    shares = [point["generating_share"] for point in run.points() if "generating_share" in point]
    assert sum(shares) > 0
