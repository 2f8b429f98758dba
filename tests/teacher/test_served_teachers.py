"""teacher.top_k: what a server returns, as the teacher of a run."""

import json
import pathlib
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from abkd_fast import fused_linear_divergence, parse
from abkd_fast.config.recipe import load
from abkd_fast.data import quickstart
from abkd_fast.errors import ConfigError
from abkd_fast.losses.arguments import LinearHead
from abkd_fast.teacher import top_k
from abkd_fast.training.dry_run import describe
from abkd_fast.training.trainer import Trainer
from conftest import LLAMA
from runs import Run, assert_same, crash_and_resume

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "served-teachers.md"
MODEL = {**LLAMA, "vocab_size": 1024, "eos_token_id": 0, "bos_token_id": 0, "num_hidden_layers": 1}
SECTIONS = {
    "method": "kd",
    "loss": "jsd:0.5",
    "student": {"config": MODEL},
    "data": {"train": "quickstart:small", "train_rows": 12, "max_length": 128},
    "train": {"steps": 3, "batch_size": 4, "max_tokens": 256, "device": "cpu"},
    "eval": {},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a teacher."""
    folder = tmp_path_factory.mktemp("teacher")
    set_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODEL, initializer_range=0.2)).save_pretrained(folder)
    quickstart.tokenizer().save_pretrained(folder)
    return str(folder)


def trainer_of(run, *overrides):
    return Trainer(load(run.arguments[1], overrides)[0])


@pytest.fixture
def samples(tmp_path):
    """The tokens that training uses, as rows."""
    run = Run(tmp_path, **{**SECTIONS, "method": "sft"})
    return [
        {"prompt_ids": ids[:start], "output_ids": ids[start:]}
        for ids, (start, _) in ((x["input_ids"], x["spans"]) for x in trainer_of(run).data.train_set)
    ]


@torch.no_grad()
def prompt_log_probs(model, ids, k):
    """As vLLM returns them: by token, the k likeliest ones at every position but the first, and the token there."""
    log_probs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(1)
    values, chosen = log_probs.topk(k)
    entries = [None]
    for label, *pairs, at in zip(ids[1:], chosen.tolist(), values.tolist(), log_probs, strict=True):
        entries.append(dict(zip(*pairs, strict=True)) | {label: at[label].item()})
    return entries


def serve(folder, rows, k):
    """Lines with all that a server returns: for prompt and response, and with more than log-probabilities."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return [
        row
        | {
            "prompt_logprobs": [
                entry
                and {str(token): {"logprob": value, "rank": 1, "decoded_token": "a"} for token, value in entry.items()}
                for entry in prompt_log_probs(model, row["prompt_ids"] + row["output_ids"], k)
            ]
        }
        for row in rows
    ]


def plain(served):
    """The same lines in lists."""
    lines = []
    for row in served:
        entries = row["prompt_logprobs"][len(row["prompt_ids"]) :]
        ids = [[*map(int, entry)] for entry in entries]
        log_probs = [[one["logprob"] for one in entry.values()] for entry in entries]
        lines.append({"output_ids": row["output_ids"], "top_ids": ids, "top_log_probs": log_probs})
    return lines


class Server:
    """In place of vLLM's LLM."""

    def __init__(self, model, max_logprobs):
        self.model, self.most = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64), max_logprobs

    def generate(self, prompts, params):
        assert (params.max_tokens, params.prompt_logprobs) == (1, self.most)
        for prompt in prompts:
            entries = prompt_log_probs(self.model, prompt["prompt_token_ids"], params.prompt_logprobs)
            found = [entry and {token: SimpleNamespace(logprob=x) for token, x in entry.items()} for entry in entries]
            yield SimpleNamespace(prompt_logprobs=found)


def test_with_all_tokens_the_loss_is_the_dense_one(tmp_path, write_jsonl, samples, teacher):
    path = write_jsonl(plain(serve(teacher, samples, 1024)))
    trainer = trainer_of(Run(tmp_path, **{**SECTIONS, "teacher": {"top_k": path}, "hard_weight": 0.25}))
    (batch, *_) = next(trainer.batches()).micro_batches
    assert len(batch.samples) > 1
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    with torch.no_grad():
        places = [(torch.tensor([x["input_ids"]]), slice(x["spans"][0] - 1, -1)) for x in batch.samples]
        logits = torch.cat([model(ids).logits[0, part] for ids, part in places])
    hidden = torch.randn(len(batch.labels), 8, dtype=torch.float64, requires_grad=True)
    student = LinearHead(hidden, torch.randn(1024, 8, dtype=torch.float64))
    loss = trainer.method.loss(student, batch, None)
    options = {"divergence": parse("jsd:0.5"), "labels": batch.labels, "hard_weight": 0.25, "reduction": "sum"}
    dense = fused_linear_divergence(*student[:2], logits, torch.eye(1024, dtype=torch.float64), **options)
    torch.testing.assert_close(loss, dense, rtol=1e-6, atol=0)  # the file is kept in float32
    pair = (torch.autograd.grad(x, hidden)[0] for x in (loss, dense))
    torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-7)


def test_the_scripts_of_the_docs_write_what_a_server_returns(
    tmp_path, write_jsonl, samples, teacher, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Run(tmp_path, **SECTIONS)
    pathlib.Path("recipe.json").rename("mine.json")
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Server, SamplingParams=SimpleNamespace))
    for script in re.findall("```python\n(.*?)```", DOCS.read_text(), re.DOTALL):
        exec(script.replace("TEACHER", teacher), {})
    assert [*map(json.loads, pathlib.Path("rows.jsonl").read_text().splitlines())] == samples
    paths = "top.jsonl", write_jsonl(serve(teacher, samples, 20))
    data = {**SECTIONS["data"], "train": "rows.jsonl"}
    ours, theirs = (
        trainer_of(Run(tmp_path, **{**SECTIONS, "data": data, "teacher": {"top_k": path}})) for path in paths
    )
    assert ours.method.top_k.note.startswith("20 to 21 tokens known for each trained token, from top.jsonl; ")
    assert "20 to 21 tokens known" in " ".join(describe(ours))
    for mine, other in zip(*(x.method.top_k.of([{"index": 3}, {"index": 0}]) for x in (ours, theirs)), strict=True):
        assert torch.equal(mine, other)


def test_one_file_is_data_and_teacher_and_a_resumed_run_is_the_same(
    tmp_path, write_jsonl, samples, teacher, capsys, monkeypatch
):
    path = write_jsonl(serve(teacher, samples, 5))
    sections = {**SECTIONS, "data": {**SECTIONS["data"], "train": path}, "teacher": {"top_k": path}}
    sections |= {"checkpoint": {"every_steps": 1}}
    whole = Run(tmp_path / "whole", **sections)
    assert whole() == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "method kd loss jsd:0.5" in shown
    assert "the loss is truncated: all others count as one (" in shown
    monkeypatch.setattr(top_k, "_read", None)  # the file is not parsed again
    resumed = Run(tmp_path / "resumed", **sections)
    crash_and_resume(resumed, monkeypatch, 2)
    assert_same(resumed, whole)


def test_cut_responses_use_the_beginning_and_rows_that_are_left_out_need_no_tokens(
    tmp_path, write_jsonl, samples, teacher
):
    rows = plain(serve(teacher, samples, 3))
    longest = max(len(row["prompt_ids"]) for row in samples)
    left_out = [len(row["prompt_ids"]) == longest for row in samples]
    path = write_jsonl([{} if out else row for row, out in zip(rows, left_out, strict=True)])
    data = {**SECTIONS["data"], "max_length": longest + 2, "max_prompt_length": longest - 1}
    trainer = trainer_of(Run(tmp_path, **{**SECTIONS, "data": data, "teacher": {"top_k": path}}))
    kept = [row for row, out in zip(rows, left_out, strict=True) if not out]
    train_set = trainer.data.train_set
    assert 0 < len(train_set) == len(kept) < len(rows)
    assert any(length > longest + 2 for length in train_set["row_length"][:])
    for index, row in enumerate(kept):
        ids, log_probs = trainer.method.top_k.of([{**train_set[index], "index": index}])
        start, stop = train_set[index]["spans"]
        assert len(ids) == stop - start
        for known, theirs, at, expected in zip(ids, row["top_ids"], log_probs, row["top_log_probs"], strict=False):
            assert known[known >= 0].tolist() == theirs
            assert at[known >= 0].tolist() == torch.tensor(expected).tolist()


def test_prompt_ids_are_those_that_the_teacher_has_read(tmp_path, write_jsonl, teacher):
    texts = {"prompt": "Add 3 and 4", "output": "7", "teacher_prompt": "The answer is 7. Add 3 and 4"}
    data = {"train": write_jsonl([texts] * 4, "texts.jsonl"), "max_length": 128}
    found = trainer_of(Run(tmp_path, **{**SECTIONS, "data": data, "teacher": {"path": teacher}})).data.train_set[0]
    starts = {key: found[f"{key}spans"][0] for key in ("", "teacher_")}
    assert starts[""] < starts["teacher_"]
    for key, start in starts.items():
        ids = found[f"{key}input_ids"]
        rows = [{"prompt_ids": ids[:start], "output_ids": ids[start:]}] * 4
        path = write_jsonl(serve(teacher, rows, 3), f"{key}top.jsonl")
        run = Run(tmp_path, **{**SECTIONS, "data": data, "teacher": {"top_k": path}})
        if key:
            assert len(trainer_of(run).method.top_k.of([{"index": 0}])[0]) == len(ids) - start
        else:
            with pytest.raises(ConfigError, match='line 1: "prompt_ids" has'):
                trainer_of(run)


def change(**values):
    """A broken line: the third, with other values. A function gets the old one."""

    def apply(rows):
        rows[2] |= {key: value(rows[2][key]) if callable(value) else value for key, value in values.items()}
        return rows

    return apply


def first(value):
    """The lists of a line with another first list."""
    return lambda lists: [value, *lists[1:]]


def without_numbers(rows):
    """As many entries as there are tokens, and no log-probabilities in them."""
    length = len(rows[2]["prompt_ids"] + rows[2]["output_ids"])
    return change(prompt_ids=None, prompt_logprobs=[{"a": 1}] * length)(rows)


WRONG = {
    "missing rows": (lambda rows: rows[:5], "has no line for quickstart:small row 6, and needs one for every row"),
    "other order": (lambda rows: rows[::-1], 'line 1: "output_ids"'),
    "other tokens": (change(output_ids=lambda ids: [9, *ids[1:]]), 'line 3: "output_ids": token 0 is 9, but '),
    "no end token": (change(output_ids=lambda ids: ids[:-1]), "tokenizer, chat template, rows or their order differ"),
    "other prompt": (change(prompt_ids=[1, 2]), 'line 3: "prompt_ids" has 2 tokens, but quickstart:small row 3 has '),
    "nothing": (change(top_ids=None), 'line 3: expected "top_ids" and "top_log_probs", lists of lists'),
    "a list too few": (change(top_ids=lambda lists: lists[1:]), "must have a list for each of output_ids"),
    "empty list": (change(top_ids=first([]), top_log_probs=first([])), "token 0 of the response has no tokens"),
    "text": (change(top_ids=first(["a"] * 4)), "must be whole numbers"),
    "logits": (change(top_log_probs=first([3.0, 2.0, 1.0, 0.5])), "token 0 of the response has probabilities that sum"),
    "infinity": (change(top_log_probs=first([-0.5, -torch.inf, -2, -3])), "has the log-probability -inf"),
    "foreign id": (change(top_ids=first([1, 2, 3, 1024])), "has id 1024, but the student has 1024 tokens"),
    "id twice": (change(top_ids=first([1, 2, 3, 2])), "token 0 of the response has id 2 twice"),
    "no numbers": (without_numbers, 'expected {"token id": {"logprob": '),
    "too few positions": (change(prompt_logprobs=[]), '"prompt_logprobs" must be a list of prompt and response'),
    "no object": (lambda rows: [5, *rows[1:]], 'line 1: expected an object with "output_ids", got 5'),
}


def test_a_file_that_does_not_fit_is_refused_in_one_line(tmp_path, write_jsonl, samples, teacher, subtests):
    served = [{**row, **top} for row, top in zip(samples, plain(serve(teacher, samples, 4)), strict=True)]
    for row in served:  # four for each token: without the label, where it is a fifth
        row |= {key: [one[:4] for one in row[key]] for key in ("top_ids", "top_log_probs")}
    for name, (spoil, words) in WRONG.items():
        with subtests.test(name):
            path = write_jsonl(spoil([{**row} for row in served]))
            run = Run(tmp_path, **{**SECTIONS, "teacher": {"top_k": path}})
            with pytest.raises(ConfigError) as error:
                trainer_of(run)
            assert str(error.value).startswith(f"teacher.top_k: {path}")
            assert words in str(error.value)
            assert "\n" not in str(error.value)


def test_what_needs_a_model_is_refused(tmp_path, capsys):
    for overrides, words in (
        (["method=gkd"], 'method "gkd" needs a teacher that reads what the student writes; give teacher.path'),
        (["temperature=2"], "temperature is 2.0, but teacher.top_k has no logits of the other tokens"),
        (["teacher.path=x"], "replaces the teacher's model, but path is given, too"),
        ([], "teacher.top_k: nowhere.jsonl: can't be read (No such file or directory)"),
    ):
        assert Run(tmp_path, *overrides, **{**SECTIONS, "teacher": {"top_k": "nowhere.jsonl"}})() == 2
        assert words in " ".join(capsys.readouterr().err.split())
    sft = Run(tmp_path, **{**SECTIONS, "method": "sft", "teacher": {"top_k": "nowhere.jsonl"}})
    assert trainer_of(sft).method.top_k is None  # as it reads no other teacher
