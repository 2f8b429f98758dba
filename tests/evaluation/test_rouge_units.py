"""The units of ROUGE-L in evaluations and in runs: named everywhere, and never mixed."""

import functools
import json

import pytest

from abkd_fast import evaluate, train
from abkd_fast.evaluation.rouge import rouge_l
from chains import chat_tokenizer, save_chain_model
from scoring import ROWS, lines_of, write_recipe

CHINESE = [{"prompt": "天气怎么样。", "output": "今天天气很好。"}, {"prompt": "去哪里。", "output": "我们去公园。"}]
NOTE = "of the references' characters are a-z or 0-9, of which ROUGE-L's words are made: scores mean little"


@pytest.fixture
def command(tmp_path, write_jsonl):
    model = save_chain_model(tmp_path / "model", chat_tokenizer(), {})

    def make(*more, rows=CHINESE, out="out"):
        given = ["--model", model, "--data", f"mine={write_jsonl(rows)}", "--out", str(tmp_path / out)]
        return [*given, "--seeds", "1", "2", "--max-new-tokens", "8", "--device", "cpu", *more]

    return make


def test_characters_are_scored_and_named(command, tmp_path, capsys):
    assert evaluate.main(command("--rouge-tokens", "characters")) == 0
    output = capsys.readouterr().out
    assert "ROUGE-L (characters)" in output
    assert NOTE not in output
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["settings"]["rouge_tokens"] == "characters"
    lines = lines_of(tmp_path / "out" / "mine.seed1.jsonl")
    assert [line["rouge_l"] for line in lines] == [
        rouge_l(line["response"], line["output"], "characters") for line in lines
    ]


def test_references_without_words_are_named_before_the_weights_load(command, capsys, monkeypatch):
    monkeypatch.setattr(
        "abkd_fast.generation.answers.loading.load", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert evaluate.main(command()) == 75
    output = capsys.readouterr().out
    assert f"  mine: only 0% {NOTE}; for other scripts there is --rouge-tokens characters" in output
    assert evaluate.main(command(rows=ROWS)) == 75
    assert NOTE not in capsys.readouterr().out


@pytest.mark.parametrize("first", ["words", "characters"])
def test_units_are_not_mixed_in_one_folder(command, tmp_path, capsys, first):
    second = {"words": "characters", "characters": "words"}[first]
    assert evaluate.main(command("--rouge-tokens", first)) == 0
    before = (tmp_path / "out" / "scores.json").read_bytes()
    assert evaluate.main([*command("--rouge-tokens", second), "--seeds", "3"]) == 2
    assert "scores.json is of other rouge_tokens: choose another" in capsys.readouterr().err
    assert (tmp_path / "out" / "scores.json").read_bytes() == before


def test_scores_of_earlier_versions_go_on_if_they_are_the_same(command, tmp_path, capsys):
    """They have no units (words), and no end tokens (the tokenizer's alone)."""
    assert evaluate.main(command()) == 0
    path = tmp_path / "out" / "scores.json"
    scores = json.loads(path.read_text())
    for name in ("rouge_tokens", "end_tokens", "chat_template", "chat_template_kwargs"):
        del scores["settings"][name]
    path.write_text(json.dumps(scores))
    assert evaluate.main(command("--rouge-tokens", "characters")) == 2
    assert "is of other rouge_tokens, end_tokens: choose another" in capsys.readouterr().err  # the template has another
    chat_tokenizer(chat_template=None).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    assert evaluate.main([*command(), "--seeds", "3"]) == 0
    assert list(json.loads(path.read_text())["sets"]["mine"]["rouge_l"]["seeds"]) == ["1", "2", "3"]


@pytest.fixture
def recipe(tmp_path):
    return functools.partial(write_recipe, tmp_path)


def test_runs_name_their_units(recipe, write_jsonl, tmp_path, capsys):
    data = write_jsonl(CHINESE * 4, "chinese.jsonl")
    overrides = ["train.steps=1", f"data.dev={data}", "data.dev_rows=8", "eval.seeds=[1]"]
    assert train.main(recipe(*overrides)) == 0
    output = capsys.readouterr().out
    assert f"  rows       data.dev: only 0% {NOTE}; for other scripts there is eval.rouge_tokens=characters" in output
    characters = ["run.name=other", "eval.rouge_tokens=characters"]
    assert train.main(recipe(*overrides, *characters)) == 0
    output = capsys.readouterr().out
    assert NOTE not in output
    assert "  ROUGE-L (characters) " in output
    folder = tmp_path / "runs" / "other"
    assert (folder / "scores.md").read_text().startswith("|  | Dolly (characters) |")
    assert "dev ROUGE-L (characters): " in (folder / "report.md").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["dev_rouge_l"] is not None
