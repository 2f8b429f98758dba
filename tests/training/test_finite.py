"""Weights that are not finite: never in a checkpoint or a result, never trained."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from abkd_fast import generate
from abkd_fast.data import quickstart
from runs import TIED, Run

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weights_that_overflow_in_the_optimizer_are_never_saved(tmp_path, capsys, name, on_nonfinite):
    """The gradient and the loss are finite up to the last step, whose weights are not."""
    run = Run(
        tmp_path,
        f"optim.name={name}",
        "optim.lr=1e38",
        "optim.weight_decay=1e4",
        "optim.warmup_steps=0",
        "train.steps=1",
        f"train.on_nonfinite={on_nonfinite}",
    )
    assert run() == 1
    error = capsys.readouterr().err
    assert error.startswith("error: after step 1 weights are not finite: the optimizer's step has overflowed; there is")
    assert error.endswith("begin again with a lower optim.lr\n")
    assert not (run.folder / "final").exists()
    assert not [*run.folder.rglob("*.safetensors")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finite") / "model"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**TIED)).save_pretrained(folder)
    quickstart.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(params=[math.nan, math.inf, -math.inf])
def broken(request, model, tmp_path):
    """A model with one such number, and where it is."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    change(model, folder, lambda weight: weight[3, 2:3].fill_(request.param))
    return folder


def change(model, folder, change_weight):
    tensors = load_file(model / "model.safetensors")
    change_weight(tensors[WEIGHT])
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_model_with_such_weights_is_refused(model, broken, tmp_path, capsys):
    taught = ["method=kd", "loss=fkl", "cache.mode=off"]
    runs = {
        "student": Run(tmp_path, "student.config=null", f"student.path={broken}"),
        "teacher": Run(tmp_path, f"teacher.path={broken}", *taught),
    }
    for key, run in runs.items():
        assert run() == 2
        assert capsys.readouterr().err == f"error: {key}: weights of {WEIGHT} are not finite: get the model again\n"
        assert not (run.folder / "final").exists()
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"instruction": "hi"}) + "\n")
    out = tmp_path / "answers.jsonl"
    assert generate.main(["--model", str(broken), "--data", str(prompts), "--out", str(out), "--device", "cpu"]) == 2
    assert f"error: model: weights of {WEIGHT} are not finite" in capsys.readouterr().err
    assert not out.exists()


def test_logits_that_overflow_are_told_from_wrong_ones(model, tmp_path, capsys):
    folder = tmp_path / "large"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    change(model, folder, lambda weight: weight.fill_(3e38))
    assert Run(tmp_path, "student.config=null", f"student.path={folder}")() == 2
    assert "its logits are not finite, although its weights are" in capsys.readouterr().err
