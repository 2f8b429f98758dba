"""student.dropout reaches every dropout of a model, whatever it is called; the teacher's cache leaves dropouts out."""

import pytest
import torch
from transformers import AutoConfig

from abkd_fast.config.models import ModelConfig
from abkd_fast.data.batches import pack
from abkd_fast.errors import ConfigError
from abkd_fast.losses.arguments import LogitMap
from abkd_fast.models import attention, dropout, forms, loading
from abkd_fast.models.identity import describe_model
from conftest import GPT2, LLAMA

CPU = torch.device("cpu")
SIZES = {name: LLAMA[name] for name in ("vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings")}
SMALL = {**SIZES, "num_hidden_layers": 2}
FFN = {**SMALL, "intermediate_size": 48}
FAMILIES = {
    "gpt2": GPT2,
    "gptj": {**GPT2, "rotary_dim": 4, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1},
    "ctrl": {"vocab_size": 211, "n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_bigcode": GPT2,
    "gpt_neo": {**SIZES, "num_heads": 4, "num_layers": 2, "attention_types": [[["global", "local"], 1]]}
    | {"embed_dropout": 0.1, "resid_dropout": 0.1, "attention_dropout": 0.1},
    "gpt_neox": {**FFN, "hidden_dropout": 0.1},
    "starcoder2": {**FFN, "num_key_value_heads": 2, "residual_dropout": 0.1, "embedding_dropout": 0.1},
    "seed_oss": {**FFN, "num_key_value_heads": 2, "head_dim": 8},
    "biogpt": FFN,
    "dbrx": {"vocab_size": 211, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}
    | {
        "attn_config": {"attn_pdrop": 0.1, "kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "emb_pdrop": 0.1,
        "resid_pdrop": 0.1,
    }
    | {"ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 2, "moe_top_k": 1}},
    "opt": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.1},
    "xglm": {"vocab_size": 211, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "layerdrop": 0.1},
    "bloom": {"vocab_size": 211, "hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.1},
    "falcon": {**SMALL, "alibi": True, "attention_dropout": 0.1},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_dropout_is_the_one_that_is_set(monkeypatch, family):
    monkeypatch.setattr(forms, "choose", lambda *_: forms.Form("padded here", LogitMap()))  # of no importance here
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(211, (24,), generator=generator).tolist()
    (batch,) = pack([{"input_ids": ids, "spans": [1, 24]}], 64)

    def differs(rate):
        spec = ModelConfig(config={**FAMILIES[family], "model_type": family}, dropout=rate)
        config = loading.read_meta_model(spec, "student").config
        torch.manual_seed(0)
        model = loading.load(spec, config, "student", torch.float32, CPU).train()
        with torch.no_grad():
            return not torch.equal(model.hidden_states(batch), model.hidden_states(batch))

    assert (differs(None), differs(0.0), differs(0.5)) == (True, False, True)


def test_every_rate_is_set_and_no_other_number():
    config = AutoConfig.for_model(**{**FAMILIES["dbrx"], "model_type": "dbrx"})
    config.update({"classifier_dropout": 0.3, "dropout_threshold": 3, "use_dropout": True, "final_dropout_rate": 0.2})
    dropout.set_rates(config, 0.25, "student")
    values = config.to_dict()
    assert [values[name] for name in ("emb_pdrop", "resid_pdrop", "final_dropout_rate")] == [0.25] * 3
    assert values["attn_config"]["attn_pdrop"] == 0.25
    assert (values["classifier_dropout"], values["dropout_threshold"], values["use_dropout"]) == (0.3, 3, True)
    opt = AutoConfig.for_model(**{**FAMILIES["opt"], "model_type": "opt"})
    dropout.set_rates(opt, 0.25, "student")
    assert (opt.dropout, opt.layerdrop) == (0.25, 0.1)  # no rate of a dropout, but 0 means that nothing is random
    dropout.set_rates(opt, 0.0, "student")
    assert opt.layerdrop == 0


def test_rates_that_transformers_refuses():
    mpt = {"model_type": "mpt", "vocab_size": 211, "d_model": 32, "n_layers": 1, "n_heads": 4, "resid_pdrop": 0.1}
    with pytest.raises(ConfigError, match=r"a mpt model can't have that as attn_pdrop \("):
        loading.read_meta_model(ModelConfig(config=mpt, dropout=0.5), "student")
    config = loading.read_meta_model(ModelConfig(config=mpt, dropout=0.0), "student").config
    assert (config.attn_config.attn_pdrop, config.resid_pdrop) == (0, 0)


def test_modules_that_no_key_decides_are_set_too():
    model = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Dropout(0.0), torch.nn.Dropout1d(0.2))
    dropout.set_modules(model, 0.4)
    assert [module.p for module in model] == [0.4, 0.0, 0.4]


@pytest.mark.parametrize("family", ["dbrx", "starcoder2", "gpt2"])
def test_a_teachers_identity_leaves_dropout_out(family):
    def described(rate):
        config = AutoConfig.for_model(**{**FAMILIES[family], "model_type": family})
        if rate is not None:
            dropout.set_rates(config, rate, "teacher")
        return describe_model(config)

    assert described(None) == described(0.0) == described(0.5)
    if family == "gpt2":  # caches of earlier versions stay valid: these are the names that they left out
        assert not described(None).keys() & {"attn_pdrop", "resid_pdrop", "embd_pdrop"}
        assert described(None)["summary_first_dropout"] == 0.1


@pytest.mark.parametrize(
    ("family", "attentions"),
    [("biogpt", "attention_probs_dropout_prob"), ("gpt2", "attn_pdrop"), ("seed_oss", "attention_dropout")],
)
def test_attention_dropout_of_any_name_is_taken_where_a_gpu_has_none(monkeypatch, caplog, family, attentions):
    monkeypatch.setattr(attention, "supports_dropout", lambda device: False)
    spec = ModelConfig(config={**FAMILIES[family], "model_type": family})
    config = loading.read_meta_model(spec, "student").config
    before = {name: value for name, value in config.to_dict().items() if dropout.RATE.fullmatch(name)}
    model = loading.load(spec, config, "student", torch.float32, CPU)
    after = {name: value for name, value in config.to_dict().items() if dropout.RATE.fullmatch(name)}
    assert model.form == "packed"
    assert before[attentions] == 0.1
    assert after == before | {attentions: 0.0}
    assert [record.message.split(",")[0] for record in caplog.records] == [f"student: {attentions} is 0.1"]


def test_attention_that_is_not_packed_keeps_its_dropout(monkeypatch, caplog):
    monkeypatch.setattr(attention, "supports_dropout", lambda device: False)
    monkeypatch.setattr(forms, "choose", lambda *_: forms.Form("padded here", LogitMap()))
    config = AutoConfig.for_model(**{**LLAMA, "attention_dropout": 0.1})
    loading.load(ModelConfig(config=LLAMA), config, "student", torch.float32, CPU)
    assert (config.attention_dropout, caplog.records) == (0.1, [])
