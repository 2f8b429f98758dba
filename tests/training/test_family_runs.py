"""Whole runs of small models of many families: final/ has transformers' loss, resuming is exact, final/ writes."""

import json
import pathlib
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from abkd_fast.config.sampling import SamplingParams
from abkd_fast.config.schema import DataConfig
from abkd_fast.data import quickstart
from abkd_fast.data.rows import read_rows
from abkd_fast.data.tokenize import tokenize
from abkd_fast.generation.sampling import sample
from runs import Run, assert_same, crash_and_resume

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
from families import own_loss, small_config

ALWAYS = "gpt_oss", "qwen3_next"
# The families that people ask for most and that once were refused or wrong.
FAMILIES = sorted(
    {
        *("gpt_oss", "gemma2", "granite", "cohere", "cohere2", "minicpm3", "stablelm", "nemotron", "afmoe", "jetmoe"),
        *("llama4_text", "gemma4_text", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_text", "olmo_hybrid", "lfm2"),
        *("granitemoehybrid", "nemotron_h", "falcon_h1", "jamba", "mamba", "falcon", "bloom", "mpt", "gpt_neo"),
    }
)


def run_of(folder, family):
    config = small_config(family).to_dict()
    config |= {"vocab_size": 1024, "vocab_size_per_layer_input": 1024, "architectures": None, "dtype": None}
    config = {name: value for name, value in config.items() if value is not None}
    steps = ("train.steps=4", "eval.every_steps=2", "checkpoint.every_steps=2", "student.dropout=0")
    return Run(folder, *steps, student={"config": config})


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in FAMILIES]
)
def test_family_trains_resumes_and_writes(family, tmp_path, monkeypatch):
    whole, resumed = run_of(tmp_path / "whole", family), run_of(tmp_path / "resumed", family)
    assert whole() == 0
    crash_and_resume(resumed, monkeypatch, 3)
    assert_same(resumed, whole)

    final, tokenizer = whole.folder / "final", quickstart.tokenizer()
    model = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32, attn_implementation="eager").eval()
    samples = list(tokenize(read_rows("quickstart:dev", 4), tokenizer, 128, DataConfig.max_prompt_length).dataset)
    labels = sum(stop - start for start, stop in (sample["spans"] for sample in samples))
    with torch.no_grad():
        loss = sum(own_loss(model, sample).item() for sample in samples) / labels
    summary = json.loads((whole.folder / "summary.json").read_text())
    assert abs(loss - summary["dev_loss"]) < 1e-4
    prompt = samples[0]["input_ids"][: samples[0]["spans"][0]]
    assert len(sample(model, [prompt], SamplingParams(max_new_tokens=4, min_new_tokens=4), [0])[0]) == 4


def config_of(kind, **values):
    sizes = {"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 256}
    return {"model_type": kind, **sizes, "num_hidden_layers": 2, "num_attention_heads": 2, **values}


CHECKPOINTING = "train.gradient_checkpointing=true"
UNUSUAL = {  # configuration, a value of the recipe, exit status
    "padding token": (config_of("gpt2", pad_token_id=3), "train.max_tokens=256", 0),
    "experts": (config_of("mixtral", num_local_experts=4, num_key_value_heads=2), CHECKPOINTING, 0),
    "no layers": (config_of("llama", num_hidden_layers=0), CHECKPOINTING, 0),
    "no checkpointing": (config_of("ctrl", n_embd=32, n_head=2, n_layer=2, dff=48), CHECKPOINTING, 2),
    "not causal": (config_of("bert"), "train.max_tokens=256", 2),
    "heads that don't divide": (config_of("llama", num_key_value_heads=3), "train.max_tokens=256", 2),
    "unknown activation": (config_of("llama", hidden_act="none"), "train.max_tokens=256", 2),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_dry_run_accepts_what_the_run_accepts(name, tmp_path, capsys):
    config, override, status = UNUSUAL[name]
    run = Run(tmp_path, override, "train.steps=1", "eval.every_steps=9", student={"config": config})
    errors = []
    for flag in (["--dry-run"], []):
        assert run(*flag) == status
        errors.append(capsys.readouterr().err)
    assert errors[0] == errors[1]
    assert errors[0].count("error: ") == (status != 0)
