"""The moves of these tests: what runs, how it is started, disturbed and compared, and the account of all tries.

`ABKD_CHAOS=whole` makes many tries of each kind, otherwise there are a few. The seeds are fixed: a failure is said with
what repeats it. docs/reliability.md has the command, and the table that it prints.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import time

import datasets
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from abkd_fast.cli import INTERRUPTED
from abkd_fast.data import quickstart
from runs import RECIPE, SMALL, TIED

WHOLE = os.environ.get("ABKD_CHAOS") == "whole"
SLOW = [pytest.mark.slow] * WHOLE  # the few tries of the short form are among the fast tests
ENDS = (0, 1, 2, INTERRUPTED)  # the exit statuses of docs/recipes.md
SECONDS = 120  # no command here takes as long


def count(short, whole):
    """How many tries are made."""
    return whole if WHOLE else short


class Account:
    """The tries of one kind. A failed one doesn't end the others; the last line of the test names all."""

    def __init__(self, kind):
        self.kind, self.tries, self.failed = kind, 0, []

    @contextlib.contextmanager
    def attempt(self, how):
        """One try. how: what repeats it."""
        self.tries += 1
        try:
            yield
        except Exception as error:
            self.failed.append(f"{how}: {type(error).__name__}: {' '.join(str(error).split())[:400]}")


@pytest.fixture
def account(record_property):
    """Opens an account; tests/conftest.py prints all in one table."""

    @contextlib.contextmanager
    def opened(kind):
        kept = Account(kind)
        yield kept
        record_property("chaos", [kind, kept.tries, kept.failed])
        assert not kept.failed, "\n".join(kept.failed)

    return opened


# What runs

TEACHER = {"teacher": {"path": "MODELS/teacher"}, "cache": {"mode": "disk"}}
GENERATED = {"sampling": {"max_new_tokens": 4}, "on_policy": {"replay_rows": 4}}
TRAINED = {
    "sft": {},
    "ab": {"method": "ab", **TEACHER},
    "gkd": {"method": "gkd", "loss": "jsd:0.1", **TEACHER, **GENERATED},
    "distillm": {
        "method": "distillm",
        "loss": "srkl:0.1",
        **TEACHER,
        **GENERATED,
        "on_policy": {"replay_rows": 4, "threshold": 0.5},
    },
    "minillm": {
        "method": "minillm",
        "loss": "rkl",
        "teacher": TEACHER["teacher"],
        "sampling": {"max_new_tokens": 4},
        "minillm": {"rollouts": 8},
    },
    "lora": {"student": {"path": "MODELS/student", "lora": {"rank": 2}}},
    "stages": {
        "stages": {
            "first": {"train": {"steps": 3}},
            "rows": {"method": "generate", "student": {"path": "stage:first", "config": None}},
            "last": {"method": "ab", **TEACHER, "data": {"train": "stage:rows"}},
        },
        "sampling": {"max_new_tokens": 4},
    },
}
MODEL = ["--model", "MODELS/student"]
COMMANDS = {
    "cache": ["--config", "HERE/ab.json"],
    "generate": [*MODEL, "--data", "quickstart:dev", "--rows", "6", "--out", "HERE/out/answers.jsonl"],
    "evaluate": [*MODEL, "--data", "x=quickstart:dev", "--rows", "3", "--out", "HERE/eval"],
}
KINDS = [*TRAINED, *COMMANDS]
SHORTER = {
    **RECIPE,
    "data": {**RECIPE["data"], "dev_rows": 2},
    "train": {**RECIPE["train"], "steps": 6},
    "eval": {"every_steps": 3},
    "log": {"every_steps": 1},
    "checkpoint": {"every_steps": 1},
}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of a student and a teacher."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(**{**SMALL, "eos_token_id": 0, "bos_token_id": 0, "initializer_range": 0.1})
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        quickstart.tokenizer().save_pretrained(root / name)
    return root


@dataclasses.dataclass
class Work:
    """A command that works in a folder of its own, with its caches there."""

    kind: str
    folder: pathlib.Path
    models: pathlib.Path
    more: tuple = ()

    def __post_init__(self):
        (self.folder / "out").mkdir(parents=True, exist_ok=True)
        self.command = self.kind if self.kind in COMMANDS else "train"
        for kind, sections in TRAINED.items():
            recipe = {**SHORTER, "student": {"config": TIED}, **sections}
            recipe["run"] = {"name": kind, "dir": str(self.folder)}
            (self.folder / f"{kind}.json").write_text(json.dumps(recipe).replace("MODELS", str(self.models)))

    def arguments(self):
        """Those of the next start: a run that is there is resumed."""
        if self.command == "train":
            resumes = ["--resume"] if (self.folder / self.kind).exists() else []
            return ["--config", str(self.folder / f"{self.kind}.json"), *self.more, *resumes]
        places = {"HERE": str(self.folder), "MODELS": str(self.models)}
        words = COMMANDS[self.command]
        for name, place in places.items():
            words = [word.replace(name, place) for word in words]
        return [*words, *self.more]

    def outcome(self):
        """The content of all that has to be the same bits, without what is measured or names this folder."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            place = path.relative_to(self.folder)
            if not path.is_file() or {"checkpoints", "tensorboard"} & {*place.parts}:
                continue
            if path.name in ("metrics.jsonl", "summary.json"):
                lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
                found[str(place)] = [_unmeasured(json.loads(line)) for line in lines]
            elif path.suffix in (".safetensors", ".jsonl") or path.name == "scores.json":
                found[str(place)] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found


def _unmeasured(values):
    return {key: value for key, value in values.items() if not any(word in key for word in ("second", "bytes"))}


# How it is started, disturbed and compared


def _work(command, arguments, log, folder, prepare):
    """What a process does: its output goes to a file, and its caches are in its folder."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ["ABKD_CACHE"] = f"{folder}/cache"
    datasets.config.HF_DATASETS_CACHE = f"{folder}/datasets"
    torch.set_num_threads(1)
    if prepare:
        prepare()
    status = importlib.import_module(f"abkd_fast.{command}").main(arguments)
    sys.stdout.flush()
    os._exit(status)


@pytest.fixture(scope="session")
def server():
    """Starts processes from one that has imported everything, so that a command begins at once."""
    context = multiprocessing.get_context("forkserver")
    modules = ("cache", "generate", "evaluate", "pipeline", "evaluation.evaluator", "models.lora", "generation.answers")
    context.set_forkserver_preload([*(f"abkd_fast.{name}" for name in modules), "torch.utils.tensorboard", "chaos"])
    return context


class Child:
    """A command in a process of its own."""

    def __init__(self, server, work, prepare=None, log="log"):
        self.log = work.folder.with_name(f"{work.folder.name}.{log}")
        arguments = (work.command, work.arguments(), str(self.log), str(work.folder), prepare)
        self.process = server.Process(target=_work, args=arguments)
        self.process.start()

    def wait(self, seconds=SECONDS):
        """The exit status; None where it still runs."""
        self.process.join(seconds)
        return self.process.exitcode

    def signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def kill(self):
        """SIGKILL. Returns whether it struck a process at work."""
        self.process.kill()
        self.process.join()
        return self.process.exitcode == -signal.SIGKILL

    def output(self):
        return self.log.read_text(errors="replace")

    def end(self, *expected):
        """Waits for the end, which is one of the statuses (of all, if none is given), and said without a traceback."""
        status = self.wait()
        if status is None:
            self.kill()
        text = self.output()
        assert status in (expected or ENDS), f"exit status {status}: {text[-600:]}"
        assert "Traceback" not in text, text[text.index("Traceback") :][-600:]
        assert len(endings(text)) == (status != 0), f"exit status {status}, but it said {endings(text)}"
        return status


@pytest.fixture(scope="session")
def undisturbed(server, models, tmp_path_factory):
    """Gives the outcome of a kind that nothing has disturbed, and its seconds."""
    known = {}

    def outcome(kind):
        if kind not in known:
            work, started = Work(kind, tmp_path_factory.mktemp("undisturbed") / kind, models), time.perf_counter()
            Child(server, work).end(0)
            known[kind] = work.outcome(), time.perf_counter() - started
        return known[kind]

    return outcome


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys(), f"other files: {sorted(ours.keys() ^ theirs.keys())}"
    differing = [name for name in ours if ours[name] != theirs[name]]
    assert not differing, f"other content: {differing}"


def wait_for(child, is_reached):
    """Waits for a moment of a process. False where the process is over before."""
    while child.process.is_alive():
        if is_reached():
            return True
        time.sleep(0.001)
    return False


# Commands in this process


def said(capsys, main, arguments):
    """Runs a command's main as a shell would. Returns its status and what it said, which has to be as is promised."""
    capsys.readouterr()
    try:
        status = main(arguments)
    except SystemExit as end:  # argparse
        status = end.code
    text = capsys.readouterr()
    assert status in ENDS, f"exit status {status}"
    assert "Traceback" not in text.out + text.err
    assert len(endings(text.err)) == (status != 0), f"exit status {status}, but it said {endings(text.err)}"
    return status, text.out + text.err


def endings(text):
    """The lines that say why a command ended early. Those of argparse begin with the command's name."""
    pattern = re.compile(r"(python -m \S+: )?error: |.*; continue with:$")
    return [line for line in text.splitlines() if pattern.match(line)]


def contents(*roots):
    """The content of all files below folders, to see that nothing is overwritten."""
    files = (path for root in roots for path in root.rglob("*") if path.is_file() and path.name != "lock")
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


DAMAGES = ("flipped", "truncated", "emptied", "another's")


def damage(path, how, other, dice):
    """Damages a file. other: the same file of another run; where there is none, random bytes take its place."""
    content = bytearray(path.read_bytes())
    if how == "flipped":
        if content:
            content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    elif how == "truncated":
        content = content[: dice.randrange(len(content))] if content else content
    elif how == "emptied":
        content = b""
    else:
        content = other.read_bytes() if other.is_file() else random.Random(dice.random()).randbytes(100)
    path.write_bytes(content)


@contextlib.contextmanager
def restored(folder, copy):
    """A context for a folder that starts as `copy` is."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(copy, folder, symlinks=True)
    yield
