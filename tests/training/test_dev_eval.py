"""ROUGE-L on development rows during training."""

import functools
import json
import signal
import statistics

import pytest
from transformers import AutoModelForCausalLM

from abkd_fast import train
from abkd_fast.data import quickstart
from abkd_fast.data.rows import read_rows
from abkd_fast.data.tokenize import encode_prompts
from abkd_fast.generation.sampling import SamplingParams, sample
from abkd_fast.training import dev_eval
from scoring import lines_of, rouge_by_hand, write_recipe


@pytest.fixture
def recipe(tmp_path):
    return functools.partial(write_recipe, tmp_path)


def dev_points(tmp_path):
    points = lines_of(tmp_path / "runs" / "test" / "metrics.jsonl")
    return [(point["step"], point["loss"], point["rouge_l"]) for point in points if point["kind"] == "dev"]


def test_rouge_l_of_dev_rows_during_training(recipe, tmp_path, capsys):
    assert train.main(recipe(sets=None)) == 0
    points = dev_points(tmp_path)
    assert [step for step, *_ in points] == [0, 4, 8, 12]
    folder, tokenizer = tmp_path / "runs" / "test", quickstart.tokenizer()
    rows = read_rows("quickstart:dev", 6)
    chosen = SamplingParams(max_new_tokens=8, eos_token_ids=(0,))
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    responses = sample(model, encode_prompts(rows, tokenizer), chosen, [(10 << 32) + row for row in range(6)])
    texts = [tokenizer.decode(response, skip_special_tokens=True).strip() for response in responses]
    outputs = [[row.values["output"]] for row in rows]
    expected = statistics.fmean(map(rouge_by_hand, texts, outputs))
    assert points[-1][2] == pytest.approx(expected, rel=1e-12)
    assert json.loads((folder / "summary.json").read_text())["dev_rouge_l"] == points[-1][2]
    assert f"dev loss {points[-1][1]:.4f}  ROUGE-L {points[-1][2]:.2f}" in capsys.readouterr().out


def test_training_is_the_same_with_and_without(recipe, tmp_path):
    weights = []
    for name, rows in (("with", "6"), ("without", "null")):
        assert train.main(recipe(f"run.name={name}", f"eval.rouge_rows={rows}", sets=None)) == 0
        weights.append((tmp_path / "runs" / name / "final" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def made_up_scores(monkeypatch, scores):
    """ROUGE-L of each evaluation, in their order."""
    values = iter(scores)
    monkeypatch.setattr("abkd_fast.training.dev_eval.DevAnswers.measure", lambda *_: (next(values), []))


def test_highest_rouge_l_is_selected(recipe, tmp_path, monkeypatch, capsys):
    made_up_scores(monkeypatch, [90.0, 7.0, 9.0, 8.0])
    assert train.main(recipe("eval.select=rouge_l", sets=None)) == 0
    folder = tmp_path / "runs" / "test"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["selected_step"], summary["dev_rouge_l"]) == (8, 9.0)
    assert summary["dev_loss"] == dev_points(tmp_path)[2][1]
    best = folder / "checkpoints" / "step-000008" / "model.safetensors"
    assert (folder / "final" / "model.safetensors").read_bytes() == best.read_bytes()
    assert "step 8 is taken, of the highest dev ROUGE-L, 9.00" in capsys.readouterr().out


def test_signal_during_the_answers_and_resume(recipe, tmp_path, monkeypatch):
    assert train.main(recipe("run.name=undisturbed", sets=None)) == 0
    undisturbed = tmp_path / "runs" / "undisturbed"
    with monkeypatch.context() as patch:
        score, count = dev_eval.score_response, 0

        def score_and_be_stopped(*arguments):
            nonlocal count
            count += 1
            if count == 6 + 2:  # the second answer after step 4
                signal.raise_signal(signal.SIGTERM)
            return score(*arguments)

        patch.setattr(dev_eval, "score_response", score_and_be_stopped)
        assert train.main(recipe(sets=None)) == 75
    assert [step for step, *_ in dev_points(tmp_path)] == [0]
    assert train.main([*recipe(sets=None), "--resume"]) == 0
    points = [p for p in lines_of(undisturbed / "metrics.jsonl") if p["kind"] == "dev"]
    assert dev_points(tmp_path) == [(p["step"], p["loss"], p["rouge_l"]) for p in points]
    weights = [path / "final" / "model.safetensors" for path in (undisturbed, tmp_path / "runs" / "test")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_selection_by_rouge_l_needs_it(recipe, capsys):
    assert train.main(recipe("eval.rouge_rows=null", "eval.select=rouge_l")) == 2
    assert "eval.select is rouge_l, but rouge_rows is missing" in capsys.readouterr().err
