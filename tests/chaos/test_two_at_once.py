"""Two commands at one place, and files that vanish: one works, the other says so; no result is mixed."""

import random
import shutil

import pytest

from chaos import (
    KINDS,
    SLOW,
    WHOLE,
    Child,
    Work,
    account,
    assert_same,
    count,
    models,
    server,
    undisturbed,
)

pytestmark = SLOW


@pytest.mark.parametrize("kind", KINDS if WHOLE else ["ab"])
def test_the_same_folder(account, server, models, undisturbed, tmp_path, kind):
    """One of both is done, or both one after the other; the result is that of one."""
    expected, seconds = undisturbed(kind)
    with account(f"two at once in one folder: {kind}") as tries:
        for number in range(count(1, 12)):
            dice = random.Random(f"two {kind}{number}")
            with tries.attempt(f"{kind}, seed {number}"):
                work = Work(kind, tmp_path / str(number), models)
                first = Child(server, work)
                first.wait(dice.choice((0, dice.uniform(0, seconds))))
                second = Child(server, work, log="second")
                statuses = first.end(0, 2), second.end(0, 2)
                assert 0 in statuses, first.output()[-300:] + second.output()[-300:]
                assert_same(work.outcome(), expected)


@pytest.mark.skipif(not WHOLE, reason="ABKD_CHAOS=whole")
def test_the_same_cache(account, server, models, undisturbed, tmp_path):
    """Runs of one teacher build its states together; one that builds is killed at times."""
    expected, seconds = undisturbed("ab")
    with account("one cache for three runs, the first killed") as tries:
        for number in range(20):
            dice = random.Random(f"cache {number}")
            with tries.attempt(f"seed {number}"):
                work = Work("ab", tmp_path / str(number), models)
                for name in ("b", "c"):
                    (tmp_path / str(number) / name).mkdir()
                sets = [("--set", f"run.dir={work.folder / name}") for name in ("b", "c")]
                killed = Child(server, work)
                others = [
                    Child(server, Work("ab", work.folder, models, more), log=more[1].replace("/", " ")) for more in sets
                ]
                killed.wait(dice.uniform(0, seconds))
                killed.kill()
                for other in others:
                    other.end(0)
                Child(server, work).end(0)
                for name in ("ab", "b/ab", "c/ab"):
                    theirs = {k.removeprefix("ab"): v for k, v in expected.items() if k.startswith("ab/")}
                    ours = {k.removeprefix(name): v for k, v in work.outcome().items() if k.startswith(f"{name}/")}
                    assert_same(ours, theirs)


@pytest.mark.parametrize("kind", KINDS if WHOLE else ["ab"])
def test_files_that_vanish(account, server, models, tmp_path, undisturbed, kind):
    """The command ends, with or without them; afterwards it is done, in another folder at the latest."""
    _, seconds = undisturbed(kind)
    with account(f"files and folders vanish while it runs: {kind}") as tries:
        for number in range(count(1, 20)):
            dice = random.Random(f"vanish {kind}{number}")
            with tries.attempt(f"{kind}, seed {number}"):
                work = Work(kind, tmp_path / str(number), models)
                child = Child(server, work)
                child.wait(dice.uniform(0.2, seconds))
                recipes = [*work.folder.glob("*.json")]
                there = [path for path in sorted(work.folder.rglob("*")) if path not in recipes]
                for path in dice.sample(there, min(len(there), 3)):
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                child.end()
                Child(server, work).end(0, 2)
