"""Test sets of messages: what a chat model is asked, where its answers end, and what they are compared with."""

import itertools
import json

import pytest
from transformers import AutoConfig, AutoTokenizer

from abkd_fast.evaluate import main
from abkd_fast.evaluation.test_sets import Protocol, read_sets
from abkd_fast.train import main as train
from chains import CHATML, END_OF_TURN, chat_tokenizer, save_chain_model
from conftest import LLAMA
from runs import RECIPE
from scoring import lines_of

WITH_TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + CHATML
CALM = "{% if calm %}<|im_start|>system\nStay calm.<|im_end|>\n{% endif %}" + CHATML
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
HI, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
KIND = {"role": "system", "content": "Be kind."}
SUM = {"role": "user", "content": "What is 1 + 2?"}
THREE = {"role": "assistant", "content": "It is 3."}

# Rows, the messages before the answer, and the references.
ROWS = {
    "one turn": ({"messages": [SUM, THREE]}, [SUM], ["It is 3."]),
    "several turns": ({"messages": [KIND, HI, HELLO, SUM, THREE]}, [KIND, HI, HELLO, SUM], ["It is 3."]),
    "a column system": ({"messages": [HI, HELLO], "system": "Be kind."}, [KIND, HI], ["Hello!"]),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
        [HI],
        ["Hello!"],
    ),
    "prompt and completion": ({"prompt": [HI], "completion": [HELLO]}, [HI], ["Hello!"]),
    "several references": ({"prompt": [KIND, SUM], "output": ["3", "It is 3."]}, [KIND, SUM], ["3", "It is 3."]),
}


def qwen(shared):
    return AutoTokenizer.from_pretrained(shared / "tokenizers" / "qwen1.5")


def read(path, tokenizer, **options):
    vocabulary = max(len(tokenizer), 1024)
    (found,) = read_sets(
        {"mine": path}, tokenizer, AutoConfig.for_model(**{**LLAMA, "vocab_size": vocabulary}), **options
    )
    return found


def rendered(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **options)


@pytest.mark.parametrize("which", ["own", "qwen"])
def test_prompts_are_what_the_template_renders(which, request, write_jsonl):
    tokenizer = chat_tokenizer() if which == "own" else qwen(request.getfixturevalue("shared"))
    rows, messages, references = zip(*ROWS.values(), strict=True)
    found = read(write_jsonl(rows), tokenizer, protocol=Protocol(max_prompt_length=4))
    assert found.prompts == [rendered(tokenizer, one) for one in messages]
    assert found.references == list(references)
    assert found.cut == 0  # messages stay whole
    assert found.note.endswith("; the chat template renders all of them")
    found = read(write_jsonl([{"instruction": "Say hello.", "output": "Hello."}]), tokenizer, protocol=Protocol())
    assert found.note.endswith(" (the papers' prompt); the chat template renders none of them")
    tokenizer.chat_template = None
    found = read(write_jsonl([{"prompt": "Say hello.", "output": "Hello."}]), tokenizer, protocol=Protocol())
    assert found.note.endswith("rows.jsonl: 1 rows of prompt and output")


def test_tools_and_values_reach_the_template(write_jsonl):
    tokenizer = chat_tokenizer(chat_template=WITH_TOOLS)
    (prompt,) = read(write_jsonl([{"messages": [SUM, THREE], "tools": [TOOL]}]), tokenizer, protocol=Protocol()).prompts
    assert prompt == rendered(tokenizer, [SUM], tools=[TOOL])
    assert '"name": "add"' in tokenizer.decode(prompt)
    tokenizer, values = chat_tokenizer(chat_template=CALM), {"calm": True}
    found = read(write_jsonl([ROWS["one turn"][0]]), tokenizer, protocol=Protocol(chat_template_kwargs=values))
    assert found.prompts == [rendered(tokenizer, [SUM], **values)]
    assert "Stay calm." in tokenizer.decode(found.prompts[0])


@pytest.fixture
def speaker(tmp_path):
    """A chat model that answers "It is 3.", ends its turn, and would go on."""
    tokenizer = chat_tokenizer()
    begin = rendered(tokenizer, [SUM])[-1]
    words = tokenizer("It is 3.", add_special_tokens=False)["input_ids"]
    chain = [begin, *words, tokenizer.convert_tokens_to_ids(END_OF_TURN)]
    assert len({*chain}) == len(chain)
    return save_chain_model(tmp_path / "model", tokenizer, dict(itertools.pairwise(chain)))


def command(model, data, out, *more):
    return [
        "--model",
        model,
        "--data",
        f"mine={data}",
        "--out",
        str(out),
        "--temperature",
        "0",
        "--device",
        "cpu",
        *more,
    ]


def test_answers_end_with_the_turn_and_are_scored(speaker, write_jsonl, tmp_path, capsys):
    rows = [ROWS[name][0] for name in ("one turn", "several references", "ShareGPT")]
    data = write_jsonl([rows[0] | {"id": 7}, *rows[1:], {"prompt": "Plain text", "output": "It is 3."}])
    assert main(command(speaker, data, tmp_path / "out", "--max-new-tokens", "12")) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "1 rows of messages and 2 rows of prompt and output and 1 rows of conversations (ShareGPT); " in output
    assert "not read: id; the chat template renders 3 of them" in output
    lines = lines_of(tmp_path / "out" / "mine.seed10.jsonl")
    assert [line["response"] for line in lines[:3]] == ["It is 3."] * 3
    assert [line["exact_match"] for line in lines] == [True, True, False, False]
    assert [line["rouge_l"] for line in lines[:3]] == [100, 100, 0]
    assert lines[0]["prompt"] == "<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert lines[3]["prompt"] == "Plain text"


def test_the_result_of_a_recipe_is_asked_in_its_template(write_jsonl, tmp_path):
    chat_tokenizer(chat_template=CALM).save_pretrained(tmp_path / "tokenizer")
    data = write_jsonl([row for row, *_ in ROWS.values()])
    recipe = {
        **RECIPE,
        "run": {"name": "chat", "dir": str(tmp_path)},
        "tokenizer": str(tmp_path / "tokenizer"),
        "data": {"train": data, "max_length": 96, "chat_template_kwargs": {"calm": True}},
        "train": {**RECIPE["train"], "steps": 1},
        "eval": {"sets": {"mine": data}, "seeds": [1], "max_new_tokens": 2},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert train(["--config", str(tmp_path / "recipe.json")]) == 0
    lines = lines_of(tmp_path / "chat" / "eval" / "mine.seed1.jsonl")
    saved = AutoTokenizer.from_pretrained(tmp_path / "chat" / "final")
    assert [line["prompt"] for line in lines] == [
        rendered(saved, messages, tokenize=False) for _, messages, _ in ROWS.values()
    ]
    assert all("Stay calm." in line["prompt"] for line in lines)
    assert [line["output"] for line in lines] == [references for *_, references in ROWS.values()]


CALL = {"role": "assistant", "content": "I add.", "tool_calls": [TOOL["function"] | {"arguments": {"a": 1}}]}
NO_REFERENCE = "the messages end without a text of the assistant to compare with: add one, or give the messages before"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [SUM]}, NO_REFERENCE),
        ({"prompt": [SUM]}, NO_REFERENCE),
        ({"messages": [SUM], "output": ["3"]}, NO_REFERENCE),  # a column that is not read
        ({"messages": [SUM, {"role": "assistant", "content": ""}]}, NO_REFERENCE),
        ({"messages": [SUM, CALL]}, NO_REFERENCE),
        ({"prompt": [SUM], "output": ["3", 3]}, '"output" must be a text or a list of texts'),
        ({"messages": [SUM, THREE], "tools": [TOOL]}, "the chat template loses a tool"),
    ],
)
def test_rows_that_can_not_be_scored(row, message, speaker, write_jsonl, tmp_path, capsys):
    assert main(command(speaker, write_jsonl([row]), tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert f"line 1: {message}" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_template_takes_no_messages(write_jsonl, tmp_path, capsys):
    tokenizer = chat_tokenizer(chat_template=None)
    model = save_chain_model(tmp_path / "model", tokenizer, {})
    assert main(command(model, write_jsonl([{"messages": [SUM, THREE]}]), tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "line 1: has messages, but the tokenizer has no chat template" in error
    assert error.count("\n") == 1
