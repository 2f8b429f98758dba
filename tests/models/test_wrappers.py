"""Multimodal models: the language model alone is trained, and the whole is saved as what it was."""

import json
import pathlib

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from abkd_fast.data import quickstart
from runs import Run

TEXT = {
    "vocab_size": 1024,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 128,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TOKENS = {"image_token_id": 1000, "boi_token_index": 1001, "eoi_token_index": 1002, "image_token_index": 1000}
GEMMA3 = {"model_type": "gemma3", "text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4, **TOKENS}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A multimodal model as it is published: vision in bfloat16, with files for its processor and unknown weights."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**GEMMA3), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors") | {"mtp.fc.weight": torch.randn(3, 3)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    quickstart.tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    return folder


def test_run(tmp_path, published):
    run = Run(tmp_path, student={"path": str(published)}, tokenizer=None)
    assert run() == 0
    print(sorted(p.name for p in (run.folder / "final").iterdir()))
    ours, theirs = run.weights(), load_file(published / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        print(name, ours[name].dtype, theirs[name].dtype, torch.equal(ours[name], theirs[name]))
    print((run.folder / "final" / "config.json").read_text())
