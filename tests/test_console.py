"""What a user sees while a command works and the output is no terminal, and on a machine that is busy."""

import itertools
import os
import time

import pytest
import torch

from abkd_fast import console, device
from abkd_fast.console import ProgressBar
from abkd_fast.device import BusyMachine, cpu_quota, limit_threads


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by 4 seconds a look."""
    times = itertools.count(0, 4)
    monkeypatch.setattr(time, "monotonic", lambda: float(next(times)))


def test_a_line_replaces_the_bar_after_ten_seconds_then_less_and_less_often(clock, capsys):
    with ProgressBar("prompts [x]") as bar:
        for _ in bar.track(range(40)):
            pass
    lines = capsys.readouterr().out.splitlines()
    done = [int(line.split()[2].partition("/")[0]) for line in lines]
    assert [line.split("  ")[0] for line in lines] == [f"prompts [x] {number}/40" for number in done]
    pauses = [after - before for before, after in itertools.pairwise([0, *done])]
    assert 2 <= len(done) <= 5
    assert pauses == sorted(pauses)  # the first ones come soon
    assert all("left" in line for line in lines[1:-1])


def test_a_short_wait_prints_nothing(capsys):
    with ProgressBar("prompts") as bar:
        for _ in bar.track(range(40)):
            pass
    assert capsys.readouterr().out == ""


def test_a_terminal_shows_the_bar_alone(clock, monkeypatch, capsys):
    monkeypatch.setattr(console.console, "_force_terminal", True)
    with ProgressBar("prompts") as bar:
        bar.advance(bar.add_task("", total=4), 2)
    assert "prompts 2/4" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "rubbish"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_a_container(tmp_path, files, quota):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == quota


@pytest.mark.parametrize(("quota", "given", "threads"), [(1.5, None, 2), (0.2, None, 1), (64, None, 3), (1.5, "3", 3)])
def test_no_more_threads_than_the_quota_has_cpus(monkeypatch, quota, given, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(device, "cpu_quota", lambda: quota)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        limit_threads()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def waits(monkeypatch):
    """Gives the share of 8 seconds in which other programs have the CPUs, to be changed."""
    share, looks = [0.5], itertools.count()
    monkeypatch.setattr(device, "_seconds_without_cpu", lambda: share[0] * 8 * next(looks))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    return share


def test_a_busy_machine_is_told_once(waits, clock):
    machine = BusyMachine(torch.device("cpu"))
    hints = [machine.hint() for _ in range(4)]
    assert hints[0] is None  # too early to say
    assert "50% of the time; OMP_WAIT_POLICY=PASSIVE" in hints[1]
    assert hints[2:] == [None, None]


@pytest.mark.parametrize("kind", ["idle", "cuda", "set already", "unknown"])
def test_no_hint_without_need(waits, clock, monkeypatch, kind):
    if kind == "idle":
        waits[0] = 0.1
    if kind == "set already":
        monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    if kind == "unknown":
        monkeypatch.setattr(device, "_seconds_without_cpu", lambda: None)
    machine = BusyMachine(torch.device("cuda" if kind == "cuda" else "cpu"))
    assert [machine.hint() for _ in range(4)] == [None] * 4


@pytest.mark.skipif(not os.path.exists("/proc/thread-self/schedstat"), reason="the kernel keeps no schedstat")
def test_the_kernel_is_understood():
    assert device._seconds_without_cpu() >= 0
