"""A small run for tests: its recipe, what it leaves, and ways to disturb it."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from abkd_fast.train import main
from abkd_fast.training.trainer import Trainer
from conftest import LLAMA

SMALL = {**LLAMA, "vocab_size": 1024, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
TIED = {**SMALL, "eos_token_id": 0, "bos_token_id": 0, "tie_word_embeddings": True, "attention_dropout": 0.1}
GPT2 = {"model_type": "gpt2", "vocab_size": 1024, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
RECIPE = {
    "run": {"name": "test"},
    "method": "sft",
    "tokenizer": "quickstart",
    "student": {"config": TIED},
    "data": {"train": "quickstart:small", "train_rows": 20, "dev": "quickstart:dev", "dev_rows": 4, "max_length": 128},
    "optim": {"lr": 3e-3, "warmup_steps": 2},
    "train": {"steps": 12, "batch_size": 4, "max_tokens": 256, "device": "cpu"},  # epochs of 5 steps
    "eval": {"every_steps": 4},
    "log": {"every_steps": 3},
}


class Run:
    """The arguments of a small run, and what it left."""

    def __init__(self, folder, *overrides, stage="", **sections):
        folder.mkdir(exist_ok=True)
        recipe = folder / "recipe.json"
        recipe.write_text(json.dumps({**RECIPE, **sections, "run": {"name": "test", "dir": str(folder)}}))
        self.arguments = ["--config", str(recipe), *(part for override in overrides for part in ("--set", override))]
        self.folder = folder / "test" / stage

    def __call__(self, *more):
        return main([*self.arguments, *more])

    def weights(self):
        return load_file(self.folder / "final" / "model.safetensors")

    def points(self):
        """metrics.jsonl and summary without what is measured."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((self.folder / "summary.json").read_text())
        measured = ("second", "bytes")
        return [
            {key: line[key] for key in line if not any(word in key for word in measured)} for line in [*lines, summary]
        ]

    def checkpoints(self):
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())


def step_and_gradients(trainer, batch):
    """The loss of one step and the gradients that it applied, by name. The weights are then what they were."""
    gradients = {}
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({name: p.grad.clone() for name, p in trainer.student.named_parameters()})
    )
    weights = {name: p.detach().clone() for name, p in trainer.student.named_parameters()}
    value, *_ = trainer.train_step(batch)
    trainer.student.load_state_dict(weights, strict=False)
    return value, gradients


def assert_same(run, undisturbed):
    assert run.points() == undisturbed.points()
    ours, theirs = run.weights(), undisturbed.weights()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


class Killed(BaseException):
    """Ends a run between two lines, as a crash would."""


def at_step(monkeypatch, number, action):
    """Calls `action` after the optimizer's step `number`, counted from 1 in this process."""
    step, count = Trainer.train_step, iter(range(1, 1000))

    def wrapped(self, samples):
        result = step(self, samples)
        if next(count) == number:
            action()
        return result

    monkeypatch.setattr(Trainer, "train_step", wrapped)


def crash():
    raise Killed


def crash_and_resume(run, monkeypatch, step):
    """Ends a run after this step as a crash would, and resumes it."""
    with monkeypatch.context() as patch:
        at_step(patch, step, crash)
        with pytest.raises(Killed):
            run()
    assert run("--resume") == 0


def send(number):
    return lambda: os.kill(os.getpid(), number)


def poison(patch, poisoned):
    """Makes the gradient infinite in one step."""
    step = Trainer.train_step

    def wrapped(self, samples):
        hook = None
        if self.state.step == poisoned:
            hook = next(self.student.parameters()).register_hook(lambda gradient: gradient * torch.inf)
        result = step(self, samples)
        if hook:
            hook.remove()
        return result

    patch.setattr(Trainer, "train_step", wrapped)
