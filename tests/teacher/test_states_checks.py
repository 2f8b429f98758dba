"""What a build and a run refuse: teachers that are not finite, folders that hold anything, commands that can't be."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_states_folder import build as build
from test_states_folder import recipe as recipe  # fixtures
from test_states_folder import small as small

from abkd_fast import cache
from abkd_fast.config.recipe import load
from abkd_fast.data import quickstart
from abkd_fast.errors import ConfigError
from abkd_fast.training.trainer import Trainer


def change_weight(folder, name, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights[name])
    save_file(weights, path, {"format": "pt"})


def test_a_teacher_that_is_not_finite_is_refused(small, tmp_path, cache_folder, capsys):
    token = quickstart.tokenizer()("k")["input_ids"][0]
    change_weight(tmp_path / "teacher", "model.embed_tokens.weight", lambda w: w[token].fill_(torch.nan))
    assert cache.main(["--config", small]) == 2
    error = capsys.readouterr().err
    assert "error: teacher: teacher has hidden states that are not finite at " in error
    assert "its weights are damaged, or float32 has no room for its numbers" in error
    (line,) = error.splitlines()
    number = int(line.split("rows.jsonl line ")[1].split(":")[0])
    assert "k" in json.dumps(json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[number - 1])), line
    trainer = Trainer(load(small, ["cache.mode=memory", "cache.dir=/dev/null/x"])[0])
    with pytest.raises(ConfigError, match="has hidden states that are not finite at "):
        trainer.build()
