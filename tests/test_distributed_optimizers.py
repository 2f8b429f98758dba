"""The optimizers on several processes."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from abkd_fast import train
from test_distributed import RECIPE, Ranks, assert_same_losses, context, models, recipe  # noqa: F401 - fixtures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "optim"),
    [
        ("fsdp", {"name": "sgd", "momentum": 0.9}),
        ("fsdp", {"name": "sgd"}),
        ("fsdp", {"name": "adagrad"}),
        ("ddp", {"name": "sgd", "momentum": 0.9}),
        ("ddp", {"name": "adamw8bit"}),
    ],
)
def test_losses_are_those_of_one_process_and_runs_resume(context, tmp_path, recipe, mode, optim):  # noqa: F811
    if optim["name"] == "adamw8bit":
        pytest.importorskip("bitsandbytes")

    def arguments(name, parallel):
        training = {**RECIPE["train"], "steps": 5, "parallel": parallel}
        values = {"method": "sft", "train": training, "optim": {"lr": 3e-3, **optim}}
        return recipe(name, **values, checkpoint={"every_steps": 3})

    assert train.main(arguments("alone", "auto")) == 0
    ranks = Ranks(context, tmp_path, 2, arguments("run", mode))
    assert ranks.wait() == [0, 0], ranks.output()
    assert_same_losses(tmp_path / "run", tmp_path / "alone")

    weights = load_file(tmp_path / "run" / "final" / "model.safetensors")
    shutil.rmtree(tmp_path / "run" / "final")
    ranks = Ranks(context, tmp_path, 2, [*arguments("run", mode), "--resume"])
    assert ranks.wait() == [0, 0], ranks.output()
    assert "step-000003" in ranks.output()[0]
    again = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
