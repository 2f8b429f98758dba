"""Compiled layers: Inductor and Triton compile them for the card. Their kernels are launched, and compute nothing."""

import card
import torch
from small_runs import GROUPED, recorded, sections
from torch._dynamo.utils import counters

from abkd_fast.models.packed import PackedCausalLM
from abkd_fast.training import finite
from abkd_fast.training.metrics import MetricsWindow
from runs import RECIPE, Run

GRAPHS = 2  # student and teacher, each of all its layers and for any number of tokens


def test_one_graph_a_model_for_all_layers_and_steps(tmp_path, monkeypatch):
    recipe = sections("ab", GROUPED, "cuda", steps=3, compile="auto")
    # The dev loss would be one more graph, because it needs no gradients.
    recipe |= {"data": {key: value for key, value in RECIPE["data"].items() if "dev" not in key}, "eval": {}}
    recipe["train"]["on_nonfinite"] = "skip"  # its numbers mean nothing
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(PackedCausalLM, "check", lambda self: None)
    monkeypatch.setattr(MetricsWindow, "describe_nonfinite", lambda self, step, where: "")
    monkeypatch.setattr(finite, "_largest_weight", lambda model: torch.zeros(()))  # its weights neither
    counters.clear()
    with card.watch_waits(), recorded() as steps:
        assert Run(tmp_path / "run", **recipe)() == 0
    assert counters["graph_break"] == {}
    assert counters["stats"]["unique_graphs"] == GRAPHS
    names = [launch.name for launch in card.launches(card.count_launches() - steps.launches[-1])]
    assert sum(name.startswith(b"triton_") for name in names) > 2 * GROUPED["num_hidden_layers"]
    assert steps.waits[-1] == {}  # in the first step Triton measures its kernels
