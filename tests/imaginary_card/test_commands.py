"""Train, stop, resume, generate and evaluate from the command line, on the card and on the CPU."""

import json
import signal

import pytest
from emulate import Emulate
from small_runs import GROUPED, sections

import runs
from abkd_fast import evaluate, generate


def everything(device, folder):
    """Runs all commands; returns what they wrote."""
    recipe = sections("ab", {**GROUPED, "initializer_range": 0.1}, device, steps=6)
    recipe |= {"checkpoint": {"every_steps": 2}, "eval": {"every_steps": 2, "rouge_rows": 2, "select": "rouge_l"}}
    recipe["sampling"] = {"max_new_tokens": 8}
    run = runs.Run(folder, **recipe)
    with pytest.MonkeyPatch.context() as patch:
        runs.at_step(patch, 3, runs.send(signal.SIGTERM))
        assert run() == 75  # interrupted: --resume goes on
    assert run("--resume") == 0
    rows = folder / "rows.jsonl"
    lines = [json.dumps({"prompt": f"question {i} of many", "output": "an answer"}) for i in range(6)]
    rows.write_text("\n".join(lines) + "\n")
    shared = ["--device", device, "--dtype", "bfloat16", "--max-new-tokens", "8"]
    model, answers, scores = str(run.folder / "final"), folder / "answers.jsonl", folder / "scores"
    data = ["--model", model, "--data"]
    assert generate.main([*data, str(rows), "--out", str(answers), "--temperature", "0", *shared]) == 0
    assert evaluate.main([*data, f"mine={rows}", "--out", str(scores), "--seeds", "10", "20", *shared]) == 0
    texts = [json.loads(line)["output"] for line in answers.read_text().splitlines()]
    score = json.loads((scores / "scores.json").read_text())["sets"]["mine"]
    return run.points(), texts, score["rouge_l"]["mean"]


def test_everything_is_the_cpus(tmp_path):
    theirs, their_texts, their_score = everything("cpu", tmp_path / "cpu")
    with Emulate():
        ours, our_texts, our_score = everything("cuda", tmp_path / "cuda")
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        numbers = [key for key in other if "loss" in key or key == "grad_norm"]
        assert {key: mine[key] for key in numbers} == pytest.approx({key: other[key] for key in numbers}, rel=4e-3)
        assert mine.get("step") == other.get("step")
    assert sum(mine == other for mine, other in zip(our_texts, their_texts, strict=True)) >= 4
    assert our_score == pytest.approx(their_score, abs=5)
