"""What README.md shows runs as it stands there."""

import pathlib
import re
import shlex

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from abkd_fast import train
from abkd_fast.config.recipe import load
from abkd_fast.data import quickstart
from runs import GPT2, TIED

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
OWN_RECIPE = README.split("## Your own recipe")[1].split("\n## ")[0]
LONG = {"max_position_embeddings": 1024, "n_positions": 1024}


def block(language):
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", OWN_RECIPE, re.MULTILINE | re.DOTALL)
    return text


def test_the_recipe_and_its_commands(tmp_path, monkeypatch, write_jsonl, capsys):
    for name, values, seed in (("small", TIED | LONG, 1), ("large", GPT2 | LONG, 2)):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).save_pretrained(tmp_path / "models" / name)
        quickstart.tokenizer().save_pretrained(tmp_path / "models" / name)
    (tmp_path / "data").mkdir()
    rows = [{"instruction": f"What is {n} plus 2?", "input": "", "output": f"It is {n + 2}."} for n in range(40)]
    write_jsonl(rows[:32], "data/train.jsonl")
    write_jsonl(rows[32:], "data/dev.jsonl")
    monkeypatch.chdir(tmp_path)
    pathlib.Path("mine.json").write_text(block("json"))
    commands = [shlex.split(line, comments=True) for line in block("sh").splitlines()]
    assert len(commands) == 3
    for number, (python, module_flag, module, *arguments) in enumerate(commands):
        assert (python, module_flag, module) == ("python", "-m", "abkd_fast.train")
        assert not pathlib.Path("runs/mine/final").exists(), "rows are shown, and checked, without training"
        assert train.main(arguments) == 0
        assert ("It is 2." in capsys.readouterr().out) or number
    AutoModelForCausalLM.from_pretrained("runs/mine/final")


@pytest.mark.parametrize("name", sorted({*re.findall(r"`(?:--config )?([\w/]+\.json)`", README)} - {"mine.json"}))
def test_recipes_that_it_names_are_packaged(name):
    load(name)
