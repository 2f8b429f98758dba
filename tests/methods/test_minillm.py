"""MiniLLM: its loss and gradient from whole logits in float64, its rounds, a run that learns, and one that resumes."""

import json
import math
import signal

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from abkd_fast import fused_linear_policy_gradient
from abkd_fast.cli import INTERRUPTED
from abkd_fast.config.recipe import load
from abkd_fast.data import quickstart
from abkd_fast.data.batches import pack
from abkd_fast.losses import chunks, policy_gradient, row_ops
from abkd_fast.losses.arguments import LinearHead, Rows
from abkd_fast.methods.minillm import MiniLLM
from abkd_fast.teacher.teacher import Teacher
from conftest import GPT2, LLAMA
from runs import Run, assert_same, at_step, send

TOKENS, VOCAB, CLIP = 24, 37, 0.2
# Of products in float32: see test_fused_linear.py.
TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-10}


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def float64(values):
    return torch.tensor(list(values), dtype=torch.float64)


def by_definition(student, teacher, labels, advantages, log_probs):
    """Each token's two terms, and the ratio, from whole logits."""
    log_q, log_p = F.linear(*student).log_softmax(1), F.linear(*teacher)[:, :VOCAB].log_softmax(1)
    ratio = (log_q.gather(1, labels[:, None])[:, 0] - log_probs).exp()
    surrogate = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP))
    return surrogate, (log_q.exp() * (log_q - log_p)).sum(1), ratio


@pytest.fixture
def tensors():
    student = normal(TOKENS, 8, seed=1), normal(VOCAB, 8, seed=2), normal(VOCAB, seed=3)
    teacher = normal(TOKENS, 12, seed=4), normal(VOCAB + 3, 12, seed=5), normal(VOCAB + 3, seed=6)
    labels = torch.arange(TOKENS) % VOCAB
    log_q = F.linear(*student).log_softmax(1).gather(1, labels[:, None])[:, 0]
    # Ratios from .6 to 1.5 for advantages of either sign.
    advantages = torch.tensor([2.0, -1.5]).repeat_interleave(TOKENS // 2)
    return student, teacher, labels, advantages, log_q - torch.linspace(0.6, 1.5, TOKENS // 2).log().repeat(2)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_policy_gradient_equals_its_definition(monkeypatch, tensors, dtype, compiled):
    """All four sides of the clipping, padded vocabulary, several chunks, rows that don't count, and an upstream."""
    if compiled and row_ops._C is None:
        pytest.skip("the extension is missing")
    monkeypatch.setattr(row_ops, "_compiled", lambda _: compiled)
    monkeypatch.setattr(chunks, "choose_chunk_tokens", lambda *_: 7)
    student, teacher, labels, advantages, log_probs = tensors
    given = [x.detach().to(dtype).requires_grad_() for x in student]
    ignored = labels.clone()
    ignored[[5, 20]] = -100  # one advantage of either sign
    total, divergences, ratios = fused_linear_policy_gradient(
        *given[:2],
        *[x.to(dtype) for x in teacher[:2]],
        ignored,
        advantages,
        log_probs,
        CLIP,
        student_bias=given[2],
        teacher_bias=teacher[2].to(dtype),
    )
    (3 * total).backward()
    exact = [x.requires_grad_() for x in student]
    surrogate, divergence, ratio = by_definition(exact, teacher, labels, advantages, log_probs)
    kept = ignored != -100
    expected = (surrogate + divergence)[kept].sum()
    (3 * expected).backward()
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(total.double(), expected, **tolerance)
    torch.testing.assert_close(divergences.double(), divergence * kept, **tolerance)
    torch.testing.assert_close(ratios.double(), ratio * kept, **tolerance)
    for ours, theirs in zip(given, exact, strict=True):
        scale = theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0, atol=scale * TOLERANCE[dtype])


def test_gradient_of_16_bits_at_a_label_that_the_student_is_sure_of():
    generator = torch.Generator().manual_seed(0)
    common, student = torch.randn(2, 32, 53, generator=generator)
    labels = torch.arange(32)
    student, teacher = 3 * common + student, 3 * common
    student[labels, labels] += torch.linspace(0, 15, 32)
    advantages, log_probs = torch.ones(32), student.log_softmax(1)[labels, labels] - 0.05
    gradients = {dtype: torch.empty(32, 53, dtype=dtype) for dtype in (torch.float64, torch.bfloat16)}
    for dtype, gradient in gradients.items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        rows = Rows(student.to(wide), teacher.to(wide), labels, policy_gradient.REVERSE_KL)
        policy_gradient.policy_rows(rows, advantages.to(wide), log_probs.to(wide), CLIP, gradient)
    exact = gradients[torch.float64]
    error = (gradients[torch.bfloat16].double() - exact).norm(dim=1)
    assert (error <= torch.finfo(torch.bfloat16).eps * exact.norm(dim=1)).all()


def test_gradient_by_logits_is_the_published_formula(tensors):
    """dz = -A rho (onehot - q) where that is not clipped, + q (d - KL(q, p)), written out."""
    student, teacher, labels, advantages, log_probs = tensors
    logits, theirs = F.linear(*student), F.linear(*teacher)[:, :VOCAB].contiguous()
    gradient = torch.empty_like(logits)
    rows = Rows(logits, theirs, labels, policy_gradient.REVERSE_KL)
    divergence, rho = policy_gradient.policy_rows(rows, advantages, log_probs, CLIP, gradient)
    q = logits.softmax(1)
    d = logits.log_softmax(1) - theirs.log_softmax(1)
    active = ((advantages >= 0) & (rho <= 1 + CLIP)) | ((advantages < 0) & (rho >= 1 - CLIP))
    assert 0 < active.sum() < TOKENS
    expected = -(advantages * rho * active)[:, None] * (F.one_hot(labels, VOCAB) - q)
    expected += q * (d - divergence[:, None])
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)
    assert torch.equal(policy_gradient.is_clipped(rho, advantages, CLIP), ~active)


def test_policy_gradient_refuses_what_does_not_fit(tensors):
    student, teacher, labels, advantages, log_probs = tensors
    numbers = {"advantages": advantages, "log_probs": log_probs}
    for name in numbers:
        wrong = numbers | {name: numbers[name][:-1]}
        with pytest.raises(ValueError, match=rf"{name} have shape \[23\], expected \[24\], one for each label"):
            fused_linear_policy_gradient(*student[:2], *teacher[:2], labels, *wrong.values(), CLIP)
    with pytest.raises(ValueError, match="student_hidden has 24 rows and teacher_hidden 23"):
        fused_linear_policy_gradient(*student[:2], teacher[0][1:], teacher[1], labels, *numbers.values(), CLIP)


MODEL = {**LLAMA, "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
STUDENT = {**MODEL, "eos_token_id": 0, "bos_token_id": 0}
SECTIONS = {
    "method": "minillm",
    "loss": "rkl",
    "student": {"config": STUDENT},
    "teacher": {"config": {**STUDENT, "num_hidden_layers": 1, "initializer_range": 0.3}},
    "sampling": {"max_new_tokens": 12, "batch_size": 5},
    "optim": {"lr": 3e-3, "schedule": "constant"},
    "minillm": {"rollouts": 9, "inner_epochs": 2, "teacher_weight": 0.3, "gamma": 0.9},
    "cache": {"mode": "off"},
}


class FakeRollouts:
    """Remembers what is asked, and answers with numbers of its own."""

    def __init__(self):
        self.asked = []

    def prompts(self, count, turn):
        self.asked.append((count, turn))
        return [{"input_ids": [7] * (number + 3), "spans": [2, number + 3]} for number in range(count)]

    def write_mixed(self, samples, step, teacher_weight):
        self.asked.append((step, teacher_weight))
        for sample in samples:
            length = len(sample["input_ids"]) - sample["spans"][0]
            for name, seed in (("student_log_probs", length + 100 * step), ("teacher_log_probs", length + 7)):
                sample[name] = (-5 * normal(length, seed=seed).abs()).tolist()
            sample["row"] = length
        return samples


def method(tmp_path, *overrides):
    run = Run(tmp_path, *overrides, **SECTIONS)
    return MiniLLM(load(run.arguments[1], list(overrides))[0])


def test_rounds_returns_and_advantages(tmp_path):
    """Against the definitions, token by token; 9 rollouts make two minibatches of 4 an epoch, and one is left out."""
    minillm, rollouts = method(tmp_path, "minillm.clip_reward=3"), FakeRollouts()
    expected_numbers = {}
    for step in range(8):
        batch = minillm.select_batch(step, 0.0, [], rollouts)
        if step in (0, 4):
            both = FakeRollouts()
            for sample in both.write_mixed(both.prompts(9, 0), step, 0.3):
                rewards, log_probs = [], []
                for ours, theirs in zip(sample["student_log_probs"], sample["teacher_log_probs"], strict=True):
                    rewards.append(min(3.0, max(-3.0, (theirs - ours) / 0.5)))
                    weight = math.exp(ours) / (0.7 * math.exp(ours) + 0.3 * math.exp(theirs))
                    assert weight <= 1 / 0.7 + 1e-12
                    log_probs.append(ours - math.log(weight))
                length = len(rewards)
                returns = [
                    sum(0.9 ** (k - t) * rewards[k] for k in range(t, length)) / (length - t) for t in range(length)
                ]
                expected_numbers[length] = returns, log_probs
        assert len(batch) == 4
        tokens = float64(x for sample in batch for x in expected_numbers[sample["row"]][0])
        for sample in batch:
            returns, log_probs = expected_numbers[sample["row"]]
            assert sample["log_probs"] == pytest.approx(log_probs, rel=1e-12)
            advantages = (float64(returns) - tokens.mean()) / (tokens.var(unbiased=False) + 1e-8).sqrt()
            assert sample["advantages"] == pytest.approx(advantages.tolist(), rel=1e-10, abs=1e-12)
    assert rollouts.asked == [(9, 0), (0, 0.3), (9, 1), (4, 0.3)]


def test_minibatches_are_shuffled_and_drop_the_rest(tmp_path):
    minillm, rollouts = method(tmp_path), FakeRollouts()
    chosen = [[sample["row"] for sample in minillm.select_batch(step, 0.0, [], rollouts)] for step in range(8)]
    epochs = [chosen[step] + chosen[step + 1] for step in range(0, 8, 2)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_losses_of_rollouts_and_text_from_whole_logits(tmp_path):
    """What a step differentiates: mean and gradient by hidden states and projection, float64 autograd to 1e-10."""
    minillm, rollouts = method(tmp_path, "minillm.text_kd=0.3"), FakeRollouts()
    samples = minillm.select_batch(0, 0.0, [], rollouts)
    (batch,) = pack(samples, 1000)
    count = len(batch.labels)
    hidden, weight = normal(count, 8, seed=1).requires_grad_(), normal(VOCAB, 8, seed=2).requires_grad_()
    states = LinearHead(normal(count, 12, seed=3), normal(VOCAB, 12, seed=4))
    numbers = [float64(x for s in samples for x in s[name]) for name in ("advantages", "log_probs")]
    teacher = states.hidden, states.weight
    surrogate, divergence, ratio = by_definition((hidden, weight), teacher, batch.labels, *numbers)
    log_q, log_p = F.linear(hidden, weight).log_softmax(1), F.linear(*teacher).log_softmax(1)
    by_text = 0.3 * (log_p.exp() * (log_p - log_q)).sum() + 0.7 * F.nll_loss(log_q, batch.labels, reduction="sum")
    for loss, expected in ((minillm.loss, (surrogate + divergence).sum()), (minillm.pretrain_loss, by_text)):
        got = loss(LinearHead(hidden, weight), batch, states)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
        ours, theirs = (torch.autograd.grad(x, (hidden, weight)) for x in (got, expected))
        for mine, exact in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, exact, rtol=0, atol=1e-10 * exact.abs().max().item())
    logged = minillm.metrics()
    assert logged["reverse_kl"] == pytest.approx(divergence.mean().item(), rel=1e-12)
    assert logged["clip_share"] == policy_gradient.is_clipped(ratio, numbers[0], CLIP).double().mean().item() > 0
    assert logged["reward"] == pytest.approx(sum(sample["reward"] for sample in samples) / count)


def test_training_lowers_the_reverse_kl_and_the_teacher_reads_each_rollout_once(tmp_path, monkeypatch):
    """A random student comes nearer to a teacher of a few steps, on tokens that it mostly writes itself."""
    states, read = Teacher.linear_head, []
    monkeypatch.setattr(Teacher, "linear_head", lambda self, batch: read.extend(batch.samples) or states(self, batch))
    stages = {
        "teacher": {"method": "sft", "teacher": None, "optim": {"lr": 1e-2}, "train": {"steps": 40}},
        "student": {"teacher": {"path": "stage:teacher"}, "log": {"every_steps": 8}},
    }
    overrides = "data.dev=null", "data.train_rows=64", "minillm.rollouts=16", "student:train.steps=32"
    run = Run(tmp_path, *overrides, stage="student", stages=stages, **{**SECTIONS, "teacher": None})
    assert run() == 0
    points = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert points[-1]["reverse_kl"] < 0.7 * points[0]["reverse_kl"]
    assert len(read) == 4 * 16  # of the 128 samples that were trained on
    for point in points:
        assert 0 < point["clip_share"] < 1
        assert point["reward"] < 0
    generated = [point for point in points if "generated_length" in point]  # four rounds of 2 epochs of 4 steps
    assert len(generated) == 4
    for point in generated:
        assert 1 <= point["generated_length"] <= 12
        assert point["generated_tokens_per_second"] > 0


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SECTIONS["teacher"]["config"]))
    model.save_pretrained(tmp_path / "teacher")
    quickstart.tokenizer().save_pretrained(tmp_path / "teacher")
    return {"path": str(tmp_path / "teacher")}


@pytest.mark.parametrize("student", [STUDENT, {**GPT2, "vocab_size": 1024}], ids=["llama", "gpt2"])
def test_resumes_to_the_same_bits(tmp_path, teacher, student):
    """In the middle of a round and of a window of the log, after generation in it and before, with plain text."""
    text = tmp_path / "text.txt"
    text.write_text("A text of some words, and then of more. " * 400)
    overrides = f"data.pretrain.path={text}", "train.steps=9", "student.dropout=0"
    sections = {**SECTIONS, "student": {"config": student}, "teacher": teacher}
    undisturbed, run = (Run(tmp_path / name, *overrides, **sections) for name in ("undisturbed", "run"))
    assert undisturbed() == 0
    for steps, more in ((5, []), (2, ["--resume"])):
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, steps, send(signal.SIGTERM))
            assert run(*more) == INTERRUPTED
    state = json.loads(next((run.folder / "checkpoints").glob("*/trainer.json")).read_text())["method"]
    assert len(state["rollouts"]) == 9
    assert run("--resume") == 0
    assert_same(run, undisturbed)


def test_stopped_after_every_step(tmp_path, teacher):
    """Each of two rounds is left and entered again at every place."""
    overrides = "train.steps=8", "checkpoint.every_steps=1", "log.every_steps=1", "train.dtype=float64"
    once, pieces = (Run(tmp_path / name, *overrides, **{**SECTIONS, "teacher": teacher}) for name in ("once", "pieces"))
    assert once() == 0
    for step in range(7):
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, 1, send(signal.SIGTERM))
            assert pieces(*["--resume"] * (step > 0)) == INTERRUPTED
    assert pieces("--resume") == 0
    assert_same(pieces, once)
