"""The processes of a run meet after any restart, compare what they are to do, and end together."""

import datetime
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from abkd_fast import cache, distributed, processes
from abkd_fast.cli import INTERRUPTED
from abkd_fast.config import recipe as recipes
from abkd_fast.errors import ConfigError
from abkd_fast.teacher import store
from abkd_fast.training import prepare
from runs import Run
from test_distributed import RECIPE, Ranks, context, models, recipe, wait_for  # noqa: F401 - fixtures

SHORT = {"method": "sft", "train": {**RECIPE["train"], "steps": 2}}


@pytest.fixture
def differ(monkeypatch):
    """Calls `check_same` as several ranks do, each with its own values."""

    def call(*values):
        sent = []
        monkeypatch.setattr(processes, "world_size", lambda: len(values))
        monkeypatch.setattr(processes, "all_gather_object", lambda item: sent.append(item) or [item])
        for own in values:
            processes.check_same(own)
        monkeypatch.setattr(processes, "all_gather_object", lambda _: sent)
        processes.check_same(values[0])

    return call


def test_ranks_that_differ_are_told_what_differs(differ):
    differ({"a": {"lr": 1e-3, "names": ["x"]}}, {"a": {"lr": 1e-3, "names": ["x"]}})
    with pytest.raises(ConfigError, match=r"differ: a.lr is 0.001 on rank 0, 2, 0.002 on rank 1; start all with one"):
        differ({"a": {"lr": 1e-3}}, {"a": {"lr": 2e-3}}, {"a": {"lr": 1e-3}})
    with pytest.raises(ConfigError, match=r"ab.loss is \"fkl\" on 4 ranks, missing on rank 4"):
        differ(*[{"ab": {"loss": "fkl"}}] * 4, {})
    with pytest.raises(ConfigError, match="and 2 more keys differ") as caught:
        differ(*({str(key): f"{rank}" * 10_000 for key in range(5)} for rank in range(2)))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE is 2 in the environment, without RANK, MASTER_ADDR, MASTER_PORT; start",
        ),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "without MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "many"}, 'WORLD_SIZE is "many" in the environment, expected a number'),
        ({"RANK": "1"}, "RANK is 1 in the environment, but WORLD_SIZE is 1"),
        ({"LOCAL_RANK": ""}, 'LOCAL_RANK is "" in the environment'),
    ],
)
def test_variables_that_do_not_fit_together_are_refused(tmp_path, monkeypatch, capsys, variables, message):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message), processes.process_group():
        pass
    if "RANK" not in variables:
        assert Run(tmp_path)() == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert not Run(tmp_path).folder.exists()


def test_attempts_do_not_meet_in_one_store():
    """Also where what dead processes have left comes first, and where one of an attempt dies before all have come."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def attempt(ranks, seconds=20.0):
        parts = {}

        def join(number):
            client = dist.TCPStore("localhost", server.port, is_master=False)
            try:
                parts[number] = processes.part_of_attempt(client, number, 3, datetime.timedelta(seconds=seconds))
            except RuntimeError as error:
                parts[number] = error

        threads = [threading.Thread(target=join, args=(number,)) for number in ranks]
        for thread in threads:
            thread.start()
            time.sleep(0.15)  # the first one is alone with what the last attempt has left
        for thread in threads:
            thread.join()
        return parts

    for order in ((0, 1, 2), (2, 1, 0)):
        parts = attempt(order)
        parts[0].set("address", "of rank 0")
        assert all(part.check(["address"]) for part in parts.values())
        assert not any(part.check(["address"]) for part in attempt(order).values()), "the part of a dead attempt"
        assert isinstance(attempt((0, 1), seconds=0.4)[0], RuntimeError), "rank 0 waits for all"


def meet(arguments):
    """Joins the others. All die then, unless it is the last attempt."""
    with processes.process_group(0.2):
        distributed.barrier()
        if not arguments:
            os.kill(os.getpid(), signal.SIGKILL)
    return 0


def test_processes_meet_after_others_have_died(context, tmp_path):  # noqa: F811
    first = Ranks(context, tmp_path, 2, [], meet)
    assert first.wait() == [-signal.SIGKILL] * 2
    last = Ranks(context, tmp_path, 2, ["last"], meet, store=first.store)
    assert last.wait() == [0, 0], last.output()


# torchrun starts this: rank 1 dies in its first attempts.
DYING = """
import os, signal, sys
from abkd_fast import distributed, processes
with processes.process_group(0.5):
    distributed.barrier()
    if distributed.rank() and int(os.environ["TORCHELASTIC_RESTART_COUNT"]) < int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    assert processes.is_restarted()
    for _ in range(5):
        distributed.barrier()
os._exit(0)
"""


def torchrun(tmp_path, *options):
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(script), "1"]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_restarts_of_torchrun(tmp_path):
    for _ in range(10):
        assert torchrun(tmp_path, "--standalone", "--nproc-per-node=2", "--max-restarts=1").wait(180) == 0


@pytest.mark.slow
def test_restarts_on_two_machines(tmp_path):
    """Only the torchrun whose process has died counts a restart; all processes know of it."""
    for port in range(29611, 29614):
        options = ("--nnodes=2", "--nproc-per-node=1", "--max-restarts=2", "--rdzv-backend=c10d")
        each = [torchrun(tmp_path, *options, f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=x") for _ in range(2)]
        assert [process.wait(240) for process in each] == [0, 0]


def others_on_rank_1(*more):
    """Rank 1 has other values than the rest."""
    load = recipes.load
    if os.environ["RANK"] == "1":
        recipes.load = lambda path, overrides: load(path, [*overrides, *more])


def one_line(ranks, statuses):
    """Asserts the exit statuses, and that all ranks together have said one line besides the greeting. Returns it."""
    assert ranks.wait() == statuses, ranks.output()
    said = [line for text in ranks.output() for line in text.splitlines()]
    (line,) = [line for line in said if not line.endswith(": loading PyTorch")]
    return line


def test_another_configuration_on_one_rank_ends_all(context, tmp_path, recipe):  # noqa: F811
    others = functools.partial(others_on_rank_1, "optim.lr=0.5", "method=kd")
    line = one_line(Ranks(context, tmp_path, 2, recipe("run", **SHORT), prepare=others), [2, 2])
    assert 'recipe.method is "sft" on rank 0, "kd" on rank 1; recipe.optim.lr is 0.003 on rank 0, 0.5 on rank 1' in line
    assert not (tmp_path / "run").exists()
    mistake = functools.partial(others_on_rank_1, "optim.lr=-1")  # before it has met the others
    line = one_line(Ranks(context, tmp_path, 2, recipe("run", **SHORT), prepare=mistake), [2, 2])
    assert "optim.lr is -1" in line


def another_row_on_rank_1():
    read = prepare.read_train_data
    from abkd_fast.training import trainer

    def wrapped(config, method, tokenizer, vocabulary, prepared):
        rows = prepared.rows[prepare.train_rows(config)]
        if distributed.rank() == 1:
            rows[3].values["output"] = "another"
        return read(config, method, tokenizer, vocabulary, prepared)

    trainer.read_train_data = wrapped


def missing_rows_on_rank_1():
    from abkd_fast import pipeline

    check = pipeline.check_all

    def wrapped(*arguments):
        if distributed.rank() == 1:
            raise ConfigError("data.train: rows.jsonl: no such file")
        return check(*arguments)

    pipeline.check_all = wrapped


@pytest.mark.slow
def test_other_rows_on_one_rank_end_all(context, tmp_path, recipe):  # noqa: F811
    line = one_line(Ranks(context, tmp_path, 2, recipe("run", **SHORT), prepare=another_row_on_rank_1), [2, 2])
    assert "the processes differ: hash of.data.train is " in line
    line = one_line(Ranks(context, tmp_path, 2, recipe("run", **SHORT), prepare=missing_rows_on_rank_1), [2, 2])
    assert line.endswith("error: data.train: rows.jsonl: no such file")


def slow_small_blocks():
    store.BLOCK_TOKENS, write = 200, store.HiddenStateStore.write
    store.HiddenStateStore.write = lambda self, *block: time.sleep(0.2) or write(self, *block)


@pytest.mark.slow
@pytest.mark.parametrize("struck", [(1,), (0, 1)])
def test_signal_while_states_are_built(context, tmp_path, recipe, cache_folder, struck):  # noqa: F811
    """All processes leave with the same status and one line, whether one has the signal or all."""
    arguments = recipe("run", method="kd", cache={"mode": "disk"}, train=SHORT["train"])
    ranks = Ranks(context, tmp_path, 2, arguments, cache.main, slow_small_blocks)
    wait_for(ranks.logs[0], "computing")
    time.sleep(0.5)
    for number in struck:
        os.kill(ranks.processes[number].pid, signal.SIGTERM)
    assert ranks.wait() == [INTERRUPTED] * 2, ranks.output()
    said = "".join(ranks.output())
    assert said.count("interrupted; continue with:\ntorchrun --nproc-per-node 2 -m abkd_fast.cache") == 1
    assert "Traceback" not in said
    assert cache.main(arguments) == 0
    (index,) = pathlib.Path(cache_folder).glob("*/index.json")
    assert None not in json.loads(index.read_text())["blocks"]
