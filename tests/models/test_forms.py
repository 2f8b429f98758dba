"""How a model's form is chosen: on a small random model of its configuration, before any weights load."""

import pytest
import torch
from transformers import AutoConfig

from abkd_fast.errors import ConfigError
from abkd_fast.losses.arguments import LogitMap
from abkd_fast.models import forms, padded
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


def test_a_model_that_sees_what_follows_is_refused():
    with pytest.raises(ConfigError, match=r"student: a bert model can't be trained: .* not causal"):
        choose("bert")


def test_recurrent_models_are_padded_and_the_reason_is_one_line():
    form = choose("mamba")
    assert form.problem == "only 0 of its 2 kinds of layers use transformers' attention interface"
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
    kinds, small = ({*forms._layer_kinds(x)} for x in (config, forms.small_model(config).config))
    assert len(kinds) == len(small) == 3


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
    assert padded.group_by_length(lengths, 79) == [[1, 2], [4, 3], [5, 0], [6]]


def test_padded_sequences_have_their_own_long_rope():
    """The longest sequence of a group decides for all: a group must not have both kinds."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 16}
    config = AutoConfig.for_model(
        **{**LLAMA, "model_type": "phi3", "pad_token_id": 0, "original_max_position_embeddings": 16},
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors},
    )
    model = padded.PaddedCausalLM(forms.small_model(config), "student")
    assert model.longest_decoded == forms.SPAN
    with torch.no_grad():
        assert model.difference((9, 8, 7))[0] < 1e-5
        model.longest_decoded = None
        assert model.difference((9, 8, 7))[0] > 1e-2
