"""The tasks for lm-evaluation-harness. CI doesn't install it: `pip install 'lm_eval[hf]'` runs these tests."""

import itertools
import pathlib

import pytest

from abkd_fast.evaluate import main
from chains import END_OF_TURN, chat_tokenizer, save_chain_model
from scoring import lines_of

# Not "lm_eval": where another test has put benchmarks/ on the path, the folder with the tasks has that name, too.
pytest.importorskip("lm_eval.tasks", reason="needs lm-evaluation-harness: pip install 'lm_eval[hf]'")
TASKS = pathlib.Path(__file__).parents[2] / "benchmarks" / "lm_eval"


@pytest.fixture
def score(tmp_path, monkeypatch):
    """Scores a chat model that answers "It is 3." in a task."""
    tokenizer = chat_tokenizer()
    begin = tokenizer("assistant\n", add_special_tokens=False)["input_ids"][-1]
    words = tokenizer("It is 3.", add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    follow = dict(itertools.pairwise([begin, *words, end]))
    save_chain_model(tmp_path / "model", tokenizer, follow, ends=[tokenizer.eos_token_id, end])
    monkeypatch.chdir(tmp_path)

    def run(task):
        import lm_eval.tasks

        manager = lm_eval.tasks.TaskManager(include_path=str(TASKS), include_defaults=False)
        options = {"batch_size": 2, "device": "cpu", "log_samples": True, "bootstrap_iters": 0}
        found = lm_eval.simple_evaluate(
            model="hf", model_args="pretrained=model,dtype=float32", tasks=[task], task_manager=manager, **options
        )
        return found["results"][task], found["samples"][task]

    return run


def test_answers_and_exact_match_are_those_of_evaluate(score, write_jsonl, tmp_path):
    question = {"role": "user", "content": "What is 1 + 2?"}
    rows = [
        {"prompt": [question], "output": ["3", "it is  3"]},
        {"prompt": [question, {"role": "assistant", "content": "3"}, question], "output": ["5", "4"]},
        {"prompt": "Plain text", "output": ["It is 3.", "b"]},
    ]
    options = ["--temperature", "0", "--max-new-tokens", "16", "--no-repeat-ngram-size", "0", "--device", "cpu"]
    assert main(["--model", "model", "--data", f"mine={write_jsonl(rows)}", "--out", "out", *options]) == 0
    (tmp_path / "out" / "mine.seed10.jsonl").rename(tmp_path / "answers.jsonl")
    ours = lines_of(tmp_path / "answers.jsonl")
    result, samples = score("abkd_answers")
    assert [sample["resps"][0][0].strip() for sample in samples] == [line["response"] for line in ours]
    assert [sample["exact_match"] for sample in samples] == [line["exact_match"] for line in ours] == [1, 0, 0]
    assert result["exact_match,none"] == pytest.approx(1 / 3)


def test_the_likeliest_choice(score, write_jsonl):
    prompt = "<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n<|im_start|>assistant\n"
    choices = ["It was 3.", "It is 3.", "Three"]
    write_jsonl([{"prompt": prompt, "choices": choices, "gold": gold} for gold in (1, 2)], "choices.jsonl")
    result, _ = score("abkd_choices")
    assert result["acc,none"] == 0.5
