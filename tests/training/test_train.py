import importlib.machinery
import json
import re
import subprocess
import sys
import types

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from abkd_fast.config.recipe import load
from abkd_fast.data import quickstart
from abkd_fast.losses import row_ops
from abkd_fast.losses.divergences import BY_NAME
from abkd_fast.models import loading
from abkd_fast.train import main
from abkd_fast.training.trainer import Trainer
from conftest import LLAMA

STUDENT = {"config": {**LLAMA, "vocab_size": 1024, "eos_token_id": 0, "bos_token_id": 0, "tie_word_embeddings": True}}


@pytest.fixture
def recipe(tmp_path):
    """Writes a small recipe and returns the command's arguments."""

    def write(overrides=(), **sections):
        values = {
            "run": {"name": "test", "dir": str(tmp_path / "runs")},
            "method": "sft",
            "tokenizer": "quickstart",
            "student": STUDENT,
            "data": {"train": "quickstart:small", "dev": "quickstart:dev", "dev_rows": 40, "max_length": 128},
            "optim": {"lr": 3e-3},
            "train": {"steps": 12, "batch_size": 8, "max_tokens": 256, "device": "cpu"},
            "log": {"every_steps": 4},
            **sections,
        }
        path = tmp_path / "recipe.json"
        path.write_text(json.dumps(values))
        return ["--config", str(path), *(part for override in overrides for part in ("--set", override))]

    return write


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_run_folder_and_falling_loss(recipe, tmp_path, capsys):
    assert main(recipe(["train.steps=30"])) == 0
    folder = tmp_path / "runs" / "test"
    assert json.loads((folder / "config.json").read_text())["train"]["steps"] == 30
    points = metrics(folder)
    dev = [point["loss"] for point in points if point["kind"] == "dev"]
    assert dev[-1] < dev[0] - 0.5
    train = [point for point in points if point["kind"] == "train"]
    assert [point["step"] for point in train] == [4, 8, 12, 16, 20, 24, 28, 30]
    for key in ("samples_per_second", "seconds_per_sample", "tokens_per_second", "peak_memory_bytes"):
        assert all(point[key] > 0 for point in train)
    assert any(path.name.startswith("events.out") for path in (folder / "tensorboard").iterdir())
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    ids = tokenizer("Add 1 and 2.", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=4).shape[1] > ids.shape[1]
    assert "attention sdpa loop" in capsys.readouterr().out


def test_stages_distil_and_are_used_again(recipe, tmp_path, capsys):
    stages = {
        "teacher": {"method": "sft"},
        "student": {"method": "ab", "teacher": {"path": "stage:teacher"}, "student": {"config": {"hidden_size": 16}}},
    }
    arguments = recipe(stages=stages)
    assert main(arguments) == 0
    folder = tmp_path / "runs" / "test"
    distilled = [point["loss"] for point in metrics(folder / "student") if point["kind"] == "train"]
    assert distilled[-1] < distilled[0]
    before = (folder / "student" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("is finished already") == 2
    assert (folder / "student" / "metrics.jsonl").read_bytes() == before
    assert main([*arguments, "--set", "optim.lr=1e-3"]) == 2
    assert "optim.lr was 0.003, is 0.001" in capsys.readouterr().err


def test_same_seed_same_bits_and_micro_batches_do_not_matter(recipe):
    def losses(*overrides):
        trainer = Trainer(load(recipe()[1], overrides)[0])
        trainer.build()
        return [trainer.train_step(batch)[0].item() for batch in trainer.batches()]

    first = losses("train.steps=3")
    assert losses("train.steps=3") == first
    assert losses("train.steps=3", "run.seed=11") != first
    # One micro-batch or many: the same mean over all response tokens of the step.
    assert losses("train.steps=3", "train.max_tokens=8192") == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize("loss", [*BY_NAME, "alphanet:0.2,0.8,batch"])
def test_every_divergence_trains(recipe, teacher_folder, loss):
    overrides = [f"loss={loss}", "method=kd", f"teacher.path={teacher_folder()}", "temperature=1.5", "hard_weight=0.1"]
    trainer = Trainer(load(recipe()[1], overrides)[0])
    trainer.build()
    batch = next(trainer.batches())
    losses = [trainer.train_step(batch)[0].item() for _ in range(4)]
    assert losses == sorted(losses, reverse=True), "the loss of the same samples falls at every step"
    assert losses[-1] < 0.95 * losses[0]


def test_only_alphanet_per_batch_depends_on_micro_batches(recipe, teacher_folder):
    teacher, exact = f"teacher.path={teacher_folder(initializer_range=0.2)}", ["train.steps=3", "train.dtype=float64"]

    def trained(loss, max_tokens):
        overrides = ["method=kd", f"loss={loss}", teacher, *exact, f"train.max_tokens={max_tokens}"]
        trainer = Trainer(load(recipe()[1], overrides)[0])
        trainer.build()
        losses = torch.stack([trainer.train_step(batch)[0] for batch in trainer.batches()])
        return losses, torch.cat([parameter.flatten() for parameter in trainer.student.parameters()]).detach()

    losses, weights = trained("alphanet", 128)
    for max_tokens in (256, 8192):
        again = trained("alphanet", max_tokens)
        torch.testing.assert_close(again[0], losses, rtol=1e-10, atol=0)
        torch.testing.assert_close(again[1], weights, rtol=0, atol=1e-8)
    per_batch = [trained("alphanet:0.2,0.8,batch", max_tokens)[0] for max_tokens in (128, 8192)]
    assert ((per_batch[0] - per_batch[1]).abs() > 1e-6 * losses).any()


def test_step_is_the_token_mean_gradient(recipe):
    trainer = Trainer(load(recipe()[1], ["train.dtype=float64", "optim.clip_norm=1e9"])[0])
    trainer.build()
    batch = next(trainer.batches())
    captured = {}
    trainer.optimizer.register_step_pre_hook(
        lambda *_: captured.update({name: p.grad.clone() for name, p in trainer.student.named_parameters()})
    )
    weights = {name: p.detach().clone() for name, p in trainer.student.named_parameters()}
    loss, norm, _ = trainer.train_step(batch)
    trainer.student.load_state_dict(weights, strict=False)

    model = trainer.student.model
    model.set_attn_implementation("sdpa")
    total, tokens = 0.0, 0
    for sample in batch.samples:  # one sample at a time: nothing packed, nothing padded
        ids = torch.tensor(sample["input_ids"])
        start, stop = sample["spans"]
        assert stop == len(ids)
        logits = model(ids[None], use_cache=False).logits[0, start - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, ids[start:], reduction="sum")
        tokens += len(logits)
    model.zero_grad()
    (total / tokens).backward()
    assert loss.item() == pytest.approx((total / tokens).item(), rel=1e-12)
    for name, parameter in trainer.student.named_parameters():
        torch.testing.assert_close(captured[name], parameter.grad, rtol=1e-9, atol=1e-12)
    assert norm.item() == pytest.approx(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())


def test_schedule_and_decay_groups(recipe):
    trainer = Trainer(load(recipe()[1], ["optim.warmup_steps=4", "optim.min_lr=1e-5"])[0])
    trainer.build()
    rates = []
    for _ in range(trainer.data.steps):
        rates.append(trainer.scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.scheduler.step()
    assert rates[0] == 0
    assert max(rates) == rates[4] == pytest.approx(3e-3)
    assert trainer.scheduler.get_last_lr()[0] == pytest.approx(1e-5, rel=1e-3)
    decay, plain = trainer.optimizer.param_groups
    assert decay["weight_decay"] == 0.01
    assert plain["weight_decay"] == 0
    assert {p.dim() for p in plain["params"]} == {1}


def test_non_finite_loss_stops(recipe, capsys):
    assert main(recipe(["optim.lr=1e30", "optim.clip_norm=1e30", "optim.schedule=constant"])) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: step 2: loss ")
    assert "samples quickstart:small row 91, 118, " in error
    assert "there is no checkpoint yet; resume with train.on_nonfinite=skip" in error


@pytest.fixture
def teacher_folder(tmp_path):
    """A tiny random teacher; what differs from the student's tokenizer or vocabulary is up to the test."""

    def make(tokenizer=None, **changes):
        folder = tmp_path / "teacher"
        config = AutoConfig.for_model(**{**STUDENT["config"], **changes})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        (tokenizer or quickstart.tokenizer()).save_pretrained(folder)
        return str(folder)

    return make


def test_padded_teacher_vocabulary_is_fine(recipe, teacher_folder):
    teacher = {"path": teacher_folder(vocab_size=1088)}
    assert main(recipe(["train.steps=2"], method="ab", teacher=teacher)) == 0


def test_model_that_is_not_causal_is_refused(recipe, tmp_path, capsys):
    assert main(recipe(["student.config.model_type=bert"])) == 2
    assert "student: a bert model can't be trained: its logits depend on the tokens" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_existing_run_is_left_alone(recipe, tmp_path, capsys):
    folder = tmp_path / "runs" / "test"
    folder.mkdir(parents=True)
    (folder / "precious").write_text("x")
    assert main(recipe()) == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["precious"]
    stages = {"one": {"method": "sft"}}
    (folder / "one").mkdir()
    assert main(recipe(stages=stages)) == 2
    assert "exists already" in capsys.readouterr().err


def test_missing_recipe_exits_with_2():
    command = [sys.executable, "-m", "abkd_fast.train", "--config", "nowhere.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere.json: no such file")


def test_real_dolly_and_tokenizer(recipe, shared, tmp_path):
    """A wider teacher's distribution is learnt from 12 steps of real data: the dev loss falls."""
    gpt2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 512}
    common = {
        "tokenizer": str(shared / "tokenizers" / "gpt2"),
        "data": {
            "train": str(shared / "data" / "dolly" / "train.jsonl"),
            "dev": str(shared / "data" / "dolly" / "dev.jsonl"),
            "train_rows": 60,
            "dev_rows": 8,
        },
        "train": {"steps": 12, "batch_size": 4, "max_tokens": 1024, "device": "cpu"},
        "log": {"every_steps": 10},
    }
    stages = {
        "teacher": {"method": "sft", "student": {"config": {**gpt2, "n_embd": 96, "n_layer": 2, "n_head": 2}}},
        "student": {
            "method": "ab",
            "teacher": {"path": "stage:teacher"},
            "student": {"config": {**gpt2, "n_embd": 48, "n_layer": 2, "n_head": 2}},
        },
    }
    arguments = recipe(student={"config": gpt2}, stages=stages, **common)
    assert main(arguments) == 0
    folder = tmp_path / "runs" / "test" / "student"
    dev = [point["loss"] for point in metrics(folder) if point["kind"] == "dev"]
    assert dev[-1] < dev[0]
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    ids = AutoTokenizer.from_pretrained(folder / "final")("The moon", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=5).shape[1] > ids.shape[1]


def test_dry_run_tells_and_writes_nothing(recipe, tmp_path, capsys, monkeypatch):
    from abkd_fast.models import loading

    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("weights were loaded"))
    stages = {
        "teacher": {"method": "sft"},
        "student": {"method": "ab", "teacher": {"path": "stage:teacher"}, "student": {"config": {"hidden_size": 16}}},
    }
    assert main([*recipe(stages=stages), "--dry-run"]) == 0
    out = capsys.readouterr().out
    trainer = Trainer(load(recipe()[1])[0])
    lengths = [len(ids) for ids in trainer.data.train_set["input_ids"]]
    assert f"{len(lengths)} rows, {sum(lengths)} tokens an epoch" in out
    assert f"together   mean {sum(lengths) / len(lengths):.1f}, " in out
    assert '"lr"' not in out  # numbers alone
    assert out.count("12 of 8 samples, 75 an epoch, 0.2 epochs") == 2
    assert out.count("memory     about ") == 2
    assert "cache      none: no sample is seen twice" in out
    assert not (tmp_path / "runs").exists()
    assert main([*recipe(stages=stages), "--dry-run", "--verbose"]) == 0
    assert '"lr": 0.003' in capsys.readouterr().out
    assert main([*recipe(["train.epochs=2", "train.steps=null"], stages=stages), "--dry-run"]) == 0
    assert re.search(r"cache {6}\S+ [KMG]?B of teacher's states in \S+, to be computed", capsys.readouterr().out)


def test_a_run_says_that_kernels_are_missing(recipe, capsys, monkeypatch):
    assert main([*recipe(), "--dry-run"]) == 0
    assert "slow" not in capsys.readouterr().out
    missing = {"missing": "_C.so: [no] such file", "cuda": None, "cuda_archs": [], "simd": None, "compiler": None}
    monkeypatch.setattr(row_ops, "build_info", lambda: missing)
    for mode in (["--dry-run"], []):
        assert main([*recipe(), *mode]) == 0
        line = "  slow       the extension can't be imported (_C.so: [no] such file): PyTorch computes "
        assert capsys.readouterr().out.count(line) == 1


def test_one_process_a_run(recipe, tmp_path, capsys):
    from abkd_fast.files import locked

    with locked(tmp_path / "runs" / "test"):
        assert main([*recipe(), "--resume"]) == 2
    assert "another process is at work on this run" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "test").exists(), "nothing was written"
    assert main(recipe()) == 0


def test_full_disk_costs_points_not_the_run(recipe, tmp_path, capsys, monkeypatch):
    from abkd_fast.training import metrics

    enter = metrics.RunLog.__enter__

    def on_full_disk(log):
        enter(log)
        log.file.close()
        log.file = open("/dev/full", "a", buffering=1)  # noqa: SIM115
        return log

    monkeypatch.setattr(metrics.RunLog, "__enter__", on_full_disk)
    assert main(recipe()) == 0
    assert "no log" in capsys.readouterr().out
    assert (tmp_path / "runs" / "test" / "final").exists()


def test_weights_and_biases_where_asked_for(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(recipe(["log.wandb=mine"])) == 2
    assert "wandb is not installed" in capsys.readouterr().err
    monkeypatch.undo()
    calls = []

    class Run:
        id = "known"

        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finished")

    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.init = lambda **options: calls.append(options) or Run()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert main(recipe(["log.wandb=mine"])) == 0
    assert calls[0]["project"] == "mine"
    assert calls[0]["config"]["optim"]["lr"] == 3e-3
    assert calls[-1] == "finished"
    logged = [values["train/loss"] for _, values in calls[1:-1] if "train/loss" in values]
    assert logged == [p["loss"] for p in metrics(tmp_path / "runs" / "test") if p["kind"] == "train"]


def test_points_tell_the_work_done(recipe, tmp_path):
    assert main(recipe()) == 0
    trainer = Trainer(load(recipe()[1], ["run.name=other"])[0])
    cost = trainer.step_cost(cached=False)
    batches = list(trainer.batches())
    points = [point for point in metrics(tmp_path / "runs" / "test") if point["kind"] == "train"]
    flops = sum(cost.flops(batch.samples) for batch in batches[:4])
    seconds = 4 * 8 * points[0]["seconds_per_sample"]
    assert points[0]["tflops_per_second"] * seconds == pytest.approx(flops / 1e12)
    assert points[0]["real_token_share"] == 1.0
    assert points[0]["mfu"] is None, "nobody states a peak for processors"


@pytest.mark.parametrize("wish", ["auto", "off"])
def test_a_gpu_compiles_student_and_teacher_after_their_check(recipe, tmp_path, monkeypatch, wish):
    arguments = recipe(method="ab", teacher=STUDENT)
    trainer = Trainer(load(arguments[1], [f"train.compile={wish}"])[0])
    trainer.device, done = torch.device("cuda"), []
    model = types.SimpleNamespace(
        form="packed",
        can_compile=True,
        check=lambda: done.append("checked"),
        compile=lambda: done.append("compiled"),
        requires_grad_=lambda wish: None,
        modules=list,
    )
    monkeypatch.setattr(loading, "load", lambda *_: model)
    for role in ("student", "teacher"):
        done.clear()
        meta = trainer.student_meta if role == "student" else trainer.teachers.metas["teacher"]
        trainer._load(getattr(trainer.config, role), meta, role)
        assert done == ["checked", "compiled"][: 2 if wish == "auto" else 1]
