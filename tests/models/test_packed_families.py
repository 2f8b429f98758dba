"""Models whose attention has more than windows: packed training and generation against transformers."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from abkd_fast.config.sampling import SamplingParams
from abkd_fast.data.batches import pack
from abkd_fast.generation.sampling import sample
from abkd_fast.losses.fused_linear import fused_linear_cross_entropy
from abkd_fast.models import forms
from abkd_fast.models.packed import PackedCausalLM
from packed_models import samples

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
HALVES = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 21}
FAMILIES = {
    "afmoe": {**EXPERTS, **HALVES, "head_dim": 8, "num_dense_layers": 1},
    "cohere2": {**HALVES, "logit_scale": 0.25},
    "deepseek_v3": {
        **{"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16},
        **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12},
        **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, **EXPERTS},
    },
    "gemma2": {**HALVES, "head_dim": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gpt_oss": {**HALVES, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {
        **{"head_dim": 8, "attention_chunk_size": 8, "no_rope_layers": [1, 0], "floor_scale": 4},
        **{"attn_temperature_tuning": True, "num_local_experts": 2, "intermediate_size_mlp": 24},
    },
    "phi3": {
        **{"original_max_position_embeddings": 21},
        "rope_parameters": {**LONG_ROPE, "long_factor": [2.0, 3.0, 4.0, 5.0], "short_factor": [1.0, 1.1, 1.2, 1.3]},
    },
    "phimoe": {"num_local_experts": 4, "sliding_window": 8},
    "qwen2_moe": {**EXPERTS, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8},
    "stablelm": {},
}
NEEDS = {"gpt_oss": {"sinks"}, "gemma2": {"softcap"}}


def small_config(family, **changes):
    return AutoConfig.for_model(family, **{**SMALL, **FAMILIES.get(family, {}), **changes})


def own_model(config):
    """The transformers model with weights that show what caps, masks and factors do."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=2 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_training_and_generation_equal_transformers(family):
    config = small_config(family)
    form = forms.choose(config, "student")
    assert (form.problem, form.needs) == (None, NEEDS.get(family, set()))
    own = own_model(config)
    model = form.build(copy.deepcopy(own), "student")

    rows = samples([9, 31, 5, 17], vocab=61)  # beyond LongRoPE's length, and below
    (batch,) = pack(rows, max_tokens=64)
    options = {"labels": batch.labels, "reduction": "sum"}
    loss = model(batch, lambda head: fused_linear_cross_entropy(**head.arguments("student"), **options))
    loss.backward()
    expected = 0
    for row in rows:
        ids, (start, end) = torch.tensor([row["input_ids"]]), row["spans"]
        logits = own(ids, use_cache=False).logits[0, start - 1 : end - 1]
        expected += torch.nn.functional.cross_entropy(logits, ids[0, start:end], reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    theirs = dict(own.named_parameters())
    for name, parameter in model.model.named_parameters():
        ours, their = (torch.zeros(1) if x.grad is None else x.grad for x in (parameter, theirs[name]))
        assert (ours - their).norm() <= 1e-3 * their.norm() + 1e-4, name

    prompts = [row["input_ids"] for row in samples([5, 25, 9], vocab=61, seed=1)]
    settings = SamplingParams(max_new_tokens=12, temperature=0)
    responses = sample(model, prompts, settings, [0] * 3, batch_size=2)
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([prompt])
        greedy = own.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert greedy[0, len(prompt) :].tolist() == response


def test_compiled_layers_of_one_kind_share_their_code():
    """What a layer is not told is no matter of its number, by which compiled code would differ."""
    config = small_config("qwen2_moe", num_hidden_layers=4)
    model = PackedCausalLM(AutoModelForCausalLM.from_config(config), "student")
    attentions = [module for module in model.modules() if hasattr(module, "masked_window")]
    assert {module.layer_idx: module.masked_window for module in attentions} == {0: None, 1: 8, 2: 8, 3: 8}
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda module: torch.zeros(1) + (module.masked_window or 0), backend=counter)
    for module in attentions:
        compiled(module)
    assert counter.frame_count == 2


def test_a_window_that_a_family_does_not_know_changes_nothing():
    config = small_config("llama", sliding_window=4)
    assert forms.choose(config, "student").problem is None


def test_generation_is_right_up_to_the_length_at_which_rotations_change():
    lengths = {}
    for family in ("phi3", "stablelm"):
        config = small_config(family)
        lengths[family] = PackedCausalLM(AutoModelForCausalLM.from_config(config), "student").longest_decoded
    assert lengths == {"phi3": 21, "stablelm": None}
