"""Numbers that break arithmetic: a run says so, or ends well. No final/ and no checkpoint ever holds one."""

import itertools
import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from abkd_fast import evaluate, generate, train
from chaos import SLOW, WHOLE, Work, account, models, said

pytestmark = SLOW

NUMBERS = {"nan": float("nan"), "inf": float("inf"), "1e30": 1e30, "3e38": 3e38, "1e-40": 1e-40, "zero": 0.0}
PLACES = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"]
RATES = ["1e6", "1e30", "1e38", "3e38", "1e-45", "0"]


def spoil(source, target, place, number, everywhere):
    """A model folder with a number in one weight, or in all of a tensor."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    weights = load_file(target / "model.safetensors")
    weights[place].view(-1)[slice(None) if everywhere else slice(3, 4)] = number
    save_file(weights, target / "model.safetensors", {"format": "pt"})


def assert_finite(folder):
    for file in folder.rglob("*.safetensors"):
        if {"final", "checkpoints"} & {*file.relative_to(folder).parts}:
            tensors = load_file(file)
            assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point()), f"{file} is not finite"


def spoiled(short):
    """Which weights of whom get which number."""
    all_of_them = [*itertools.product(("student", "teacher"), PLACES, NUMBERS, (True, False))]
    return all_of_them if WHOLE else all_of_them[:: len(all_of_them) // short]


def test_weights(account, models, tmp_path, capsys):
    with account("NaN, inf, 1e30 … in the weights of student or teacher") as tries:
        for number, (role, place, name, everywhere) in enumerate(spoiled(2)):
            how = f"{role}: {place} {'all' if everywhere else 'one'} {name}"
            with tries.attempt(how):
                shutil.copytree(models, tmp_path / str(number))
                spoil(models / role, tmp_path / str(number) / role, place, NUMBERS[name], everywhere)
                work = Work("ab", tmp_path / f"work{number}", tmp_path / str(number))
                student = "--set", f"student.path={tmp_path / str(number) / 'student'}", "--set", "student.config=null"
                status, text = said(capsys, train.main, [*work.arguments(), *student])
                assert status in (0, 1, 2), text
                assert_finite(work.folder)
                if name in ("nan", "inf") and role == "teacher" and status == 0:
                    assert (place, everywhere) == (PLACES[0], False), "only a token that no row has harms nothing"


def test_learning_rates(account, models, tmp_path, capsys):
    with account("learning rates of 0 to 3e38") as tries:
        for rate in RATES if WHOLE else RATES[:1]:
            with tries.attempt(f"optim.lr={rate}"):
                work = Work("sft", tmp_path / rate, models, ("--set", f"optim.lr={rate}", "--set", "optim.min_lr=0"))
                status, text = said(capsys, train.main, work.arguments())
                assert status in (0, 1) or text.startswith("error: --set optim.lr="), text
                assert_finite(work.folder)


def test_a_gradient_of_zero(account, models, tmp_path, capsys):
    """The student is the teacher."""
    with account("a gradient of zero") as tries:
        for loss in ("fkl", "rkl", "ab:0.2,0.7", "tvd", "hellinger", "alphanet:0.2,0.8")[: 6 if WHOLE else 1]:
            with tries.attempt(loss):
                work = Work("ab", tmp_path / loss.replace(":", " "), models)
                sets = [f"student.path={models / 'teacher'}", "student.config=null", f"loss={loss}"]
                options = [part for each in sets for part in ("--set", each)]
                status, text = said(capsys, train.main, [*work.arguments(), *options])
                assert status == 0, text
                assert_finite(work.folder)


def test_answers(account, models, tmp_path, capsys):
    with account("generate and evaluate with NaN, inf, 1e30 … in the weights") as tries:
        for number, (_, place, name, everywhere) in enumerate(spoiled(3)):
            with tries.attempt(f"{place} {'all' if everywhere else 'one'} {name}"):
                root = tmp_path / str(number)
                spoil(models / "student", root / "student", place, NUMBERS[name], everywhere)
                for main, kind in ((generate.main, "generate"), (evaluate.main, "evaluate"))[: 1 + WHOLE]:
                    work = Work(kind, root / kind, root)
                    status, text = said(capsys, main, [*work.arguments(), "--max-new-tokens", "3"])
                    assert status in (0, 1, 2), text


def test_states_of_a_cache_that_are_not_finite(account, models, tmp_path, capsys, monkeypatch):
    """With checksums that fit them."""
    from abkd_fast.teacher import store

    with account("NaN, inf, 1e30 in a cache, with valid checksums") as tries:
        for name in NUMBERS if WHOLE else ("nan",):
            with tries.attempt(name):
                work = Work("ab", tmp_path / name, models)
                monkeypatch.setenv("ABKD_CACHE", str(work.folder / "cache"))
                assert train.main(work.arguments()) == 0
                shutil.rmtree(work.folder / "ab")
                (file,) = (work.folder / "cache").glob("*/states-*.safetensors")
                content = bytearray(file.read_bytes())
                content[-400:] = torch.full((100,), NUMBERS[name]).numpy().tobytes()
                file.write_bytes(content)
                index = json.loads((file.parent / "index.json").read_text())
                shards = store.Shards(file.parent, index["states"]["shards"], index["states"]["width"], torch.float32)
                index["blocks"] = [shards.checksum(number) for number in range(len(index["blocks"]))]
                (file.parent / "index.json").write_text(json.dumps(index))
                status, text = said(capsys, train.main, work.arguments())
                assert status in (0, 1, 2), text
                assert status or name not in ("nan", "inf"), "it trained on them"
                assert_finite(work.folder)
