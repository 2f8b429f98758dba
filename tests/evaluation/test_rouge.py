import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abkd_fast.evaluation.rouge import exact_match, rouge_l, unsuited
from scoring import rouge_by_hand

# Few words, so that they repeat; words that a stemmer changes; what is no word.
TEXTS = st.lists(
    st.sampled_from(["a", "running", "runs", "cats", "Cat", "flies", "42", "-", "é", "don't"]), max_size=90
)


@settings(deadline=None, max_examples=60)
@given(TEXTS.map(" ".join), st.lists(TEXTS.map(" ".join), min_size=1, max_size=3))
def test_rouge_l_is_that_of_rouge_score(response, references):
    assert rouge_l(response, references) == rouge_by_hand(response, references)


def test_rouge_l_of_real_texts(shared):
    rows = [json.loads(line) for line in (shared / "data/dolly/dev.jsonl").read_text().splitlines()[:60]]
    outputs = [row["output"] for row in rows]
    for response, first, second in zip(outputs, outputs[1:], outputs[2:], strict=False):
        assert rouge_l(response, [first, second]) == rouge_by_hand(response, [first, second])


def test_exact_match_is_blind_to_case_punctuation_and_spaces():
    assert exact_match(" The  answer\nis: 42! ", ["no", "the answer is 42"])
    assert not exact_match("the answer is 4 2", ["the answer is 42"])
    assert exact_match("", ["..."])


def test_characters_of_other_scripts():
    assert rouge_l("今天天气很好", ["今天天气不好"]) == 0  # rouge_score finds no words
    assert rouge_l("今天天气很好", ["今天天气不好"], "characters") == pytest.approx(100 * 5 / 6)
    assert rouge_l("مرحبا بك", ["مرحبابك", "لا"], "characters") == 100  # white space does not count
    assert rouge_l("สวัสดี", ["สวัสดี"], "characters") == 100
    assert rouge_l("Café", ["cafe\u0301"], "characters") == 100  # one text in two normal forms
    assert rouge_l("กี", ["กา"], "characters") == 0  # a mark belongs to its letter
    assert rouge_l("", ["今"], "characters") == rouge_l("\u0301", [" "], "characters") == 0


CHARACTERS = st.text(st.sampled_from("ab AB今天气\u0301é\n.😀"), max_size=40)


@settings(deadline=None, max_examples=60)
@given(CHARACTERS, CHARACTERS)
def test_characters_are_symmetric_and_complete(first, second):
    score = rouge_l(first, [second], "characters")
    assert score == pytest.approx(rouge_l(second, [first], "characters"))
    assert 0 <= score <= 100
    assert rouge_l(first, [first], "characters") == (100 if first.strip() else 0)


SCRIPTS = {
    "Chinese": (["今天天气很好。我们去公园。"], True),
    "Thai": (["สวัสดีครับ"], True),
    "Chinese with some English": (["今天天气很好 ok", "我们去公园吧"], True),
    "English": (["It's fine!"], False),
    "French": (["Où êtes-vous allé, à la fête ?"], False),
    "numbers": (["1 + 2 = 3"], False),
    "nothing": (["  "], False),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_references_that_words_leave_out_are_named(name):
    texts, expected = SCRIPTS[name]
    references = [[text] for text in texts]
    assert bool(unsuited(references, "words")) == expected
    assert unsuited(references, "characters") is None


def test_real_references_are_of_words(shared):
    rows = [json.loads(line) for line in (shared / "data/dolly/dev.jsonl").read_text().splitlines()[:200]]
    assert unsuited([[row["output"]] for row in rows], "words") is None
