"""How a model's form is chosen: on a small random model of its configuration, before any weights load."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from abkd_fast.errors import ConfigError
from abkd_fast.losses.arguments import LogitMap
from abkd_fast.models import attention, forms, padded
from conftest import LLAMA


def choose(model_type, **changes):
    return forms.choose(AutoConfig.for_model(**{**LLAMA, "model_type": model_type, **changes}), "student")


def test_packed_models():
    for model_type in ("llama", "qwen2", "mistral", "stablelm", "nemotron"):
        assert choose(model_type).problem is None


@pytest.mark.parametrize(
    ("model_type", "changes", "logit_map"),
    [
        ("cohere", {"logit_scale": 0.0625}, LogitMap(0.0625)),
        ("granite", {"logits_scaling": 8.0}, LogitMap(0.125)),  # a divisor
        ("hyperclovax", {"logits_scaling": 8.0, "head_dim": 8}, LogitMap(8.0)),  # the same name, a factor
        ("gemma2", {"head_dim": 8}, LogitMap(1.0, 30.0)),
        ("gemma3_text", {"head_dim": 8, "final_logit_softcapping": 30.0}, LogitMap(1.0, 30.0)),
        ("nanochat", {}, LogitMap(1.0, 15.0)),
    ],
)
def test_what_follows_the_projection_is_found(model_type, changes, logit_map):
    """Also a cap that is far above the logits of a model at its beginning."""
    assert choose(model_type, **changes).logit_map == logit_map


def test_unknown_maps_of_logits_are_refused(monkeypatch):
    config = AutoConfig.for_model(**{**LLAMA, "model_type": "granite", "logits_scaling": 8.0})
    model = forms.small_model(config)
    assert forms.find_logit_map(model) == LogitMap(0.125)
    model.config.logits_scaling = 7.0
    monkeypatch.setattr(forms, "LOGIT_NAMES", forms.re.compile("nothing"))
    with pytest.raises(ValueError, match="not its output projection's products"):
        forms.find_logit_map(model)


def test_small_models_without_finite_logits_say_so(monkeypatch):
    nothing = torch.full((1, 2, 3), torch.nan)
    monkeypatch.setattr(forms, "_products_and_logits", lambda model: (nothing, nothing))
    with pytest.raises(ValueError, match="are not finite"):
        forms.small_model(AutoConfig.for_model(**LLAMA))


def test_what_hinders_a_small_model_is_told_before_the_size_of_a_large_one(monkeypatch):
    def hinder(config):
        raise ValueError("hindered")

    monkeypatch.setattr(forms, "_shrink_layers", hinder)
    monkeypatch.setattr(forms, "MOST_WEIGHTS", 1)
    with pytest.raises(ValueError, match="hindered"):
        forms.small_model(AutoConfig.for_model(**LLAMA))


def test_a_model_that_sees_what_follows_is_refused():
    with pytest.raises(ConfigError, match=r"student: a bert model can't be trained: .* not causal"):
        choose("bert")


def test_recurrent_models_are_padded_and_the_reason_is_one_line():
    form = choose("mamba")
    assert form.problem == "not all of its layers use transformers' attention interface"
    assert "\n" not in form.problem


def test_windows_beyond_short_rows_are_seen():
    """Windows of 4,096 tokens and layers that have them late are in the small model, too."""
    shape = {**LLAMA, "model_type": "qwen2", "num_hidden_layers": 12, "max_position_embeddings": 8192}
    config = AutoConfig.for_model(**shape, use_sliding_window=True, sliding_window=4096, max_window_layers=9)
    small = forms.small_model(config).config
    assert small.layer_types == ["full_attention", "sliding_attention"]
    assert small.sliding_window == forms.SPAN < min(forms.LENGTHS[:2])


def test_every_kind_of_layer_is_in_the_small_model():
    config = AutoConfig.for_model(
        "jamba", hidden_size=32, intermediate_size=48, num_hidden_layers=16, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=97, attn_layer_period=8, attn_layer_offset=5, expert_layer_period=2,
    )  # fmt: skip
    kinds, small = ({*forms._layer_kinds(x, [])} for x in (config, forms.small_model(config).config))
    assert len(kinds) == len(small) == 3


def test_a_convolution_that_multipliers_damp_is_not_packed():
    """Falcon-H1-34B's. The logits of its small model hardly show what its state keeps of the sequence before."""
    multipliers = {"ssm_in_multiplier": 0.25, "ssm_out_multiplier": 0.001, "key_multiplier": 0.011}
    mamba = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64}
    config = AutoConfig.for_model(**{**LLAMA, "model_type": "falcon_h1", **mamba, **multipliers})
    assert forms.choose(config, "student").problem == (
        "its layers have convolutions, which read on from one sequence into the next"
    )


def test_a_missing_soft_cap_of_gemma_2_is_seen(monkeypatch):
    read = attention.read_settings
    monkeypatch.setattr(attention, "read_settings", lambda *given: read(*given)._replace(softcap=None))
    config = AutoConfig.for_model(
        "gemma2", hidden_size=3584, intermediate_size=64, num_hidden_layers=42, num_attention_heads=16,
        num_key_value_heads=8, head_dim=256, vocab_size=256, query_pre_attn_scalar=256,
    )  # fmt: skip
    assert forms.choose(config, "student").problem.startswith("its logits differ from its own by")


def test_layers_that_share_keys_and_values_make_a_small_model():
    """As the last 20 of Gemma 4 E2B's 35 layers do."""
    kinds = (["sliding_attention"] * 4 + ["full_attention"]) * 3
    config = AutoConfig.for_model(
        "gemma4_text", hidden_size=1536, intermediate_size=6144, num_hidden_layers=15, num_attention_heads=8,
        num_key_value_heads=1, num_kv_shared_layers=5, use_double_wide_mlp=True, layer_types=kinds,
    )  # fmt: skip
    small = forms.small_model(config)
    assert sum(p.numel() for p in small.parameters()) < 2**24
    assert forms.choose(config, "student").problem is None


def test_falcons_groups_of_heads_stay_and_their_number_shrinks():
    shape = {"hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128, "num_kv_heads": 8}
    small = forms.small_model(AutoConfig.for_model("falcon", new_decoder_architecture=True, **shape))
    assert sum(p.numel() for p in small.parameters()) < 2**25
    assert (small.config.num_attention_heads, small.config.num_kv_heads) == (32, 2)


def test_lists_that_are_as_long_as_the_small_model_by_chance_are_no_lists_by_layer():
    """Granite 4 has a pair of limits, and its small model two layers."""
    config = AutoConfig.for_model(
        "granitemoehybrid", hidden_size=32, intermediate_size=48, num_hidden_layers=12, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=97, mamba_n_heads=8, mamba_d_head=8, num_local_experts=4,
        layer_types=["linear_attention"] * 5 + ["full_attention"] + ["linear_attention"] * 6,
    )  # fmt: skip
    assert forms.small_model(config).config.num_hidden_layers == 2


def test_large_configurations_are_tried_on_small_models():
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    config = AutoConfig.for_model("llama", num_attention_heads=64, num_key_value_heads=8, **shape)
    small = forms.small_model(config)
    assert sum(p.numel() for p in small.parameters()) < 2**24
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (16, 2)


def test_choosing_changes_no_random_numbers_and_no_configuration():
    config = AutoConfig.for_model(**{**LLAMA, "rms_norm_eps": 3e-5})
    before, state = config.to_dict(), torch.get_rng_state()
    forms.choose(config, "student")
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_groups_of_similar_length():
    lengths = [5, 100, 80, 74, 75, 6, 1]
    groups = padded.group_by_length(lengths)
    assert groups == [[1, 2, 4], [3], [5, 0], [6]]
    assert padded.padded_tokens(lengths) == 300 + 74 + 12 + 1


def test_groups_end_at_the_border_of_long_rope():
    """Beyond it all keys of a group are rotated in another way, also those of shorter sequences."""
    assert padded.group_by_length([21, 20, 25, 19], border=20) == [[2, 0], [1, 3]]
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 20}
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    config = AutoConfig.for_model(
        **{**LLAMA, "model_type": "lfm2"}, rope_parameters=rope | factors,
        layer_types=["conv", "full_attention", "conv"],
    )  # fmt: skip
    student = forms.choose(config, "student").build(AutoModelForCausalLM.from_config(config).eval(), "student")
    assert (student.form, student.longest_decoded) == ("padded", 20)
    with torch.no_grad():
        assert student.difference((22, 20, 19))[0] < 1e-5
