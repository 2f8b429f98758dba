"""Token ids beside generated text: what is trained is what was generated, and an edited text is refused."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from abkd_fast import generate
from abkd_fast.data.rows import read_rows
from abkd_fast.data.tokenize import encode_prompts, tokenize
from abkd_fast.errors import ConfigError
from chains import chat_tokenizer, save_chain_model
from conftest import LLAMA
from scoring import lines_of

ROWS = [{"prompt": "Add 1 and 2."}, {"prompt": "Say hello:"}, {"instruction": "Name a color."}]
SHORT = ["--max-new-tokens", "6", "--device", "cpu"]


@pytest.fixture
def answer(tmp_path, write_jsonl):
    """Answers rows with a model that follows a chain; returns what `generate` writes."""

    def make(rows, tokenizer, follow=()):
        model, out = save_chain_model(tmp_path / "model", tokenizer, dict(follow)), tmp_path / "answers.jsonl"
        command = ["--model", model, "--data", write_jsonl(rows), "--out", str(out), "--temperature", "0", *SHORT]
        assert generate.main(command) == 0
        return lines_of(out)

    return make


def trained(rows, tokenizer):
    """What a loss sees of each row."""
    dataset = tokenize(rows, tokenizer, 512).dataset
    return [sample["input_ids"][slice(*sample["spans"])] for sample in dataset]


def test_answers_are_trained_as_they_were_generated(answer, tmp_path):
    tokenizer = chat_tokenizer()
    answers = answer(ROWS, tokenizer)
    rows = read_rows(str(tmp_path / "answers.jsonl"))
    assert trained(rows, tokenizer) == [one["output_ids"] for one in answers]
    assert encode_prompts(rows, tokenizer) == [one["prompt_ids"] for one in answers]
    assert [row.outputs for row in rows] == [one["output"] for one in answers]


def test_special_tokens_survive_that_the_text_has_not(answer, tmp_path):
    tokenizer = chat_tokenizer()
    special = tokenizer.convert_tokens_to_ids("<|im_start|>")
    (one,) = answer([{"prompt_ids": [299]}], tokenizer, {300: special, special: 305, 305: 0})
    assert one["output_ids"] == [300, special, 305, 0]
    assert "im_start" not in one["output"]
    assert trained(read_rows(str(tmp_path / "answers.jsonl")), tokenizer) == [[300, special, 305, 0]]


def test_tokens_that_the_tokenizer_lacks_are_left_out(answer, tmp_path):
    """A model's vocabulary may be padded."""
    tokenizer = chat_tokenizer()
    (one,) = answer([{"prompt_ids": [299]}], tokenizer, {300: 1000, 1000: 301, 301: 0})
    assert one["output_ids"] == [300, 301, 0]
    assert one["ended"]
    assert trained(read_rows(str(tmp_path / "answers.jsonl")), tokenizer) == [[300, 301, 0]]


def test_messages_and_tools_stay_beside_their_ids(answer, tmp_path):
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " What is 1 + 2? "}]
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + tokenizer.chat_template
    answers = answer([{"messages": asked, "tools": [tool]}, {"messages": asked}], tokenizer)
    assert [one["messages"][:-1] for one in answers] == [asked, asked]
    assert answers[0]["tools"] == [tool]
    assert "tools" not in answers[1]
    rows = read_rows(str(tmp_path / "answers.jsonl"))
    assert trained(rows, tokenizer) == [one["output_ids"] for one in answers]
    assert [row.outputs for row in rows] == [one["messages"][-1]["content"] for one in answers]
    again = read_rows(str(tmp_path / "answers.jsonl"), outputs="ignored")  # answers can be answered again
    assert encode_prompts(again, tokenizer) == [one["prompt_ids"] for one in answers]
    assert [row.values["messages"] for row in again] == [asked, asked]


EDITS = {
    "output": lambda row: row.update(output=row["output"] + "!"),
    "prompt": lambda row: row.update(prompt=row["prompt"][:-3]),
    "ids of the output": lambda row: row["output_ids"].insert(0, 300),
    "ids of the prompt": lambda row: row["prompt_ids"].insert(0, 300),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_text_is_refused(answer, write_jsonl, name):
    tokenizer = chat_tokenizer()
    answers = answer(ROWS, tokenizer)
    EDITS[name](answers[1])
    path = write_jsonl(answers)
    problem = f"line 2: its token ids are not those of its {name.split()[-1]}: the text was edited"
    with pytest.raises(ConfigError, match=problem):
        trained(read_rows(path), tokenizer)
    for one in answers:  # the way out
        del one["prompt_ids"], one["output_ids"]
    assert len(trained(read_rows(write_jsonl(answers)), tokenizer)) == 3


@pytest.mark.parametrize("place", [0, 1])
def test_edited_messages_are_refused(answer, write_jsonl, place):
    tokenizer = chat_tokenizer()
    answers = answer([{"messages": [{"role": "user", "content": "What is 1 + 2?"}]}], tokenizer)
    answers[0]["messages"][place]["content"] += " Really."
    with pytest.raises(ConfigError, match="line 1: its token ids are not those of its"):
        trained(read_rows(write_jsonl(answers)), tokenizer)


def test_an_edit_is_noticed_where_tokens_are_stored_already(answer, write_jsonl):
    tokenizer = chat_tokenizer()
    answers = answer(ROWS, tokenizer)
    assert trained(read_rows(write_jsonl(answers)), tokenizer)
    answers[2]["output"] += "."
    with pytest.raises(ConfigError, match="line 3: its token ids"):
        trained(read_rows(write_jsonl(answers)), tokenizer)


def test_another_tokenizer_is_refused(answer, tmp_path, shared):
    answer(ROWS, chat_tokenizer())
    other = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    with pytest.raises(ConfigError, match="or another tokenizer wrote them"):
        trained(read_rows(str(tmp_path / "answers.jsonl")), other)


@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_answers_with_sentencepiece_lose_no_token(shared, tmp_path, write_jsonl, name):
    """The decoded text lacks the space of its first token, so it has other tokens."""
    folder = shared / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip(f"no tokenizer at {folder}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**LLAMA, "vocab_size": len(tokenizer), "num_hidden_layers": 1})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = write_jsonl([{"prompt": f"Question {number}: what is next? Answer:"} for number in range(300)])
    out = tmp_path / "answers.jsonl"
    assert generate.main(["--model", str(tmp_path / "model"), "--data", data, "--out", str(out), *SHORT]) == 0
    answers = lines_of(out)
    rows = read_rows(str(out))
    assert len(rows) >= 290  # the others were empty
    assert trained(rows, tokenizer) == [one["output_ids"] for one in answers]
    assert all(one["prompt_ids"][0] == tokenizer.bos_token_id for one in answers)
    assert json.loads(out.with_name("answers.jsonl.settings.json").read_text())["begin_token"] is True
    spaced = [one for one in answers if tokenizer.convert_ids_to_tokens(one["output_ids"][0]).startswith("▁")]
    texts = write_jsonl([{key: one[key] for key in ("prompt", "output", "ended")} for one in spaced], "texts.jsonl")
    assert len(spaced) > 100
    assert not any(map(trained(read_rows(texts), tokenizer).__contains__, (one["output_ids"] for one in spaced)))
