"""`--show-rows`: what is printed is what is trained on."""

import json

import pytest
import torch

from abkd_fast import console
from abkd_fast.config.recipe import load
from abkd_fast.training import show_rows
from abkd_fast.training.trainer import Trainer
from chat import write_tokenizer
from runs import Run

MESSAGES = [
    {"role": "user", "content": "Add 1 and 2."},
    {"role": "assistant", "content": "It is 3."},
    {"role": "user", "content": "And 4?"},
    {"role": "assistant", "content": " It is 7.\n"},
]


@pytest.fixture
def chat_tokenizer(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def shown(capsys, run, count):
    assert run("--show-rows", str(count)) == 0
    captured = capsys.readouterr()
    assert all("rows of" in line for line in captured.err.splitlines())
    assert not run.folder.exists()
    return [json.loads(line) for line in captured.out.splitlines()]


def test_lines_are_what_the_trainer_sees(capsys, tmp_path, write_jsonl, chat_tokenizer):
    path = write_jsonl([{"messages": MESSAGES}, {"messages": MESSAGES[:2]}, {"messages": MESSAGES}])
    run = Run(
        tmp_path / "run", f"data.train={path}", f"tokenizer={chat_tokenizer}", "data.dev=null", "train.batch_size=3"
    )
    both, one = shown(capsys, run, 2)
    turn = "<|im_start|>user\nAdd 1 and 2.<|im_end|>\n<|im_start|>assistant\nIt is 3.<|im_end|>"
    assert one == {
        "where": f"{path} line 2",
        "text": turn,
        "trained": ["It is 3.<|im_end|>"],
        "tokens": one["tokens"],
        "trained_tokens": one["trained_tokens"],
    }
    assert both["text"] == f"{turn}\n<|im_start|>user\nAnd 4?<|im_end|>\n<|im_start|>assistant\n It is 7.\n<|im_end|>"
    assert both["trained"] == ["It is 3.<|im_end|>", " It is 7.\n<|im_end|>"]
    trainer = Trainer(load(run.arguments[1], run.arguments[3::2])[0])
    (part,) = next(trainer.batches()).micro_batches
    assert part.tokens == 2 * both["tokens"] + one["tokens"]
    assert len(part.labels) == 2 * both["trained_tokens"] + one["trained_tokens"]
    decode = trainer.tokenizer.decode
    sample = next(sample for sample in part.samples if sample["row"] == 0)
    assert decode(sample["input_ids"]) == both["text"]
    last = Run(tmp_path / "last", *run.arguments[3::2], "data.train_on=last")
    assert [line["trained"] for line in shown(capsys, last, 1)] == [[" It is 7.\n<|im_end|>"]]


def test_cut_and_left_out_rows_are_shown_as_such(capsys, tmp_path, write_jsonl):
    long = {"prompt": "Add 1 and 2. " * 9, "output": " 3"}
    path = write_jsonl([long, {"prompt": "Add 1 and 2.", "output": " It is 3." * 40}])
    run = Run(tmp_path / "run", f"data.train={path}", "data.max_prompt_length=20", "data.max_length=40")
    left_out, cut = shown(capsys, run, 9)
    assert left_out["left_out"].endswith("more than data.max_prompt_length = 20")
    assert (left_out["text"], left_out["trained"], left_out["tokens"]) == ("", [], 0)
    assert cut["tokens"] == 40
    assert cut["text"] == "Add 1 and 2." + cut["trained"][0]
    assert not cut["text"].endswith("<end>")


def test_pieces_of_a_text_keep_their_spaces(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "llama2")
    ids = tokenizer("Q: capital? Paris is it", add_special_tokens=False)["input_ids"]
    pieces = list(show_rows._pieces(tokenizer, ids, [4, 6]))
    assert "".join(text for text, _ in pieces) == "Q: capital? Paris is it"
    assert [is_trained for _, is_trained in pieces] == [False, True, False]
    assert pieces[1][0].startswith(" ")


def test_a_terminal_shows_trained_parts_in_color(tmp_path, write_jsonl, monkeypatch, capsys):
    path = write_jsonl([{"prompt": "Add 1 and 2. [b]", "output": " It is 3."}])
    run = Run(tmp_path / "run", f"data.train={path}")
    monkeypatch.setattr(console.console, "_force_terminal", True)
    monkeypatch.setattr(console.console, "_color_system", console.console._color_system or 1)
    assert run("--show-rows", "1") == 0
    out = capsys.readouterr().out
    assert "Add 1 and 2. [b]" in out  # brackets are no markup
    assert "\x1b[1;32m It is 3.<end>\x1b[0m" in out


@pytest.mark.parametrize("count", ["0", "-1"])
def test_impossible_counts(capsys, tmp_path, count):
    assert Run(tmp_path / "run")("--show-rows", count) == 2
    assert "show-rows is" in capsys.readouterr().err


def test_no_weights_are_read(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "__init__", None)  # no model can be made
    assert len(shown(capsys, Run(tmp_path / "run"), 3)) == 3
