"""Compiled layers: Inductor and Triton compile them for the card's GPU. Triton's kernels are launched and compute nothing."""

import card
import torch
from small_runs import GROUPED, recorded, sections
from torch._dynamo.utils import counters

from abkd_fast.models.packed import PackedCausalLM
from abkd_fast.training.trainer import Trainer
from runs import Run


def test_one_graph_for_all_layers_and_steps(tmp_path, monkeypatch):
    recipe = sections("ab", GROUPED, "cuda", steps=3, compile="auto")
    recipe["train"]["on_nonfinite"] = "skip"  # its numbers mean nothing
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(PackedCausalLM, "check", lambda self: None)
    monkeypatch.setattr(Trainer, "_describe_nonfinite", lambda self: "")
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    counters.clear()
    with card.watch_waits(), recorded() as steps:
        assert Run(tmp_path / "run", **recipe)() == 0
    assert counters["graph_break"] == {}
    assert counters["stats"]["unique_graphs"] == 1
    names = [launch.name for launch in card.launches(card.count_launches() - steps.launches[-1])]
    assert sum(name.startswith(b"triton_") for name in names) > 2 * GROUPED["num_hidden_layers"]
    assert steps.waits == {}
    print(steps.launches, dict(counters["stats"]), dict(counters["inductor"]))
