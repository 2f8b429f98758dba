"""Every kind of file, damaged: it is found and said in a line, made again, or used by nobody."""

import json
import random
import re
import shutil

import datasets
import pytest

from abkd_fast import evaluate, report, train
from chaos import (
    DAMAGES,
    SLOW,
    WHOLE,
    Work,
    account,
    assert_same,
    damage,
    models,
    restored,
    said,
)
from runs import Killed, at_step, crash

pytestmark = SLOW


@pytest.fixture
def here(monkeypatch):
    """Lets a work of this process have its caches in its folder."""

    def use(work):
        monkeypatch.setenv("ABKD_CACHE", str(work.folder / "cache"))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(work.folder / "datasets"))
        return work

    return use


def cases(folder, other, short, key):
    """Damages of each kind of file in a folder: all, or in the short form a few. Each with that of another run.

    Of files whose names differ in numbers alone, as those of checkpoints, the last one is taken.
    """
    dice = random.Random(key)
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock"]
    kinds = {re.sub(r"\b[0-9a-f]{32}\b|\d+", "#", str(file)): file for file in files}
    all_of_them = [(file, how) for file in kinds.values() for how in DAMAGES]
    for file, how in all_of_them if WHOLE else dice.sample(all_of_them, short):
        yield file, how, other / file, random.Random(f"{file} {how}")


@pytest.mark.parametrize("kind", ["ab", "minillm", "lora", "stages"] if WHOLE else ["ab"])
def test_files_of_a_run_that_was_killed(account, models, tmp_path, here, capsys, monkeypatch, kind):
    """Its folder, its teacher's cache and its tokenized rows; then it is resumed."""
    whole = here(Work(kind, tmp_path / "whole", models))
    assert train.main(whole.arguments()) == 0
    expected = whole.outcome()
    other = here(Work(kind, tmp_path / "other", models, ("--set", "run.seed=7", "--set", "data.train_rows=19")))
    work = Work(kind, tmp_path / "work", models)
    for each, step in ((other, 4), (work, 5)):
        here(each)
        with monkeypatch.context() as patch:
            at_step(patch, step, crash)
            with pytest.raises(Killed):
                train.main(each.arguments())
    shutil.copytree(work.folder, tmp_path / "copy")
    with account(f"damage, then resume: {kind}") as tries:
        for file, how, twin, dice in cases(tmp_path / "copy", other.folder, 3, f"{kind} 6"):
            with tries.attempt(f"{kind}: {file} {how}"), restored(work.folder, tmp_path / "copy"):
                damage(work.folder / file, how, twin, dice)
                status, text = said(capsys, train.main, work.arguments())
                assert status in (0, 2), text
                if (status == 0 and file.suffix != ".json") or file.name == "manifest.json":
                    assert_same(
                        {name: value for name, value in work.outcome().items() if name != str(file)},
                        {name: value for name, value in expected.items() if name != str(file)},
                    )


def test_files_of_a_finished_run(account, models, tmp_path, here, capsys):
    """It is reported, resumed and evaluated; what others write there stays."""
    works = [here(Work("ab", tmp_path / name, models)) for name in ("work", "other")]
    for number, work in enumerate(works):
        here(work)
        assert train.main([*work.arguments(), "--set", f"run.seed={number}"]) == 0
    work, other = works
    here(work)
    shutil.copytree(work.folder, tmp_path / "copy")
    run = work.folder / "ab"
    scored = ["--data", "x=quickstart:dev", "--rows", "2", "--max-new-tokens", "2", "--out", str(work.folder / "eval")]
    with account("damage of a finished run") as tries:
        for file, how, twin, dice in cases(tmp_path / "copy" / "ab", other.folder / "ab", 2, "finished"):
            with tries.attempt(f"{file} {how}"), restored(work.folder, tmp_path / "copy"):
                damage(run / file, how, twin, dice)
                for main, arguments in (
                    (report.main, [str(run)]),
                    (train.main, [*work.arguments(), "--set", "run.seed=0"]),
                    (evaluate.main, ["--model", str(run / "final"), *scored]),
                ):
                    status, text = said(capsys, main, arguments)
                    assert status in (0, 2), text
                    if main is train.main and status == 0:
                        model = "final/model.safetensors"
                        same = (run / model).read_bytes() == (tmp_path / "copy" / "ab" / model).read_bytes()
                        assert same, "another model is taken for the result"


def test_files_of_an_evaluation(account, models, tmp_path, here, capsys):
    works = [here(Work("evaluate", tmp_path / name, models)) for name in ("work", "other")]
    work, other = works
    for each in works:
        assert evaluate.main([*each.arguments(), "--seeds", *("1" if each is work else "12")]) == 0
    expected, again = work.outcome(), [*work.arguments(), "--seeds", "1", "2"]
    shutil.copytree(work.folder, tmp_path / "copy")
    with account("damage of an evaluation, which then goes on") as tries:
        for file, how, twin, dice in cases(tmp_path / "copy" / "eval", other.folder / "eval", 2, "evaluation"):
            with tries.attempt(f"{file} {how}"), restored(work.folder, tmp_path / "copy"):
                damage(work.folder / "eval" / file, how, twin, dice)
                status, text = said(capsys, evaluate.main, again)
                assert status in (0, 2), text
                if status == 0:
                    json.loads((work.folder / "eval" / "scores.json").read_text())
                    assert expected.keys() <= work.outcome().keys()
