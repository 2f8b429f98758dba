"""The recipe self.json: a fact that only the teacher's prompt has reaches the student's weights."""

import json

import pytest

from abkd_fast.config.recipe import load
from abkd_fast.data import quickstart
from abkd_fast.train import main


def test_no_row_of_the_student_has_a_secret_and_no_wording_is_asked_twice():
    trained, asked = ([*quickstart.rows(split)] for split in ("questions", "questions-held-out"))
    assert len(trained) == 4 * 8
    assert all(
        "output" not in row and not any(color in row["prompt"] for color in quickstart.COLORS) for row in trained
    )
    assert not {row["prompt"] for row in trained} & {row["prompt"] for row in asked}
    facts = {row["teacher_prompt"].splitlines()[0] for row in trained}
    assert facts == {row["output"] for row in asked}
    assert {row["teacher_prompt"].splitlines()[1] + "\n" for row in trained} == {row["prompt"] for row in trained}
    told = [row["prompt"].count("\n") == 2 for row in quickstart.rows("facts")]
    assert 0.7 < sum(told) / len(told) < 0.8


def test_the_control_differs_by_the_teachers_prompt_alone():
    _, told, control = (config.to_dict() for config in load("self"))
    assert control["data"].pop("columns") == {"prompt": "prompt"}
    assert told["data"].pop("columns") is None
    assert told["run"].pop("stage"), control["run"].pop("stage")
    control["run"].pop("stage", None)
    assert told == control


@pytest.mark.slow
def test_the_student_knows_the_facts_in_other_words_and_the_control_does_not(tmp_path):
    assert main(["--config", "self.json", "--set", f"run.dir={tmp_path}", "--set", "train.device=cpu"]) == 0

    def exact_match(stage):
        scores = json.loads((tmp_path / "self" / stage / "eval" / "scores.json").read_text())
        return scores["sets"]["held-out"]["exact_match"]["mean"]

    assert exact_match("self") > 90
    assert exact_match("control") < 30  # chance is one color of eight
    assert exact_match("reader") < 30
