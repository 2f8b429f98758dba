import gc
import json
import signal
import weakref

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import chat
from abkd_fast.cli import INTERRUPTED
from abkd_fast.data import quickstart
from abkd_fast.data.rows import read_rows
from abkd_fast.data.tokenize import encode_prompts, tokenize
from abkd_fast.files import exclusive
from abkd_fast.generate import main
from abkd_fast.generation import answers
from abkd_fast.generation.answers import Answers
from abkd_fast.generation.sampling import SamplingParams, sample
from abkd_fast.models.loading import model_spec
from conftest import LLAMA


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    tokenizer = quickstart.tokenizer()
    config = AutoConfig.for_model(**{**LLAMA, "vocab_size": len(tokenizer), "intermediate_size": 64})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def command(model_folder, tmp_path):
    """The command's arguments; later ones win."""

    def make(*more):
        out = str(tmp_path / "answers.jsonl")
        arguments = ["--model", str(model_folder), "--data", "quickstart:dev", "--out", out, "--rows", "12"]
        return [*arguments, "--max-new-tokens", "9", "--device", "cpu", *more]

    return make


def answers_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]


def test_answers_are_the_samples_and_can_be_trained_on(command, model_folder, tmp_path, capsys):
    assert main(command()) == 0
    answers = answers_of(tmp_path)
    tokenizer = quickstart.tokenizer()
    rows = read_rows("quickstart:dev", 12)
    settings = SamplingParams(max_new_tokens=9, eos_token_ids=(tokenizer.eos_token_id,))
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    seeds = [(10 << 32) + index for index in range(12)]
    responses = sample(model, encode_prompts(rows, tokenizer), settings, seeds)
    texts = [tokenizer.decode(response, skip_special_tokens=True) for response in responses]
    assert [answer["row"] for answer in answers] == list(range(12))
    assert [answer["prompt"] for answer in answers] == [row.values["prompt"] for row in rows]
    assert [answer["output"] for answer in answers] == texts
    assert [answer["ended"] for answer in answers] == [r[-1] == tokenizer.eos_token_id for r in responses]
    again = read_rows(str(tmp_path / "answers.jsonl"))
    assert [row.values["output"] for row in again] == texts
    assert len(tokenize(again, tokenizer, 512).dataset) == 12
    assert "12 answers in" in capsys.readouterr().out


def test_interrupted_command_continues_to_the_same_file(command, tmp_path, capsys, monkeypatch):
    path = tmp_path / "answers.jsonl"
    assert main(command()) == 0
    undisturbed = path.read_bytes()
    assert main(command()) == 0
    assert "is finished already" in capsys.readouterr().out
    for file in tmp_path.glob("answers*"):
        file.unlink()

    add, count = Answers.add, 0

    def add_and_be_stopped(self, *arguments):
        nonlocal count
        add(self, *arguments)
        count += 1
        if count == 5:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Answers, "add", add_and_be_stopped)
    assert main(command("--batch-size", "2")) == INTERRUPTED
    error = capsys.readouterr().err
    assert "SIGTERM after 5 of 12 answers, which are kept; continue with:\n" in error
    assert "-m abkd_fast.generate --model" in error
    kept = answers_of(tmp_path)
    assert len(kept) == 5
    with path.open("ab") as file:
        file.write(b'{"prompt": "torn \xc3')
    monkeypatch.setattr(Answers, "add", add)
    assert main(command("--batch-size", "5")) == 0
    assert "7 of 12 prompts to answer" in capsys.readouterr().out
    assert path.read_bytes() == undisturbed


def test_one_process_at_a_time(command, model_folder, tmp_path, capsys, monkeypatch):
    path = tmp_path / "answers.jsonl"
    settings = SamplingParams(max_new_tokens=9)
    # It looks at the file before the second one begins.
    first = answers.Generation(model_spec(str(model_folder)), "quickstart:dev", path, settings, rows=12, device="cpu")
    with exclusive(tmp_path / "answers.jsonl.lock", "not busy"):
        assert main(command()) == 2
        assert capsys.readouterr().err == (
            f"error: out: another process is writing {path}: wait for it, or choose another\n"
        )
        assert not path.exists()
    assert main(command()) == 0
    written = path.read_bytes()
    monkeypatch.setattr(answers.loading, "load", lambda *_: pytest.fail("weights are loaded for nothing"))
    first.run()
    assert "is finished already" in capsys.readouterr().out
    assert path.read_bytes() == written
    assert sorted(file.name for file in tmp_path.glob("answers*")) == ["answers.jsonl", "answers.jsonl.settings.json"]


def test_interrupt_outside_of_sampling(command, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(answers.loading, "load", stop)
    assert main(command()) == 75
    error = capsys.readouterr().err
    assert error.startswith("interrupted; continue with:\n")
    assert "-m abkd_fast.generate --model" in error


def test_other_settings_and_foreign_files_are_refused(command, tmp_path, capsys):
    assert main(command()) == 0
    before = (tmp_path / "answers.jsonl").read_bytes()
    assert main(command("--temperature", "0.5", "--seed", "11")) == 2
    assert "was made with other seed, temperature: choose another, or delete it" in capsys.readouterr().err
    (tmp_path / "answers.jsonl.settings.json").unlink()
    assert main(command()) == 2
    assert "exists, and not as the result of this command" in capsys.readouterr().err
    assert (tmp_path / "answers.jsonl").read_bytes() == before


FOREIGN = {
    "another's prompt": lambda lines: [*lines[:3], {**lines[3], "prompt_ids": [1, 2]}],
    "another's row": lambda lines: [{**lines[0], "row": 1}],
    "a row that is not there": lambda lines: [*lines, {**lines[0], "row": 12}],
    "rows of another tool": lambda lines: [{"row": 0, "prompt": "x", "output": "y"}],
}


@pytest.mark.parametrize("change", [*FOREIGN.values(), list.copy], ids=[*FOREIGN, "whole, and fewer"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_file_in_place_of_this_one_is_refused(command, tmp_path, capsys, monkeypatch, change, finished):
    """The settings beside it fit, and it was exchanged."""
    assert main(command()) == 0
    path, record = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.settings.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "finished": finished}))
    lines = change(answers_of(tmp_path))
    path.write_text("".join(json.dumps(line) + "\n" for line in (lines[1:] if change is list.copy else lines)))
    before = path.read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(answers.loading, "load", lambda *_: pytest.fail("it is refused before weights are loaded"))
    if change is list.copy and not finished:  # as an interrupted command leaves it
        monkeypatch.undo()
        assert main(command()) == 0
        return
    assert main(command()) == 2
    error = capsys.readouterr().err
    reason = "has changed since it was finished" if finished else "is no answer to a prompt of this command"
    assert reason in error
    assert error.count("\n") == 1
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "record", ["[]", "{}", '{"finished": 1}', "1", "[" * 9999, '{"finished": true, "checksum": []}']
)
def test_an_odd_record_is_one_line(command, tmp_path, capsys, record):
    (tmp_path / "answers.jsonl").write_text("{}\n")
    (tmp_path / "answers.jsonl.settings.json").write_text(record)
    assert main(command()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "answers.jsonl.settings.json can't be read (" in line


def test_damaged_lines_are_answered_again_and_said(command, tmp_path, capsys):
    assert main(command()) == 0
    path, record = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.settings.json"
    undisturbed = path.read_bytes()
    lines = undisturbed.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b'{"row": \xff\n', *lines[3:9]]) + b"[" * 9999)
    record.write_text(json.dumps({**json.loads(record.read_text()), "finished": False}))
    assert main(command()) == 0
    assert f"{path}: 2 damaged lines are written again\n" in capsys.readouterr().out
    assert path.read_bytes() == undisturbed


def test_empty_answers_are_left_out(command, tmp_path, capsys, monkeypatch):
    def empty(model, prompts, settings, seeds, batch_size, on_response):
        for index in range(len(prompts)):
            on_response(index, [*([5] if index % 2 else []), *settings.eos_token_ids])

    monkeypatch.setattr("abkd_fast.generation.answers.sample", empty)
    assert main(command()) == 0
    assert [answer["row"] for answer in answers_of(tmp_path)] == [1, 3, 5, 7, 9, 11]
    assert all(answer["ended"] for answer in answers_of(tmp_path))
    assert "6 were empty and are left out" in capsys.readouterr().out


def test_prompts_need_no_output(command, write_jsonl, tmp_path):
    rows = [{"instruction": "Say hello."}, {"prompt": "Hello", "output": ["one", "two"]}]
    assert main(command("--data", write_jsonl(rows))) == 0
    assert [answer["row"] for answer in answers_of(tmp_path)] == [0, 1]


def test_messages_stay_messages(command, model_folder, write_jsonl, tmp_path):
    tokenizer = quickstart.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    try:
        tokenizer.save_pretrained(model_folder)
    finally:
        tokenizer.chat_template = None
    question = {"role": "user", "content": "Hi"}
    rows = [{"messages": [question]}, {"messages": [question, {"role": "assistant", "content": "Hello"}]}]
    assert main(command("--data", write_jsonl(rows))) == 0
    for answer in answers_of(tmp_path):
        first, last = answer["messages"]
        assert first == question
        assert last["role"] == "assistant"


BAD = {
    "no model": (["--model", "./nowhere"], "model.path: ./nowhere: no such model folder"),
    "no data": (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    "this folder": (["--out", "."], "out: . is a folder: name a file in it"),
    "no folder": (["--out", "nowhere/answers.jsonl"], "out: nowhere is not a folder that can be written to"),
    "temperature": (["--temperature", "-1"], "temperature is -1.0, expected at least 0"),
    "batch size": (["--batch-size", "0"], "batch_size is 0, expected at least 1"),
    "no GPU": (["--device", "cuda"], "device is cuda, but PyTorch sees no GPU"),
    "rows": (["--rows", "0"], "rows is 0, expected at least 1"),
    "tokenizer": (["--tokenizer", "./no/such/thing"], "tokenizer: ./no/such/thing: no tokenizer there"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_status_2(command, tmp_path, capsys, monkeypatch, name):
    arguments, message = BAD[name]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(command(*arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "answers.jsonl").exists()


def test_prompt_without_room_is_refused(command, write_jsonl, tmp_path, capsys):
    data = write_jsonl([{"prompt": "Add 1 and 2."}, {"prompt": "word " * 200}])
    assert main(command("--data", data)) == 2
    assert f"error: {data} line 2: the prompt has " in capsys.readouterr().err
    assert not (tmp_path / "answers.jsonl").exists()


def test_model_is_freed_after_its_responses(model_folder, tmp_path):
    spec = model_spec(str(model_folder))
    generator = answers.Generator(spec, (str(model_folder), "tokenizer"), SamplingParams(), 1, "cpu", "float32")
    with generator.loaded(tmp_path):
        model = weakref.ref(generator.model.model)
        assert model() is not None
    gc.collect()
    assert model() is None


def test_prompts_are_answered_on_the_terminal(model_folder, tmp_path, capsys):
    arguments = ["--model", str(model_folder), "--max-new-tokens", "9", "--device", "cpu", "--seed", "7"]
    texts = ["What is 3 plus 2?", "Reverse the word: stone"]
    assert main([*arguments, "--prompt", texts[0], "--prompt", texts[1]]) == 0
    printed = capsys.readouterr().out
    tokenizer, model = quickstart.tokenizer(), AutoModelForCausalLM.from_pretrained(model_folder)
    settings = SamplingParams(max_new_tokens=9, eos_token_ids=(tokenizer.eos_token_id,))
    for text, response in zip(texts, sample(model, tokenizer(texts)["input_ids"], settings, 7), strict=True):
        assert tokenizer.decode(response, skip_special_tokens=True) in printed, text

    assert main([*arguments, "--prompt", texts[0], "--chat"]) == 2
    assert "chat template" in capsys.readouterr().err
    config = AutoConfig.for_model(**{**LLAMA, "vocab_size": len(tokenizer) + 2})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "chat")
    chat.write_tokenizer(tmp_path / "chat")
    assert main([*arguments, "--model", str(tmp_path / "chat"), "--prompt", texts[0], "--chat"]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --data and --out, or --prompt"),
        (["--data", "rows.jsonl"], "give --data and --out, or --prompt"),
        (["--prompt", "x", "--out", "a.jsonl"], "--prompt prints its answer: leave out"),
        (["--data", "rows.jsonl", "--out", "a.jsonl", "--chat"], "--chat is for --prompt"),
    ],
)
def test_prompts_or_data(arguments, message, capsys):
    assert main(["--model", "none", *arguments]) == 2
    assert message in capsys.readouterr().err
