"""A long run: memory, threads and open files are flat, the log and the folder of checkpoints bounded."""

import json
import os
import pathlib
import time

import pytest

from chaos import SLOW, WHOLE, Child, Work, account, models, server
from conftest import needs_proc

pytestmark = [*SLOW, needs_proc]


def _look(pid):
    """Anonymous memory in MB, threads and open files of a process; None where it is over."""
    try:
        words = pathlib.Path(f"/proc/{pid}/status").read_text().split()
        numbers = {name: int(words[words.index(f"{name}:") + 1]) for name in ("RssAnon", "Threads")}
        return numbers["RssAnon"] / 1024, numbers["Threads"], len(os.listdir(f"/proc/{pid}/fd"))
    except (OSError, ValueError):
        return None


@pytest.mark.parametrize("kind", ["sft", "ab", "gkd", "minillm"] if WHOLE else ["sft"])
def test_everything_stays_flat(account, server, models, tmp_path, kind):
    steps = 5000 if WHOLE else 60
    often = {"checkpoint.every_steps": steps // 20, "log.every_steps": 10, "eval.every_steps": steps // 10}
    sets = [f"{key}={value}" for key, value in {**often, "train.steps": steps, "optim.lr": 1e-4}.items()]
    work = Work(kind, tmp_path / kind, models, tuple(part for each in sets for part in ("--set", each)))
    folder, seen = work.folder / kind, []
    with account(f"a run of {steps} steps: {kind}") as tries, tries.attempt(kind):
        child = Child(server, work)
        while child.process.is_alive():
            points = folder / "metrics.jsonl"
            if points.exists() and points.read_bytes().count(b"\n") > steps // 100:
                seen.append(_look(child.process.pid))
            time.sleep(0.05)
        seen = [*filter(None, seen)]
        child.end(0)
        early, late = seen[: len(seen) // 4], seen[-len(seen) // 4 :]
        for place, (what, most) in enumerate({"MB": 40, "threads": 3, "open files": 6}.items()):
            before, after = (max(numbers[place] for numbers in some) for some in (early, late))
            assert after <= before + most, f"{what}: {before} early, {after} late"
        kinds = [json.loads(line)["kind"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert (kinds.count("train"), kinds.count("dev")) == (steps // 10, 11)
        assert len([*(folder / "checkpoints").iterdir()]) <= 3
        assert len(child.output().splitlines()) < steps // 10 + 100
