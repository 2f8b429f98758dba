"""A mixture of experts trains on several processes as on one, also where an expert gets no token on a rank."""

import json

import pytest

from abkd_fast import train
from test_distributed import RECIPE, Ranks, context, models, recipe  # noqa: F401 - fixtures

MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 1024,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 32,
    "num_experts_per_tok": 1,
    "initializer_range": 0.3,
    "eos_token_id": 0,
    "bos_token_id": 0,
}
# In passes as short as these, most of its weights that compress keys get no gradient.
DEEPSEEK_V4 = {
    **MIXTRAL,
    "model_type": "deepseek_v4",
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "head_dim": 8,
    "num_hidden_layers": 3,
}


def points(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_are_those_of_one_process(context, tmp_path, recipe, checkpointing):  # noqa: F811
    def arguments(name, factor, parallel):
        training = {"steps": 4, "batch_size": 4, "gradient_checkpointing": checkpointing, "parallel": parallel}
        student = {"config": MIXTRAL, "router_aux_loss": factor}
        return recipe(name, student=student, train={**RECIPE["train"], **training}, eval={"every_steps": 4})

    found = {}
    for factor in (0.0, 0.1):
        assert train.main(arguments(f"alone{factor}", factor, "auto")) == 0
        found["alone", factor] = points(tmp_path / f"alone{factor}")
        for mode in ("ddp", "fsdp"):
            ranks = Ranks(context, tmp_path, 2, arguments(f"{mode}{factor}", factor, mode))
            assert ranks.wait() == [0, 0], ranks.output()
            found[mode, factor] = points(tmp_path / f"{mode}{factor}")
    for mode in ("ddp", "fsdp"):
        same = ("loss", "router_load_max", "router_idle_experts")
        for ours, theirs in zip(found[mode, 0.0], found["alone", 0.0], strict=True):
            assert [ours[name] for name in same] == pytest.approx([theirs[name] for name in same], rel=1e-5)
        # The auxiliary loss is one of parts: the ranks have others than one process. Weights are the same at first.
        ours, theirs = found[mode, 0.1][0], found["alone", 0.1][0]
        assert [ours[name] for name in same] == pytest.approx([theirs[name] for name in same], rel=1e-5)
        assert ours["router_idle_experts"] > 0
        assert ours["loss_router"] == pytest.approx(theirs["loss_router"], rel=0.2)
    for ours, theirs in zip(found["ddp", 0.1], found["fsdp", 0.1], strict=True):
        names = (*same, "loss_router", "grad_norm")
        assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], rel=1e-4)


@pytest.mark.slow
def test_weights_without_a_gradient_are_waited_for_by_no_rank(context, tmp_path, recipe):  # noqa: F811
    training = {"steps": 3, "batch_size": 4, "parallel": "ddp"}
    values = {"train": {**RECIPE["train"], **training}, "student": {"config": DEEPSEEK_V4}, "eval": {"every_steps": 3}}
    assert train.main(recipe("alone", **values)) == 0
    ranks = Ranks(context, tmp_path, 2, recipe("ddp", **values))
    assert ranks.wait() == [0, 0], ranks.output()
    ours, theirs = ([point["loss"] for point in points(tmp_path / name)] for name in ("ddp", "alone"))
    assert ours == pytest.approx(theirs, rel=1e-5)
