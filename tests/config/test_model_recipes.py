"""The packaged recipes for today's models: their values, dry runs on the models' true shapes, and small runs."""

import functools
import importlib
import json
import pathlib
import sys

import pytest

import chat
from abkd_fast.config.recipe import load, packaged_recipes
from abkd_fast.losses.arguments import LogitMap
from abkd_fast.models import forms
from abkd_fast.train import main

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
from public_models import SHAPES

PAIRS = {
    "qwen3": ("Qwen/Qwen3-0.6B-Base", "Qwen/Qwen3-8B"),
    "llama3": ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B-Instruct"),
    "gemma3": ("google/gemma-3-1b-pt", "google/gemma-3-12b-it"),
    "smollm": ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-1.7B-Instruct"),
}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
METHODS = ("ab", "sft", "gkd", "distillm")
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "head_dim": 8}


@pytest.fixture
def run(tmp_path):
    """Runs a packaged recipe on rows of messages, with these shapes of its models."""
    chats = chat.write_conversations(tmp_path / "rows.jsonl", 16)
    chat.write_tokenizer(tmp_path / "tokenizer")

    def run(recipe, student, teacher, *more, flags=()):
        values = {
            "run.dir": str(tmp_path / "runs"),
            "tokenizer": str(tmp_path / "tokenizer"),
            "data.train": chats,
            "data.dev": chats,
            "train.device": "cpu",
            **dict.fromkeys(("init:student.path", "teacher.path", "data.chat_template_kwargs"), None),
            "init:student.config": student,
            "teacher.config": teacher,
        }
        sets = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]
        return main(["--config", recipe, *flags, *(part for each in (*sets, *more) for part in ("--set", each))])

    return run


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pair", PAIRS)
def test_values(pair, method):
    student, teacher = PAIRS[pair]
    *earlier, config = load(f"{pair}/{method}.json")
    assert config.method == method
    assert config.tokenizer == teacher  # its chat template
    assert (earlier or [config])[0].student.path == student
    assert [(c.method, c.train.epochs, str(c.run.folder)) for c in earlier] == (
        [] if method == "sft" else [("sft", 1, f"runs/{pair}/init")]
    )
    if method != "sft":
        assert (config.student.path, config.teacher.path) == ("stage:init", teacher)
    sampling = config.sampling
    advised = {"qwen3": (0.7, 20, 0.8), "llama3": (0.6, 0, 0.9), "gemma3": (1.0, 64, 0.95), "smollm": (0.2, 0, 0.9)}
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == advised[pair]


@pytest.mark.parametrize("is_tried", [False, slow(True)])
@pytest.mark.parametrize("pair", PAIRS)
def test_dry_run_on_the_true_shapes(run, capsys, monkeypatch, pair, is_tried):
    """is_tried: whether small models of these widths are compared. That takes seconds, and is tested elsewhere."""
    if not is_tried:
        monkeypatch.setattr(forms, "choose", lambda *_: forms.Form(None, LogitMap()))
    student, teacher = (SHAPES[name] for name in PAIRS[pair])
    assert run(f"{pair}.json", student, teacher, "train.batch_size=8", flags=["--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.count("memory     about") == 2
    assert "estimated" not in out


@pytest.mark.parametrize(
    "pair", ["gemma3", *(pytest.param(pair, marks=pytest.mark.slow) for pair in ("qwen3", "llama3", "smollm"))]
)
def test_small_run(run, tmp_path, pair):
    """The teacher's vocabulary has 64 rows more, as Gemma's has."""
    student, teacher = (
        {**SHAPES[name], **TINY, "vocab_size": size} for name, size in zip(PAIRS[pair], (2048, 2112), strict=True)
    )
    few = ("train.batch_size=4", "train.epochs=null", "train.steps=2", "sampling.max_new_tokens=4")
    assert run(f"{pair}/gkd.json", student, teacher, *few, "data.max_length=64", "data.max_prompt_length=48") == 0
    assert (tmp_path / "runs" / pair / "gkd" / "final" / "config.json").exists()


def test_predicted_memory_and_hours(monkeypatch, tmp_path):
    """The comments state what the command prints."""
    recipes = importlib.import_module("model_recipes")
    monkeypatch.setattr(recipes, "PAIRS", ("smollm",))
    monkeypatch.setattr(recipes, "METHODS", ("ab", "gkd"))
    monkeypatch.setattr(forms, "choose", lambda *_: forms.Form(None, LogitMap()))
    importlib.import_module("predict").main(["--recipes", "--out", str(tmp_path)])
    (table,) = json.loads((tmp_path / "recipes.json").read_text())["sections"]["recipes"]
    rows = {row["name"]: row for row in table["rows"]}
    assert len(rows) == 2
    for name, row in rows.items():
        comment = json.loads(packaged_recipes()[name.removesuffix(".json")].read_text())["comment"]
        assert f"{row['hours']:.1f} hours for all stages" in comment
        assert f"{row['memory']:.0f} GiB" in comment
