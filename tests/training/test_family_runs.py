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
