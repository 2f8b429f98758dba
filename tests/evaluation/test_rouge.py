import json

from hypothesis import given, settings
from hypothesis import strategies as st

from abkd_fast.evaluation.rouge import exact_match, rouge_l
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
