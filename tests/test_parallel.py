"""Several processes do what one does: the same losses, files and results; and all of them end when one does."""

import json
import multiprocessing
import os
import pathlib
import re
import signal
import socket
import sys
import time

import peft
import pytest
import torch
from conftest import LLAMA
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from abkd_fast import evaluate, parallel, tasks, train
from abkd_fast.train import INTERRUPTED
from abkd_fast.trainer import Trainer

MODEL = {**LLAMA, "vocab_size": 1024, "eos_token_id": 0, "bos_token_id": 0}
RECIPE = {
    "tokenizer": "quickstart",
    "student": {"config": {**MODEL, "tie_word_embeddings": True}},
    "data": {"train": "quickstart:small", "train_rows": 40, "dev": "quickstart:dev", "dev_rows": 5, "max_length": 96},
    "sampling": {"max_new_tokens": 8},
    "optim": {"lr": 3e-3, "warmup_steps": 2},
    "train": {"steps": 20, "batch_size": 8, "max_tokens": 192, "device": "cpu", "timeout_minutes": 1},
    "eval": {"every_steps": 10},
    "log": {"every_steps": 1},
}
STAGES = {
    "sft": {"method": "sft", "eval": {"rouge_rows": 3, "max_new_tokens": 8}},
    "ab": {"method": "ab"},
    "gkd": {"method": "gkd", "loss": "jsd:0.1", "on_policy": {"replay_rows": 16}},
    "distillm": {"method": "distillm", "loss": "srkl:0.1", "on_policy": {"replay_rows": 16, "threshold": 0.5}},
    "minillm": {"method": "minillm", "loss": "rkl", "minillm": {"rollouts": 16, "inner_epochs": 2}},
}


def process(environment, log, command, arguments, prepare):
    """Of one rank: what it prints goes to a file, so that the parent can read it."""
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    train_ = sys.modules["abkd_fast.logs"]
    train_.console.quiet = environment["RANK"] != "0"  # decided when it was imported, by the server of these processes
    if prepare:
        prepare()
    status = command(arguments)
    sys.stdout.flush()
    os._exit(status)  # as an exit would, without waiting for what the test's modules left


class Ranks:
    """A command in processes with the environment that torchrun gives them."""

    def __init__(self, context, folder, count, arguments, command=train.main, prepare=None):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.logs = [folder / f"rank{rank}.log" for rank in range(count)]
        shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        kept = ("ABKD_CACHE", "HF_DATASETS_CACHE", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
        shared |= {name: os.environ[name] for name in kept if name in os.environ} | {"LOCAL_WORLD_SIZE": str(count)}
        self.processes = []
        for rank, log in enumerate(self.logs):
            environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.processes.append(context.Process(target=process, args=(environment, log, command, arguments, prepare)))
            self.processes[-1].start()

    def wait(self):
        for each in self.processes:
            each.join(100)
            if each.exitcode is None:
                each.kill()
        return [each.exitcode for each in self.processes]

    def output(self):
        return [log.read_text() for log in self.logs]


@pytest.fixture(scope="module")
def context():
    """Processes from a server that has imported everything once, so that a run begins at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["abkd_fast.stages", "torch.utils.tensorboard", "test_parallel"])
    return context


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A teacher, and a LoRA adapter of it."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODEL, initializer_range=0.1))
    model.save_pretrained(folder)
    tasks.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def recipe(tmp_path, models, write_jsonl):
    def write(name, stages=None, **sections):
        text = write_jsonl([{"text": f"{number} is a number. " * 40} for number in range(16)], "text.jsonl")
        values = {**RECIPE, **sections, "run": {"name": name, "dir": str(tmp_path)}, "teacher": {"path": models}}
        if stages:
            values["stages"] = stages
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(values).replace("TEXT", text).replace("MODEL", models))
        return ["--config", str(path)]

    return write


def losses(folder):
    """Of every step, and of the development set."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["kind"], line["step"]) for line in lines], [line["loss"] for line in lines]


def assert_same_losses(ours, theirs):
    (steps, values), (expected_steps, expected) = losses(ours), losses(theirs)
    assert steps == expected_steps
    assert values == pytest.approx(expected, rel=1e-5)


MORE = {
    "text": {"method": "minillm", "loss": "rkl", "minillm": {"rollouts": 16}, "data": {"pretrain": {"path": "TEXT"}}},
    "lora": {
        "student": {"path": "MODEL", "config": None, "lora": {"rank": 4, "dropout": 0}},
        "train": {"gradient_checkpointing": True},
    },
    "answers": {"method": "generate", "student": {"path": "MODEL", "config": None}},
    "seqkd": {"method": "seqkd", "data": {"train": "stage:answers"}, "eval": {"sets": {"dolly": "quickstart:dev"}}},
}


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_losses_are_those_of_one_process(context, tmp_path, recipe, count):
    """Every method, plain text, LoRA with recomputed layers, generated rows and scores on a test set."""
    short = {name: {"train": {**values.get("train", {}), "steps": 6}} for name, values in MORE.items()}
    stages = STAGES | {name: {**values, **short[name]} for name, values in MORE.items()}
    evaluation = {"seeds": [1, 2], "max_new_tokens": 8, "every_steps": 10}
    ranks = Ranks(context, tmp_path, count, recipe("several", stages, eval=evaluation))
    assert ranks.wait() == [0] * count, ranks.output()
    assert all(text == "" for text in ranks.output()[1:]), "only the first says something"
    assert train.main(recipe("alone", stages, eval=evaluation)) == 0
    for stage, values in stages.items():
        ours, theirs = tmp_path / "several" / stage, tmp_path / "alone" / stage
        if values["method"] != "generate" if "method" in values else True:
            assert_same_losses(ours, theirs)
    for file in ("answers/final/answers.jsonl", "seqkd/eval/Dolly.seed1.jsonl"):
        rows = [(tmp_path / name / file).read_text().splitlines() for name in ("several", "alone")]
        assert len(rows[0]) == len(rows[1])
    assert not list((tmp_path / "several").rglob("*.rank*"))
