"""What a resumed run says about a teacher that has changed, and what a teacher's own template changes."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import chat
from abkd_fast import train
from abkd_fast.config.recipe import load
from abkd_fast.training.trainer import Trainer
from conftest import LLAMA
from runs import Killed, Run, at_step, crash

MODEL = {**LLAMA, "vocab_size": 1026, "hidden_size": 16, "num_hidden_layers": 1, "eos_token_id": 0, "bos_token_id": 0}
HINT = "{% if hint is defined %}<|im_start|>system\n{{ hint }}<|im_end|>\n{% endif %}"


def save_teacher(path, seed):
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODEL, initializer_range=0.3)).save_pretrained(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two teachers with a tokenizer whose template reads "hint", and rows of messages and of text."""
    folder = tmp_path_factory.mktemp("changes")
    for seed, name in enumerate(("teacher", "other")):
        save_teacher(folder / name, seed)
        chat.write_tokenizer(folder / name)
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        tokenizer.chat_template = HINT + chat.CHATML
        tokenizer.save_pretrained(folder / name)
    chat.write_conversations(folder / "chat.jsonl", 12)
    rows = [{"prompt": f"What is {number}?", "output": f"It is {number}."} for number in range(8)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def make(folder, tmp_path):
    def make(*overrides, rows="text", name="run"):
        data = f"data.train={folder}/{rows}.jsonl", "data.train_rows=null", "data.dev=null", "cache.mode=disk"
        models = f"teacher.path={tmp_path}/teacher", f"tokenizer={folder}/teacher", "student.config.vocab_size=1026"
        shutil.copytree(folder / "teacher", tmp_path / "teacher", dirs_exist_ok=True)
        return Run(tmp_path / name, "method=kd", *models, *data, "checkpoint.every_steps=2", *overrides)

    return make


def interrupted(run, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 3, crash)
        with pytest.raises(Killed):
            run()
    return run


def test_another_teacher_at_the_same_place_is_refused(make, folder, tmp_path, monkeypatch, capsys):
    run = interrupted(make(), monkeypatch)
    shutil.copytree(folder / "other", tmp_path / "teacher", dirs_exist_ok=True)
    assert run("--resume") == 2
    assert "error: teacher: its content has changed since" in capsys.readouterr().err
    shutil.copytree(folder / "teacher", tmp_path / "teacher", dirs_exist_ok=True)
    assert run("--resume") == 0


def test_other_states_at_the_same_place_are_refused(make, folder, tmp_path, monkeypatch, capsys):
    built = {}
    for name in ("teacher", "other"):
        run = make(f"teacher.path={folder / name}", f"cache.dir={tmp_path / 'states'}", "train.steps=1", name=name)
        assert run() == 0
        (built[name],) = {path.parent for path in (tmp_path / "states").glob("*/index.json")} - {*built.values()}
    shutil.copytree(built["teacher"], tmp_path / "given")
    given = f"teacher.hidden_states={tmp_path / 'given'}"
    run = interrupted(make("teacher.path=null", given), monkeypatch)
    shutil.copytree(built["other"], tmp_path / "given", dirs_exist_ok=True)
    assert run("--resume") == 2
    assert "error: teacher: its content has changed since" in capsys.readouterr().err


def test_another_file_of_likeliest_tokens_is_refused(make, tmp_path, monkeypatch, capsys):
    file = tmp_path / "top.jsonl"
    run = make("teacher.path=null", f"teacher.top_k={file}", "train.batch_size=2")
    plain = Trainer(load(run.arguments[1], [*run.arguments[3::2], "method=sft", "teacher=null"])[0])
    lines = []
    for sample in plain.data.train_set:
        labels = sample["input_ids"][sample["spans"][0] :]
        top = {"top_ids": [[label, 5] for label in labels], "top_log_probs": [[-0.5, -2.0]] * len(labels)}
        lines.append({"output_ids": labels, **top})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    interrupted(run, monkeypatch)
    lines[0]["top_log_probs"][0] = [-0.6, -2.0]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run("--resume") == 2
    assert "error: teacher.top_k: its content has changed since" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kwargs", "read"), [("null", "STUDENT"), ("{}", None), ('{"hint": "TEACHER"}', "TEACHER"), ('{"other": 1}', None)]
)
def test_a_teacher_is_free_of_the_students_values_for_the_template(make, capsys, kwargs, read):
    run = make('data.chat_template_kwargs={"hint": "STUDENT"}', f"teacher.chat_template_kwargs={kwargs}", rows="chat")
    capsys.readouterr()
    assert train.main([*run.arguments, "--show-rows", "1"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[0])
    assert shown["text"].startswith("<|im_start|>system\nSTUDENT<|im_end|>\n")
    theirs = shown.get("teacher_text", shown["text"])
    start = "" if read is None else f"<|im_start|>system\n{read}<|im_end|>\n"
    assert theirs.startswith(f"{start}<|im_start|>user\n")


def test_a_template_of_the_teachers_that_no_row_needs_is_said(make, tmp_path, capsys):
    (tmp_path / "own.jinja").write_text(chat.CHATML)
    for rows, said in (("text", True), ("chat", False)):
        assert make(f"teacher.chat_template={tmp_path}/own.jinja", rows=rows, name=rows)("--dry-run") == 0
        printed = " ".join(capsys.readouterr().out.split())
        note = "teacher has a chat template of its own, but no row has messages that it could render"
        assert (note in printed) == said


def test_a_fault_of_the_teachers_template_names_the_teachers_key(make, tmp_path, capsys):
    (tmp_path / "own.jinja").write_text(chat.CHATML.replace("{{ m.content }}", "{{ m.content if m.role != 'system' }}"))
    run = make(f"teacher.chat_template={tmp_path}/own.jinja", "teacher.system=Be kind.", rows="chat")
    assert run("--dry-run") == 2
    error = capsys.readouterr().err
    assert "as the teacher reads it: the chat template loses" in error
    assert "give another as teacher.chat_template" in error


def test_gkd_that_writes_nothing_needs_no_room_for_it(make):
    longest = f"teacher.system={'Be kind. ' * 12}"
    run = make("method=gkd", "loss=fkl", "on_policy.fraction=0", longest, "train.batch_size=4")
    Trainer(load(run.arguments[1], run.arguments[3::2])[0])


def test_a_prompt_of_the_teacher_without_an_answer_says_whose_it_is(make, tmp_path, capsys):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    answer = {"role": "assistant", "content": "b", "weight": 0}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row | {"teacher_messages": [row["messages"][0], answer]}) + "\n")
    assert make(f"data.train={tmp_path}/rows.jsonl")("--dry-run") == 2
    assert 'line 1: "teacher_messages": all messages of the assistant are empty' in capsys.readouterr().err
