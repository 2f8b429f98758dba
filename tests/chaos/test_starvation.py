"""Full disks, read-only ones, too few open files, too little memory: nothing is lost, and it goes on afterwards."""

import functools
import os
import pathlib
import random
import resource
import subprocess

import pytest

from abkd_fast.teacher import store
from chaos import (
    SLOW,
    WHOLE,
    Child,
    Work,
    account,
    assert_same,
    models,
    server,
    undisturbed,
)

pytestmark = SLOW

# What runs, and which of its folders lies on the small disk.
PLACES = {
    "run folder": ("ab", "ab"),
    "teacher's cache": ("ab", "cache"),
    "datasets' cache": ("ab", "datasets"),
    "folder of stages": ("stages", "stages"),
    "adapter's run folder": ("lora", "lora"),
    "answers": ("generate", "out"),
    "evaluation": ("evaluate", "eval"),
    "states": ("cache", "cache"),
}
SIZES = (4096, 8192, 20_480, 102_400, 204_800, 307_200, 512_000, 819_200)


@pytest.fixture
def disk():
    """Gives a folder a file system of its own, or changes that. Skips where it is not allowed."""
    mounted = set()

    def mount(folder, **options):
        folder.mkdir(parents=True, exist_ok=True)
        words = [f"{name}={value}" if value is not True else name for name, value in options.items()]
        words += ["remount"] * (folder in mounted)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join(words), "chaos", str(folder)], capture_output=True
        )
        if done.returncode:
            pytest.skip("mounting is not allowed here")
        mounted.add(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _without_margin():
    """In a process: a teacher's cache fills the disk. It would leave 1 GB free, so it would not even begin."""
    store.DISK_MARGIN = 0


@pytest.mark.parametrize("place", PLACES if WHOLE else ["run folder"])
def test_full_and_read_only_disks(account, server, models, undisturbed, tmp_path, disk, place):
    kind, folder = PLACES[place]
    expected, _ = undisturbed(kind)
    with account(f"a full or read-only disk: {place}") as tries:
        for size in (*SIZES, None) if WHOLE else (SIZES[4],):
            with tries.attempt(f"{place}: {size or 'no'} bytes"):
                work = Work(kind, tmp_path / str(size), models)
                options = {"size": size} if size else {"size": "20m", "ro": True}
                disk(work.folder / folder, **options)
                Child(server, work, _without_margin).end()
                disk(work.folder / folder, size="2g", rw=True)
                Child(server, work).end(0)
                assert_same(work.outcome(), expected)


def _limit(kind, number):
    """In a process: sets a limit. That of memory comes on top of what is taken already."""
    if kind == resource.RLIMIT_AS:
        number += int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    if kind == resource.RLIMIT_NOFILE:
        number += len(os.listdir("/proc/self/fd"))
    resource.setrlimit(kind, (number, resource.getrlimit(kind)[1]))


LIMITS = {
    "size of a file": (resource.RLIMIT_FSIZE, (0, 500, 5000, 20_000, 60_000, 150_000)),
    "open files": (resource.RLIMIT_NOFILE, (0, 1, 2, 4, 8, 16, 32)),
    "memory": (resource.RLIMIT_AS, (0, 1 << 20, 1 << 22, 1 << 24, 1 << 25, 1 << 26, 1 << 27, 1 << 28, 1 << 29)),
}


@pytest.mark.parametrize("name", LIMITS if WHOLE else ["open files"])
@pytest.mark.parametrize("kind", ["ab", "stages", "generate", "evaluate", "cache"] if WHOLE else ["sft"])
def test_limits(account, server, models, undisturbed, tmp_path, kind, name):
    expected, _ = undisturbed(kind)
    limit, numbers = LIMITS[name]
    with account(f"too little: {name}, {kind}") as tries:
        for number in numbers if WHOLE else random.Random(name).sample(numbers[2:], 1):
            with tries.attempt(f"{kind}: {name} {number}"):
                work = Work(kind, tmp_path / f"{name} {number}", models)
                Child(server, work, functools.partial(_limit, limit, number)).end()
                Child(server, work).end(0)
                assert_same(work.outcome(), expected)
