"""What tests of scores share: ROUGE-L by hand, rows to answer, and a small recipe with an evaluation."""

import json

from rouge_score import rouge_scorer

from conftest import LLAMA

SMALL = {**LLAMA, "vocab_size": 1024, "intermediate_size": 64, "eos_token_id": 0, "bos_token_id": 0}
ROWS = [
    {"instruction": "Say hello.", "output": ["Hello.", "Good morning to you!"]},
    {"instruction": "Name an animal.", "input": "It barks.", "output": "A dog."},
    {"prompt": "Count to three: " * 9, "output": "one, two, three"},
]


def rouge_by_hand(response, references):
    """ROUGE-L by rouge_score itself."""
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    return 100 * max(scorer.score(reference, response)["rougeL"].fmeasure for reference in references)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_recipe(tmp_path, *overrides, **evaluated):
    """Writes a small recipe, with `evaluated` in its section eval; returns the arguments of the training command."""
    data = tmp_path / "set.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    values = {
        "run": {"name": "test", "dir": str(tmp_path / "runs")},
        "method": "sft",
        "tokenizer": "quickstart",
        "student": {"config": {**SMALL, "tie_word_embeddings": True}},
        "data": {"train": "quickstart:small", "dev": "quickstart:dev", "dev_rows": 20, "max_length": 128},
        "optim": {"lr": 3e-3},
        "train": {"steps": 12, "batch_size": 8, "max_tokens": 256, "device": "cpu"},
        "eval": {
            "sets": {"dolly": str(data)},
            "every_steps": 4,
            "rouge_rows": 6,
            "max_new_tokens": 8,
            "seeds": [1, 2],
            **evaluated,
        },
    }
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(values))
    return ["--config", str(path), *(part for override in overrides for part in ("--set", override))]
