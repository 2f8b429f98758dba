"""Families of transformers' causal language models against transformers itself. `benchmarks/families.py` compares."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
from families import FAMILIES, examine

ALWAYS = [
    "afmoe",
    "bert",
    "bloom",
    "cohere",
    "cohere2",
    "deepseek_v3",
    "falcon",
    "falcon_h1",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "gpt2",
    "gpt_neo",
    "gpt_oss",
    "gptj",
    "granite",
    "granitemoehybrid",
    "jamba",
    "jetmoe",
    "lfm2",
    "llama",
    "llama4_text",
    "mamba",
    "mamba2",
    "minicpm3",
    "mistral",
    "mixtral",
    "mpt",
    "nemotron",
    "nemotron_h",
    "olmo2",
    "olmoe",
    "opt",
    "phi",
    "phi3",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "recurrent_gemma",
    "smollm3",
    "stablelm",
]


def test_there_are_enough_families():
    assert len(FAMILIES) > 150
    assert {*ALWAYS} <= {*FAMILIES}


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in FAMILIES]
)
def test_family_is_right_or_refused(family):
    """Loss, gradients and generation beyond windows equal transformers'; a refusal has one line; a dry run works."""
    found = examine(family)
    assert found.agrees, found
    assert "\n" not in found.reason
    assert bool(found.reason) == (found.form != "packed")
    assert (found.memory > 0) == (found.form != "refused")
