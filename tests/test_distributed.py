"""Several processes do what one does: the same losses, files and results. If one ends, all of them end."""

import errno
import functools
import json
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import datasets
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from transformers import AutoConfig, AutoModelForCausalLM

import chat
from abkd_fast import cache, distributed, train
from abkd_fast.cli import INTERRUPTED
from abkd_fast.config.recipe import load
from abkd_fast.console import console
from abkd_fast.data import quickstart
from abkd_fast.teacher import store
from abkd_fast.training import checkpoint
from abkd_fast.training.trainer import Trainer
from conftest import LLAMA

MODEL = {**LLAMA, "vocab_size": 1024, "eos_token_id": 0, "bos_token_id": 0}
RECIPE = {
    "tokenizer": "quickstart",
    "student": {"config": {**MODEL, "tie_word_embeddings": True}},
    "data": {"train": "quickstart:small", "train_rows": 40, "dev": "quickstart:dev", "dev_rows": 5, "max_length": 96},
    "sampling": {"max_new_tokens": 8},
    "optim": {"lr": 3e-3, "warmup_steps": 2},
    "train": {"steps": 20, "batch_size": 8, "max_tokens": 192, "device": "cpu", "timeout_minutes": 10},
    "eval": {"every_steps": 10},
    "log": {"every_steps": 1},
}
STAGES = {
    "sft": {"method": "sft", "eval": {"rouge_rows": 1, "max_new_tokens": 8}, "log": {"samples": 3}},
    "ab": {"method": "ab", "data": {"dev_rows": 1}},  # which only one rank has
    "alphanet": {"method": "kd", "loss": "alphanet", "eval": {"every_steps": 20}},
    "gkd": {"method": "gkd", "loss": "jsd:0.1", "on_policy": {"replay_rows": 16}},
    "distillm": {"method": "distillm", "loss": "srkl:0.1", "on_policy": {"replay_rows": 16, "threshold": 0.5}},
    "minillm": {"method": "minillm", "loss": "rkl", "minillm": {"rollouts": 16, "inner_epochs": 2}},
}


def process(environment, log, command, arguments, prepare):
    """One rank. Its output goes to a file, which the parent reads."""
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    datasets.config.HF_DATASETS_CACHE = environment["HF_DATASETS_CACHE"]
    console.quiet = environment["RANK"] != "0"  # the server of these processes has no rank
    if prepare:
        prepare()
    status = command(arguments)
    sys.stdout.flush()
    os._exit(status)  # at once: threads of the test's modules may still run


class Ranks:
    """A command in processes with the environment that torchrun gives them."""

    def __init__(self, context, folder, count, arguments, command=train.main, prepare=None, store=None):
        self.store = store or dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # as in torchrun
        self.logs = [folder / f"rank{rank}.log" for rank in range(count)]
        shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(self.store.port), "WORLD_SIZE": str(count)}
        shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        shared |= {"LOCAL_WORLD_SIZE": str(count), "ABKD_CACHE": os.environ["ABKD_CACHE"]}
        shared |= {"HF_DATASETS_CACHE": str(datasets.config.HF_DATASETS_CACHE)}
        self.processes = []
        for rank, log in enumerate(self.logs):
            environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.processes.append(context.Process(target=process, args=(environment, log, command, arguments, prepare)))
            self.processes[-1].start()

    def wait(self):
        for each in self.processes:
            each.join(500)
            if each.exitcode is None:
                each.kill()
        return [each.exitcode for each in self.processes]

    def output(self):
        return [log.read_text() for log in self.logs]


@pytest.fixture(scope="module")
def context():
    """Starts processes from a server that has imported everything, so that a run begins at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["abkd_fast.pipeline", "torch.utils.tensorboard", "test_distributed"])
    return context


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The model folder of a teacher."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODEL, initializer_range=0.1))
    model.save_pretrained(folder)
    quickstart.tokenizer().save_pretrained(folder)
    model.save_pretrained(folder / "chat")
    chat.write_tokenizer(folder / "chat")
    chat.write_conversations(folder / "chat" / "rows.jsonl", 24)
    return str(folder)


def write_recipe(folder, models, name, stages=None, **sections):
    """Writes a recipe. Returns the arguments that train it."""
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{number} is a number. " * 40}) + "\n" for number in range(16)))
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {number} plus 2?"}) + "\n" for number in range(20)))
    values = {**RECIPE, **sections, "run": {"name": name, "dir": str(folder)}, "teacher": {"path": models}}
    if stages:
        values["stages"] = stages
    path = folder / f"{name}.json"
    recipe = json.dumps(values)
    for name, value in {"TEXT": text, "PROMPTS": prompts, "MODEL": models}.items():
        recipe = recipe.replace(name, str(value))
    path.write_text(recipe)
    return ["--config", str(path)]


@pytest.fixture
def recipe(tmp_path, models):
    return functools.partial(write_recipe, tmp_path, models)


def losses(folder):
    """Kind and step of every logged point, and its loss."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["kind"], line["step"]) for line in lines], [line["loss"] for line in lines]


def assert_same_losses(ours, theirs):
    (steps, values), (expected_steps, expected) = losses(ours), losses(theirs)
    assert steps == expected_steps
    assert values == pytest.approx(expected, rel=1e-5)


# Besides every method: plain text, LoRA with recomputed layers, rows that a stage writes, scores on a test set, rows of
# several turns, rows without responses.
MORE = {
    "text": {"method": "minillm", "loss": "rkl", "minillm": {"rollouts": 16}, "data": {"pretrain": {"path": "TEXT"}}},
    "lora": {
        "method": "ab",
        "student": {"path": "MODEL", "config": None, "lora": {"rank": 4, "dropout": 0}},
        "train": {"gradient_checkpointing": True},
        "cache": {"mode": "off"},
    },
    "answers": {"method": "generate", "student": {"path": "MODEL", "config": None}},
    "seqkd": {"method": "seqkd", "data": {"train": "stage:answers"}, "eval": {"sets": {"dolly": "quickstart:dev"}}},
    "turns": {
        "method": "ab",
        "tokenizer": "MODEL/chat",
        "teacher": {"path": "MODEL/chat"},
        "data": {"train": "MODEL/chat/rows.jsonl", "dev": "MODEL/chat/rows.jsonl"},
    },
    "prompts": {"method": "imitkd", "data": {"train": "PROMPTS"}, "on_policy": {"replay_rows": 16}},
}
EVALUATION = {"seeds": [1, 2], "max_new_tokens": 8, "every_steps": 10}


def sections(steps, mode):
    return {"eval": EVALUATION, "train": {**RECIPE["train"], "steps": steps, "parallel": mode}}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, models):
    """Trains all stages in one process. Returns their folder, and that of the teacher's hidden states."""

    @functools.cache
    def run(steps):
        folder = tmp_path_factory.mktemp("alone")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ABKD_CACHE", str(folder / "cache"))
            patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "datasets"))
            arguments = write_recipe(folder, models, "alone", STAGES | MORE, **sections(steps, "auto"))
            assert train.main(arguments) == 0
        return folder / "alone", folder / "cache"

    return run


SLOW = pytest.mark.slow


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize(("count", "steps"), [(2, 5), pytest.param(2, 20, marks=SLOW), pytest.param(4, 20, marks=SLOW)])
def test_losses_and_files_are_those_of_one_process(context, tmp_path, recipe, alone, cache_folder, count, steps, mode):
    folder, states = alone(steps)
    ranks = Ranks(context, tmp_path, count, recipe("several", STAGES | MORE, **sections(steps, mode)))
    assert ranks.wait() == [0] * count, ranks.output()
    assert all(text == "" for text in ranks.output()[1:]), "only the first says something"
    for stage in [name for name in STAGES | MORE if name != "answers"]:
        assert_same_losses(tmp_path / "several" / stage, folder / stage)
        ours, theirs = tmp_path / "several" / stage / "final", folder / stage / "final"
        assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
        (file,) = theirs.glob("*.safetensors")
        shapes = (
            {name: tensor.shape for name, tensor in load_file(path / file.name).items()} for path in (ours, theirs)
        )
        assert next(shapes) == next(shapes)
    scored = (f"seqkd/eval/Dolly.seed{seed}.jsonl" for seed in (1, 2))
    for file in ("sft/samples.jsonl", "answers/final/answers.jsonl", *scored):
        ours, theirs = ([json.loads(line) for line in (run / file).open()] for run in (tmp_path / "several", folder))
        assert [row["row"] for row in ours] == [row["row"] for row in theirs]
    assert not list((tmp_path / "several").rglob("*.rank*"))
    if mode == "ddp":  # a sharded teacher reads packed samples and rounds differently
        for path in states.glob("*/*.safetensors"):
            assert (cache_folder / path.parent.name / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_likelihoods_are_those_of_one_process(context, tmp_path, recipe, capsys, mode):
    stages = {cache: {"cache": {"mode": cache}} for cache in ("off", "disk")}
    values = {"stages": stages, "method": "kd", "loss": "fkl"}
    values["train"] = {**RECIPE["train"], "steps": 1, "batch_size": 6, "max_tokens": 96, "parallel": mode}
    assert train.main(recipe("alone", **values)) == 0
    ranks = Ranks(context, tmp_path, 3, recipe("several", **values))
    assert ranks.wait() == [0, 0, 0], ranks.output()
    outputs = capsys.readouterr().out, *ranks.output()
    told = [re.findall(r"log-probability .*student (\S+), teacher (\S+)", output) for output in outputs]
    alone, several, *others = told
    assert len(alone) == len(several) == len(stages)
    for ours, theirs in zip(several, alone, strict=True):
        assert [float(number) for number in ours] == pytest.approx([float(number) for number in theirs], abs=2e-3)
    assert others == [[], []]


def tell_memory():
    """After a step each rank prints the bytes of weights, gradients and optimizer state that it holds."""
    step = Trainer.train_step

    def wrapped(self, batch):
        gradients = []

        def note(*_):
            gradients.extend(parameter.grad for parameter in self.student.parameters())

        hook = self.optimizer.register_step_pre_hook(note)
        result = step(self, batch)
        hook.remove()
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        held = [*self.student.parameters(), *gradients, *moments]
        parts = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in held]
        whole = sum(tensor.numel() * tensor.itemsize for tensor in held)
        storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
        own = sum(storages.values())  # gradients share one
        print(f"rank {distributed.rank()} holds {own} of {whole}", flush=True)
        return result

    Trainer.train_step = wrapped


def test_sharded_ranks_hold_their_part(context, tmp_path, recipe):
    arguments = recipe("run", method="sft", train={**RECIPE["train"], "steps": 1, "parallel": "fsdp"})
    ranks = Ranks(context, tmp_path, 2, arguments, prepare=tell_memory)
    assert ranks.wait() == [0, 0], ranks.output()
    for text in ranks.output():
        own, whole = map(int, re.search(r"holds (\d+) of (\d+)", text).groups())
        assert whole > 16 * 50_000
        assert own <= 1.1 * whole / 2


def poison_rank_1():
    """Makes the loss of rank 1 infinite in step 2. The gradients stay as they are."""
    backward = Trainer._backward

    def wrapped(self, *arguments):
        backward(self, *arguments)
        if distributed.rank() == 1 and self.state.step == 2:
            self.shares["loss_method"][-1] += torch.inf

    Trainer._backward = wrapped


def test_loss_that_is_not_finite_on_one_rank_is_skipped_by_all(context, tmp_path, recipe):
    arguments = recipe("run", train={**RECIPE["train"], "steps": 4, "on_nonfinite": "skip"}, method="sft")
    ranks = Ranks(context, tmp_path, 2, arguments, prepare=poison_rank_1)
    assert ranks.wait() == [0, 0], ranks.output()
    points = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [point["skipped_steps"] for point in points if point["kind"] == "train"] == [0, 1, 0, 0]


def full_disk_of_rank_1():
    """The disk of rank 1 is full while it writes its part of the second checkpoint."""
    write = HuggingFaceStorageWriter.write_data

    def wrapped(self, *arguments):
        if "step-000004" in str(self.path) and distributed.rank() == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, *arguments)

    HuggingFaceStorageWriter.write_data = wrapped


def test_full_disk_of_one_rank_costs_a_checkpoint(context, tmp_path, recipe):
    values = {"checkpoint": {"every_steps": 2}, "train": {**RECIPE["train"], "steps": 7, "parallel": "fsdp"}}
    ranks = Ranks(context, tmp_path, 2, recipe("run", method="sft", **values), prepare=full_disk_of_rank_1)
    assert ranks.wait() == [0, 0], ranks.output()
    assert "no checkpoint at step 4 ([Errno 28] No space left on device); training goes on" in ranks.output()[0]
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002", "step-000006"]
    assert len(list((folder / "step-000006" / "optimizer").iterdir())) == 2
    assert all(checkpoint.damage(path) is None for path in folder.iterdir())
    saved = load_file(folder / "step-000006" / "model.safetensors")
    assert {tuple(tensor.shape) for tensor in saved.values()} >= {(1024, MODEL["hidden_size"])}


def wait_for(path, text):
    end = time.monotonic() + 500
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < end, f"no {text} in {path}"
        time.sleep(0.02)


def slow_steps():
    step = Trainer.train_step

    def wrapped(self, batch):
        time.sleep(0.1)
        return step(self, batch)

    Trainer.train_step = wrapped


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=SLOW)])
def test_signal_to_one_rank_and_resume_on_two_and_on_one(context, tmp_path, recipe, mode):
    """All ranks stop after the same step. Resumed on two, the run is the undisturbed one to the bit, with dropout."""
    student = {"config": {**MODEL, "tie_word_embeddings": True, "attention_dropout": 0.2}}
    dropout = {"student": student, "method": "sft", "train": {**RECIPE["train"], "steps": 8, "parallel": mode}}
    undisturbed = Ranks(context, tmp_path, 2, recipe("undisturbed", **dropout))
    assert undisturbed.wait() == [0, 0], undisturbed.output()
    arguments = recipe("stopped", **dropout)
    ranks = Ranks(context, tmp_path, 2, arguments, prepare=slow_steps)
    wait_for(tmp_path / "stopped" / "metrics.jsonl", '"step": 3')
    os.kill(ranks.processes[1].pid, signal.SIGTERM)
    assert ranks.wait() == [INTERRUPTED] * 2, ranks.output()
    assert sum("SIGTERM after step" in text for text in ranks.output()) == 1
    shutil.copytree(tmp_path / "stopped", tmp_path / "alone" / "stopped")
    left = (
        tmp_path / "stopped" / "final.parts.tmp" / "model" / "sharded"
    )  # as if three ranks had died while they wrote it
    left.mkdir(parents=True)
    (left / "shard-00003-model-00001-of-00001.safetensors").write_bytes(b"of another attempt")
    again = Ranks(context, tmp_path, 2, [*arguments, "--resume"])
    assert again.wait() == [0, 0], again.output()
    assert losses(tmp_path / "stopped") == losses(tmp_path / "undisturbed")
    assert not left.exists()
    ours, theirs = (load_file(tmp_path / name / "final/model.safetensors") for name in ("stopped", "undisturbed"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    overrides = ["--set", f"run.dir={tmp_path / 'alone'}", "--resume"]
    assert train.main([*arguments, *overrides]) == 0
    assert losses(tmp_path / "alone" / "stopped")[0] == losses(tmp_path / "undisturbed")[0]


def die_on_rank_1():
    step = Trainer.train_step

    def wrapped(self, batch):
        if self.state.step == 3 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batch)

    Trainer.train_step = wrapped


def test_death_of_a_rank_ends_the_others_with_its_name(context, tmp_path, recipe):
    ranks = Ranks(context, tmp_path, 2, recipe("run", method="sft"), prepare=die_on_rank_1)
    assert ranks.wait() == [1, -signal.SIGKILL]
    assert "rank 0 of 2: error: no answer from rank 1" in ranks.output()[0]


def test_mistakes_are_said_once(context, tmp_path, recipe):
    ranks = Ranks(context, tmp_path, 3, recipe("run", method="sft", train={"batch_size": 2, "device": "cpu"}))
    assert ranks.wait() == [2, 2, 2]
    said = [line for text in ranks.output() for line in text.splitlines() if "error: " in line]
    assert len(said) == 1, said
    assert "train.batch_size is 2, but there are 3 processes" in said[0]


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_others_with_its_name(context, tmp_path, recipe):
    training = {**RECIPE["train"], "timeout_minutes": 0.2}
    ranks = Ranks(context, tmp_path, 2, recipe("run", method="sft", train=training), prepare=slow_steps)
    wait_for(tmp_path / "run" / "metrics.jsonl", '"step": 3')
    os.kill(ranks.processes[1].pid, signal.SIGSTOP)
    stopped = time.monotonic()
    ranks.processes[0].join()
    assert time.monotonic() - stopped < 60
    ranks.processes[1].kill()
    assert ranks.wait() == [1, -signal.SIGKILL]
    assert "rank 0 of 2: error: no answer from rank 1" in ranks.output()[0]


# torchrun starts this: training with a pause in every step, in which a signal arrives.
PAUSED = """
import sys, time
from abkd_fast.train import leave, main
from abkd_fast.training.trainer import Trainer
step = Trainer.train_step
def slow(self, batch):
    time.sleep(0.3)
    return step(self, batch)
Trainer.train_step = slow
leave(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_killed_ranks_are_started_again_by_torchrun(context, tmp_path, recipe, mode):
    """One of two ranks is killed at 10 random moments. The weights at the end are those of an undisturbed run."""
    student = {"config": {**MODEL, "tie_word_embeddings": True, "attention_dropout": 0.2}}
    # After a kill during gloo's connection, the next processes may wait for each other until the timeout.
    training = {**RECIPE["train"], "parallel": mode, "timeout_minutes": 0.5}
    values = {"student": student, "method": "sft", "train": training, "checkpoint": {"every_steps": 2}}
    undisturbed = Ranks(context, tmp_path, 2, recipe("undisturbed", **values))
    assert undisturbed.wait() == [0, 0], undisturbed.output()
    script = tmp_path / "paused.py"
    script.write_text(PAUSED)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=30",
    ]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # torchrun's own choice would round differently
    with (tmp_path / "log").open("w") as log:
        command = [*launcher, str(script), *recipe("killed", **values)]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | threads)
    dice, kills = random.Random(0), 0
    while kills < 10 and process.poll() is None:
        time.sleep(dice.uniform(1, 10))
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if process.poll() is None and len(children) >= 2:
            os.kill(int(dice.choice(children)), signal.SIGKILL)
            kills += 1
    assert process.wait(600) == 0, (tmp_path / "log").read_text()
    assert kills >= 3, "it was over too soon"
    assert losses(tmp_path / "killed") == losses(tmp_path / "undisturbed")
    ours, theirs = (load_file(tmp_path / name / "final/model.safetensors") for name in ("killed", "undisturbed"))
    assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []


def slow_small_blocks():
    store.BLOCK_TOKENS, write = 200, store.HiddenStateStore.write
    store.HiddenStateStore.write = lambda self, *block: time.sleep(0.03) or write(self, *block)


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=SLOW)])
def test_killed_processes_build_states_that_train_without_the_teacher(
    context, tmp_path, models, cache_folder, monkeypatch, kills
):
    monkeypatch.setattr(store, "BLOCK_TOKENS", 200)
    teacher = shutil.copytree(models, tmp_path / "teacher")
    values = {"cache": {"mode": "disk"}, "train": {**RECIPE["train"], "steps": 2}}
    arguments = write_recipe(tmp_path, str(teacher), "run", **values)
    expected = step_losses(load(arguments[1])[0])
    (alone,) = filter(pathlib.Path.is_dir, cache_folder.iterdir())
    shutil.move(alone, tmp_path / "alone")
    moments = random.Random(0)
    for left in reversed(range(kills + 1)):
        ranks = Ranks(context, tmp_path, 2, arguments, cache.main, slow_small_blocks)
        if left:
            wait_for(ranks.logs[0], "computing")
            time.sleep(moments.uniform(0, 0.3))
            for each in ranks.processes:
                each.kill()
        assert ranks.wait() == [0, 0] or left, ranks.output()
    copied = shutil.copytree(alone, tmp_path / "copied")
    for path in (tmp_path / "alone").glob("*.safetensors"):
        assert (copied / path.name).read_bytes() == path.read_bytes()
    shutil.rmtree(teacher)
    shutil.rmtree(cache_folder)
    given = load(arguments[1], ["teacher.path=null", f"teacher.hidden_states={copied}"])[0]
    assert step_losses(given) == expected


def step_losses(config):
    trainer = Trainer(config)
    trainer.build()
    return [trainer.train_step(batch)[0].item() for batch in trainer.batches()]
