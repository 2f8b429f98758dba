"""Kills and signals at random moments: whatever is started again ends with the same bits."""

import random
import signal
import time

import pytest

from chaos import (
    KINDS,
    SLOW,
    TRAINED,
    WHOLE,
    Child,
    Work,
    account,
    assert_same,
    count,
    models,
    server,
    undisturbed,
    wait_for,
)
from test_distributed import Ranks

pytestmark = SLOW


@pytest.mark.parametrize("kind", KINDS if WHOLE else ["ab"])
def test_sigkill(account, server, models, undisturbed, tmp_path, kind):
    expected, seconds = undisturbed(kind)
    with account(f"SIGKILL at a random moment: {kind}") as tries:
        for number in range(count(1, 30)):
            dice = random.Random(f"{kind}{number}")
            with tries.attempt(f"{kind}, seed {number}"):
                work = Work(kind, tmp_path / str(number), models)
                for _ in range(dice.choice((1, 1, 2))):  # twice in a row
                    child = Child(server, work)
                    child.wait(dice.uniform(0.1, seconds))
                    child.kill()
                Child(server, work).end(0)
                assert_same(work.outcome(), expected)


@pytest.mark.parametrize("kind", [*TRAINED] if WHOLE else ["ab"])
def test_sigkill_in_the_last_save(account, server, models, undisturbed, tmp_path, kind):
    expected, _ = undisturbed(kind)
    last = "stages/last" if kind == "stages" else kind
    with account(f"SIGKILL in the last save: {kind}") as tries:
        for number in range(count(1, 5)):
            dice = random.Random(f"last {kind}{number}")
            with tries.attempt(f"{kind}, seed {number}"):
                work = Work(kind, tmp_path / str(number), models)
                child = Child(server, work)
                wait_for(child, (work.folder / last / "final.tmp").exists)
                time.sleep(dice.uniform(0, 0.02))
                child.kill()
                Child(server, work).end(0)
                assert_same(work.outcome(), expected)


@pytest.mark.parametrize("kind", KINDS if WHOLE else ["ab"])
def test_signals(account, server, models, undisturbed, tmp_path, kind):
    """SIGTERM, or Ctrl-C twice."""
    expected, seconds = undisturbed(kind)
    with account(f"SIGTERM, or a second Ctrl-C: {kind}") as tries:
        for number in range(count(2, 6)):
            dice = random.Random(f"signal {kind}{number}")
            with tries.attempt(f"{kind}, seed {number}"):
                work = Work(kind, tmp_path / str(number), models)
                child = Child(server, work)
                wait_for(child, lambda child=child: child.log.exists() and child.output())
                child.wait(dice.uniform(0, seconds))
                if number % 2:
                    child.signal(signal.SIGTERM)
                    child.end(0, 75)
                else:
                    child.signal(signal.SIGINT)
                    child.wait(dice.uniform(0, 0.2))
                    child.signal(signal.SIGINT)
                    assert child.wait() in (0, 75, -signal.SIGINT), child.output()[-600:]
                Child(server, work).end(0)
                assert_same(work.outcome(), expected)


@pytest.mark.skipif(not WHOLE, reason="ABKD_CHAOS=whole")
@pytest.mark.parametrize("kind", ["sft", "ab"])
def test_sigkill_of_one_of_two_ranks(account, server, models, undisturbed, tmp_path, monkeypatch, kind):
    """The other one ends with status 1. Both resumed give what two undisturbed ranks give."""

    def start(work):
        monkeypatch.setenv("ABKD_CACHE", str(work.folder / "cache"))
        return Ranks(server, work.folder, 2, work.arguments())

    whole = Work(kind, tmp_path / "undisturbed", models)
    started = time.perf_counter()
    ranks = start(whole)
    assert ranks.wait() == [0, 0], ranks.output()
    seconds = time.perf_counter() - started
    with account(f"SIGKILL of one of two ranks: {kind}") as tries:
        for number in range(15):
            dice = random.Random(f"ranks {kind}{number}")
            with tries.attempt(f"{kind}, seed {number}"):
                work = Work(kind, tmp_path / str(number), models)
                ranks = start(work)
                time.sleep(dice.uniform(0.3, seconds))
                ranks.processes[number % 2].kill()
                assert ranks.wait()[1 - number % 2] in (0, 1), ranks.output()
                ranks = start(work)
                assert ranks.wait() == [0, 0], ranks.output()
                assert_same(work.outcome(), whole.outcome())
