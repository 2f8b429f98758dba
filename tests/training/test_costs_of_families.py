"""The cost of models whose layers differ, that have experts, or that are not packed. `test_families.py` has all."""

import pathlib
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from abkd_fast.config.training import TrainConfig
from abkd_fast.data.batches import pack
from abkd_fast.models import forms, loading
from abkd_fast.training import costs
from abkd_fast.training.shapes import AttentionCost, attention_costs
from packed_models import samples

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
from families import small_config


def cost_of(config):
    return costs.ModelCost(loading.meta_model(config))


def kept_for_backward(config, batch):
    """The bytes that autograd keeps in a real forward pass of a real model."""
    model = forms.choose(config, "student").build(AutoModelForCausalLM.from_config(config), "student").train()
    loading.fuse_activations(model)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        model.hidden_states(batch)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept.values()}
    return sum(size for address, size in storages.items() if address not in weights)


@pytest.mark.parametrize("length", [3, 8, 21])
def test_pairs_within_windows_and_chunks(length):
    places = torch.arange(length)
    distance = places[:, None] - places
    same_chunk = places[:, None] // 8 == places // 8
    windowed = 2 * int(((distance >= 0) & (distance < 8)).sum()) - min(length, 8)
    assert AttentionCost(0, 0, window=8).visible(length) == windowed
    assert AttentionCost(0, 0, chunk=8).visible(length) == 2 * int(((distance >= 0) & same_chunk).sum()) - length
    assert AttentionCost(0, 0).visible(length) == length**2


def test_attention_is_counted_by_layer():
    of_gemma = attention_costs(small_config("gemma3_text"))
    assert {layer.window for layer in of_gemma} == {8, None}
    assert {(layer.work, layer.stored) for layer in of_gemma} == {(4 * 2 * 8, 2 * 2 * 8)}
    of_llama4 = attention_costs(small_config("llama4_text"))
    assert {layer.chunk for layer in of_llama4} == {8, None}
    hybrid = small_config("qwen3_next")
    assert len(attention_costs(hybrid)) == hybrid.layer_types.count("full_attention")
    mamba = cost_of(small_config("mamba"))
    assert (mamba.keys_and_values, mamba.attention_flops([10])) == (0, 0)
    assert mamba.body_flops([10]) > 0
    latent = small_config("deepseek_v3")
    width = latent.qk_nope_head_dim + latent.qk_rope_head_dim + latent.v_head_dim
    assert {layer.work for layer in attention_costs(latent)} == {latent.num_attention_heads * width}
    mixed = attention_costs(small_config("gemma4_text"))  # its heads have another width in some layers
    assert len({layer.work for layer in mixed}) > 1


def test_own_attention_is_taken_from_the_configuration():
    layers = attention_costs(small_config("bloom"))
    assert layers == [AttentionCost(2 * 32, 2 * 32)] * 2


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_experts_work_where_a_token_takes_them(family):
    config = small_config(family)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    student = forms.choose(config, "student").build(model, "student")
    rows = samples([20, 9])
    (batch,) = pack(rows, max_tokens=64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        student(batch, lambda head: (head.hidden @ head.weight.T).sum()).backward()
    cost = cost_of(config)
    expected = counter.get_total_flops() - 3 * cost.attention_flops([20, 9])  # it counts pairs that are not seen, too
    assert costs.StepCost(cost, None, None, False).flops(rows) == pytest.approx(expected, rel=2e-2)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.body < sum(p.numel() for p in model.model.layers.parameters())


@pytest.mark.parametrize("family", ["mixtral", "bloom", "gemma3_text", "qwen3_next"])
def test_activations_are_those_that_autograd_keeps(family):
    """With experts, padded, with several kinds of layers of which some are not run."""
    config = small_config(family)
    (batch,) = pack(samples([24, 20, 9]), max_tokens=64)
    counted = costs.activation_bytes(config, batch, torch.float32, False)
    assert counted == pytest.approx(kept_for_backward(config, batch), rel=1e-2)


def test_activations_are_estimated_where_a_model_reads_values():
    config = small_config("jetmoe")
    (batch,) = pack(samples([24, 20, 9]), max_tokens=64)
    step = costs.StepCost(cost_of(config), None, None, False)
    parts = dict(costs.memory(step, config, batch, TrainConfig(), torch.float32, torch.device("cpu")))
    measured = kept_for_backward(config, batch)
    assert measured / 2 < parts["activations (estimated)"] < 2 * measured
