"""Answers to dev prompts in the log: log.samples."""

import errno
import json
import signal

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import chat
from abkd_fast import report
from abkd_fast.config.recipe import load
from abkd_fast.errors import printable
from abkd_fast.evaluation import figures, samples
from abkd_fast.generation.sampling import SamplingParams, sample
from abkd_fast.training import dev_eval
from abkd_fast.training.given import Given
from abkd_fast.training.metrics import RunLog
from abkd_fast.training.prepare import Prepared
from abkd_fast.training.trainer import Trainer
from finished_runs import write_run
from runs import TIED, Run, assert_same

WITH = "log.samples=3"
EVAL = {"every_steps": 4, "max_new_tokens": 8}
STEPS = [0, 4, 8, 12]
EVIL = "\x1b[31m[bold red]```\n# A heading\n````\r\u202e<script>"


def written(run):
    return [json.loads(line) for line in (run.folder / samples.FILE).read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run with three samples, of which two are answered for ROUGE-L, too; and what a function was told."""
    run, told = Run(tmp_path_factory.mktemp("samples"), WITH, eval={**EVAL, "rouge_rows": 2}), []
    (config,) = load(run.arguments[1], [WITH])
    Trainer(config, prepared=Prepared(given=Given(on_eval=told.append))).train()
    return run, told


def test_samples_are_answers_of_the_student(undisturbed):
    run, told = undisturbed
    lines = written(run)
    assert [line["step"] for line in lines] == [step for step in STEPS for _ in range(3)]
    assert [{"step": point["step"], **sample} for point in told for sample in point["samples"]] == lines
    model, tokenizer = (
        loader.from_pretrained(run.folder / "final") for loader in (AutoModelForCausalLM, AutoTokenizer)
    )
    prompts = [tokenizer(line["prompt"])["input_ids"] for line in lines[-3:]]
    chosen = SamplingParams(max_new_tokens=8, eos_token_ids=(0,))
    responses = sample(model, prompts, chosen, [(10 << 32) + row for row in range(3)])
    for line, response in zip(lines[-3:], responses, strict=True):
        assert line["response"] == tokenizer.decode(response, skip_special_tokens=True).strip()
        assert line["prompt"].startswith("Below is an instruction")
        assert line["row"] == f"quickstart:dev row {lines[-3:].index(line) + 1}"
    dev = [point["rouge_l"] for point in run.points() if point.get("kind") == "dev"]
    assert dev[-1] == pytest.approx((lines[-3]["rouge_l"] + lines[-2]["rouge_l"]) / 2)
    board = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    tags = [f"samples/{number}/text_summary" for number in (1, 2, 3)]
    assert tags == sorted(tag for tag in board.Tags()["tensors"] if tag.startswith("samples"))
    events = board.Tensors(tags[2])
    assert [event.step for event in events] == STEPS
    assert samples.fenced(lines[-1]["response"]) in events[-1].tensor_proto.string_val[0].decode()


def test_training_and_scores_are_the_same_without(undisturbed, tmp_path):
    run = Run(tmp_path, eval={**EVAL, "rouge_rows": 2})
    assert run() == 0
    assert_same(run, undisturbed[0])
    assert not (run.folder / samples.FILE).exists()


def test_a_signal_during_the_answers_leaves_no_double_lines(undisturbed, tmp_path, monkeypatch):
    run = Run(tmp_path, WITH, eval={**EVAL, "rouge_rows": 2})
    with monkeypatch.context() as patch:
        score, count = dev_eval.score_response, 0

        def score_and_be_stopped(*arguments):
            nonlocal count
            count += 1
            if count == 3 + 3:  # after step 4, the one that only the log wants
                signal.raise_signal(signal.SIGTERM)
            return score(*arguments)

        patch.setattr(dev_eval, "score_response", score_and_be_stopped)
        assert run() == 75
    lines = written(run)
    assert [line["step"] for line in lines] == [0] * 3
    path = run.folder / samples.FILE  # a killed run may leave lines of later steps, and an unfinished one
    path.write_text(path.read_text() + json.dumps({**lines[0], "step": 8}) + "\n" + '{"step": 8, "row')
    assert run("--resume") == 0
    assert written(run) == written(undisturbed[0])
    assert_same(run, undisturbed[0])


def test_arbitrary_text_and_a_full_disk(tmp_path, monkeypatch, capsys):
    """Chat rows with an adapter. The answer is markup and control characters, and there is no room for the first."""
    scored = {"response": EVIL, "rouge_l": 0.0, "exact_match": False}
    monkeypatch.setattr(dev_eval, "score_response", lambda *_: scored)
    opened = RunLog._open

    def open_full(log):
        opened(log)
        log.sample_file = FullAtFirst(log.sample_file)

    monkeypatch.setattr(RunLog, "_open", open_full)
    chat.write_tokenizer(tmp_path / "chat")
    rows = chat.write_conversations(tmp_path / "chat" / "rows.jsonl", 4)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**TIED)).save_pretrained(tmp_path / "chat")
    sections = {"tokenizer": None, "student": {"path": str(tmp_path / "chat"), "lora": {"rank": 2}}, "eval": EVAL}
    run = Run(
        tmp_path, "log.samples=1", "train.steps=2", data={"train": rows, "dev": rows, "max_length": 128}, **sections
    )
    assert run() == 0
    out = capsys.readouterr().out
    assert "no samples of step 0 ([Errno 28] No space left on device); training goes on" in out
    assert f"step 2/2  sample 1 of 1: {printable(EVIL)}" in out
    assert "\x1b" not in out
    (line,) = written(run)
    assert (line["step"], line["response"]) == (2, EVIL)
    assert line["prompt"].endswith("<|im_start|>assistant\n")


class FullAtFirst:
    """A file on a disk that has no room for the first line."""

    def __init__(self, file):
        self.file, self.is_full = file, True

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, line):
        if self.is_full:
            self.is_full = False
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(line)


def test_samples_need_dev_rows(tmp_path, capsys):
    run = Run(tmp_path, WITH, "data.dev=null")
    assert run() == 2
    assert "log.samples: there is no data.dev whose rows could be answered" in capsys.readouterr().err
    assert Run(tmp_path, "log.samples=-1")() == 2
    assert "log.samples is -1, expected at least 0" in capsys.readouterr().err


def test_report_has_the_answers_as_they_are(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    folder = write_run(tmp_path, "run")
    lines = [
        {"step": step, "row": f"dev line {row}", "prompt": f"`Question` {row}", "output": ["a", "b"], "response": text}
        for step in range(20)
        for row, text in ((1, f"answer {step}"), (2, EVIL))
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3}\n[1]\n{"step": 20, "ro'
    (folder / samples.FILE).write_text(content)
    assert samples.read_samples(folder) == lines
    for name in ("run_curves", "rouge_curves"):  # drawing takes seconds
        monkeypatch.setattr(figures, name, lambda *_: [])
    assert report.main([str(folder)]) == 0
    text = (folder / "report.md").read_text()
    head, *rest = text.split("## Answers over training\n")
    assert "![loss, speed and memory](curves.png)" in head
    (rest,) = rest
    assert [f"Step {step}:" in rest for step in range(20)] == [step in (0, 4, 8, 11, 15, 19) for step in range(20)]
    assert "6 of 20 evaluations are here" in rest
    outside, fence = [], None
    for line in rest.splitlines():
        if fence is None and line.startswith("```"):
            fence = line.removesuffix("text")
        elif line == fence:
            fence = None
        elif fence is None:
            outside.append(line)
    assert fence is None
    assert {line for line in outside if line.startswith("#")} == {"### Prompt 1", "### Prompt 2"}
    assert not any("script" in line for line in outside)
    assert all(character.isprintable() or character == "\n" for character in text)
    assert "\n# A heading\n" in rest, "within a fence"


def test_fences_hold_any_text():
    for text in ("", "`", "```", "~~~", "````text", "\n\n", EVIL):
        first, *inner, last = samples.fenced(text).split("\n")
        assert first == last + "text"
        assert last not in inner
        assert inner == [printable(line) for line in text.split("\n")]
