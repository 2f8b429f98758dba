"""What ends a response: the tokenizer's end token, those of generation_config.json, the chat template's end of turn."""

import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from abkd_fast import evaluate, generate
from abkd_fast.config.recipe import load
from abkd_fast.data import quickstart
from abkd_fast.data.chat import PromptFormat
from abkd_fast.errors import ConfigError
from abkd_fast.models.tokenizers import end_tokens
from abkd_fast.training import dev_eval
from abkd_fast.training.trainer import Trainer
from chains import chat_tokenizer, save_chain_model
from conftest import LLAMA
from runs import Run
from scoring import lines_of

CHAT_END = chat_tokenizer().convert_tokens_to_ids("<|im_end|>")
ENDS = (0, 5, 9, CHAT_END)
STARTS = (100, 200, 300, 400)  # each leads to one of these ends, after two tokens
FOLLOW = {start + 2: end for start, end in zip(STARTS, ENDS, strict=True)}
ANSWERS = [[start + 1, start + 2, end] for start, end in zip(STARTS, ENDS, strict=True)]


@pytest.fixture
def model_folder(tmp_path):
    return save_chain_model(tmp_path / "model", chat_tokenizer(), FOLLOW, [5, 9])


@pytest.fixture
def data(write_jsonl):
    rows = [{"prompt_ids": [7, start], "output_ids": [start + 1], "output": "x"} for start in STARTS]
    return write_jsonl([{**row, "output": chat_tokenizer().decode(row["output_ids"])} for row in rows])


def settings_file(folder, **values):
    folder.mkdir(exist_ok=True)
    AutoConfig.for_model(**LLAMA).save_pretrained(folder)
    if values:
        (folder / "generation_config.json").write_text(json.dumps(values))
    return str(folder)


SOURCES = {
    "none but the tokenizer": ({}, False, (0,)),
    "a number": ({"eos_token_id": 5}, False, (0, 5)),
    "a list": ({"eos_token_id": [9, 5, 0]}, False, (0, 5, 9)),
    "null": ({"eos_token_id": None, "top_p": 0.8}, False, (0,)),
    "beyond the vocabulary": ({"eos_token_id": [5, 4000, -1]}, False, (0, 5)),
    "the template's": ({}, True, (0, CHAT_END)),
    "all three": ({"eos_token_id": [5, 9]}, True, ENDS),
    "the default of Llama's class": ({"eos_token_id": 2, "_from_model_config": True}, False, (0,)),
    "a choice in config.json": ({"eos_token_id": 5, "_from_model_config": True}, False, (0, 5)),
    "a list in config.json": ({"eos_token_id": [2, 5], "_from_model_config": True}, False, (0, 2, 5)),
}


@pytest.mark.parametrize("name", SOURCES)
def test_ends_are_the_union_of_three_sources(tmp_path, name):
    values, is_chat, expected = SOURCES[name]
    tokenizer = chat_tokenizer() if is_chat else chat_tokenizer(chat_template=None)
    assert end_tokens(settings_file(tmp_path / "model", **values), tokenizer, PromptFormat()) == expected


def test_random_weights_and_unreachable_names_have_no_settings():
    assert end_tokens(None, quickstart.tokenizer(), PromptFormat()) == (0,)
    assert end_tokens("nobody/nothing", quickstart.tokenizer(), PromptFormat()) == (0,)


DAMAGED = {
    "broken": ('{"eos_token_id": 5', "can't be read ("),
    "binary": (b"\xff\xfe\x00", "can't be read ("),
    "a list": ("[1, 2]", "can't be read ("),
    "deep": ("[" * 100_000, "can't be read ("),
    "a name": ('{"eos_token_id": "</s>"}', 'eos_token_id is "</s>", expected the number of a token, or a list of such'),
    "true": ('{"eos_token_id": [true]}', "eos_token_id is [true], expected the number of a token"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_settings_are_one_line(model_folder, data, tmp_path, capsys, name):
    content, message = DAMAGED[name]
    path = tmp_path / "model" / "generation_config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        end_tokens(model_folder, chat_tokenizer(), PromptFormat())
    out = str(tmp_path / "answers.jsonl")
    assert generate.main(["--model", model_folder, "--data", data, "--out", out, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_generate_and_evaluate_stop_at_each_end(model_folder, data, tmp_path):
    command = ["--model", model_folder, "--temperature", "0", "--max-new-tokens", "8", "--device", "cpu"]
    assert generate.main([*command, "--data", data, "--out", str(tmp_path / "answers.jsonl")]) == 0
    answers = lines_of(tmp_path / "answers.jsonl")
    assert [answer["output_ids"] for answer in answers] == ANSWERS
    assert all(answer["ended"] for answer in answers)
    record = json.loads((tmp_path / "answers.jsonl.settings.json").read_text())
    assert record["end_tokens"] == f"0 5 9 {CHAT_END}"
    assert evaluate.main([*command, "--data", f"mine={data}", "--out", str(tmp_path / "out")]) == 0
    tokenizer = chat_tokenizer()
    texts = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in ANSWERS]
    assert [line["response"] for line in lines_of(tmp_path / "out" / "mine.seed10.jsonl")] == texts
    settings = json.loads((tmp_path / "out" / "scores.json").read_text())["settings"]
    assert settings["end_tokens"] == f"0 5 9 {CHAT_END}"


def test_an_answer_without_an_end_has_not_ended(model_folder, write_jsonl, tmp_path):
    out = tmp_path / "answers.jsonl"
    command = ["--model", model_folder, "--temperature", "0", "--max-new-tokens", "3", "--device", "cpu"]
    assert generate.main([*command, "--data", write_jsonl([{"prompt_ids": [500]}]), "--out", str(out)]) == 0
    (answer,) = lines_of(out)
    assert answer["output_ids"] == [501, 502, 503]
    assert not answer["ended"]


@pytest.mark.parametrize("method", ["gkd", "minillm"])
def test_rollouts_and_dev_rouge_stop_at_each_end(model_folder, data, tmp_path, monkeypatch, method):
    run = Run(
        tmp_path / "run",
        method=method,
        tokenizer=None,
        student={"path": model_folder},
        teacher={"path": model_folder},
        data={"train": data, "dev": data, "max_length": 64, "max_prompt_length": None},
        train={"steps": 1, "batch_size": 4, "max_tokens": 256, "device": "cpu"},
        loss="rkl",
        sampling={"max_new_tokens": 8},
        **({"on_policy": {"fraction": 1.0}} if method == "gkd" else {"minillm": {"rollouts": 4}}),
        eval={"rouge_rows": 4, "max_new_tokens": 8},
    )
    (config,) = load(run.arguments[1])
    trainer = Trainer(config)
    trainer.build()
    write = trainer.rollouts.write if method == "gkd" else lambda *args: trainer.rollouts.write_mixed(*args, 0.2)
    rollouts = write([*trainer.data.train_set], 0)
    assert [rollout["input_ids"][2:] for rollout in rollouts] == ANSWERS
    heard = []
    monkeypatch.setattr(dev_eval, "score_response", lambda _, ids, *others: heard.append(ids) or {"rouge_l": 0.0})
    trainer.data.dev.answers.measure(trainer.student, trainer.signals)
    assert sorted(heard) == ANSWERS


def test_a_runs_result_names_all_ends(tmp_path):
    """For other tools, and for later stages: neither class defaults nor the template's end are lost."""
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    student = {"config": {**LLAMA, "vocab_size": 1024, "hidden_size": 16, "intermediate_size": 24}}
    one_step = "train.steps=1", "data.dev=null"
    run = Run(tmp_path / "run", *one_step, student=student, tokenizer=str(tmp_path / "tokenizer"))
    assert run() == 0
    final = run.folder / "final"
    assert GenerationConfig.from_pretrained(final).eos_token_id == [0, CHAT_END]
    assert AutoModelForCausalLM.from_pretrained(final).generation_config.eos_token_id == [0, CHAT_END]
    assert end_tokens(str(final), tokenizer, PromptFormat()) == (0, CHAT_END)
    plain = Run(tmp_path / "plain", *one_step, student=student)
    assert plain() == 0
    assert GenerationConfig.from_pretrained(plain.folder / "final").eos_token_id == 0


def test_checkpoints_and_later_stages_keep_the_ends(model_folder, data, tmp_path):
    run = Run(
        tmp_path / "run",
        tokenizer=None,
        student={"path": model_folder},
        data={"train": data, "max_length": 64, "max_prompt_length": None},
        train={"steps": 2, "batch_size": 4, "max_tokens": 256, "device": "cpu"},
        eval={},
        checkpoint={"every_steps": 1},
    )
    assert run() == 0
    for folder in (run.folder / "final", run.folder / "checkpoints" / "step-000001"):
        assert GenerationConfig.from_pretrained(folder).eos_token_id == [*ENDS]
