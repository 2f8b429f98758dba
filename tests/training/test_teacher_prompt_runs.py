"""Training under a teacher with its own prompt, against a padded computation in float64 by transformers' own pass."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import chat
from abkd_fast import cache
from abkd_fast.config.recipe import load
from abkd_fast.data import quickstart
from abkd_fast.data.batches import count_labels, prompt_of, teacher_view
from abkd_fast.data.chat import PromptFormat
from abkd_fast.data.rows import read_rows
from abkd_fast.data.teacher_prompts import TeacherFormat
from abkd_fast.data.tokenize import tokenize
from abkd_fast.errors import ConfigError
from abkd_fast.methods.replay import ReplayBuffer
from abkd_fast.teacher.store import Layout, hash_samples
from abkd_fast.teacher.teacher import CachedTeacher, Teacher
from abkd_fast.teacher.top_k import TopKTargets
from abkd_fast.training.trainer import Trainer
from conftest import LLAMA
from runs import Run, step_and_gradients

MODEL = {
    **LLAMA,
    "vocab_size": 1026,
    "max_position_embeddings": 192,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "eos_token_id": 0,
    "bos_token_id": 0,
}
EXACT = "train.dtype=float64", "loss=fkl", "optim.clip_norm=1e9", "train.batch_size=5", "data.dev=null"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher with a chat template, and rows of text and of one to three turns, some with a prompt of the teacher."""
    folder = tmp_path_factory.mktemp("prompts")
    torch.manual_seed(0)
    config = AutoConfig.for_model(**MODEL, initializer_range=0.3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "teacher")
    chat.write_tokenizer(folder / "teacher")
    chat.write_conversations(folder / "chat.jsonl", 12)
    rows = [json.loads(line) for line in (folder / "chat.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows[1:]):
        hint = {"role": "user", "content": "Be kind. " * number + row["messages"][0]["content"]}
        row["teacher_messages"] = [{"role": "system", "content": "Be kind."}, hint, *row["messages"][1:]]
    plain = {"prompt": "Add 1 and 2.\n", "output": "It is 3."}
    rows += [
        plain,
        {**plain, "teacher_prompt": "1 and 2 are 3.\n" * 5 + plain["prompt"]},
        {**plain, "output": "3 " * 40},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def make(folder, tmp_path):
    def make(method, *overrides, name="run"):
        data = f"data.train={folder}/rows.jsonl", "data.train_rows=null", "data.max_length=96", "data.dev=null"
        models = f"teacher.path={folder}/teacher", f"tokenizer={folder}/teacher", "student.config.vocab_size=1026"
        return Run(tmp_path / name, f"method={method}", *models, *data, "train.steps=3", *overrides)

    return make


def trainer_of(run):
    trainer = Trainer(load(run.arguments[1], run.arguments[3::2])[0])
    trainer.build()
    return trainer


def padded(model, samples):
    """The logits of the trained tokens [N, V] of a whole batch, padded and masked."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    ids = torch.stack([F.pad(torch.tensor(one["input_ids"]), (0, longest - len(one["input_ids"]))) for one in samples])
    mask = torch.stack([torch.arange(longest) < len(one["input_ids"]) for one in samples]).long()
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    pairs = [[*zip(one["spans"][::2], one["spans"][1::2], strict=True)] for one in samples]
    return torch.cat([logits[n, a - 1 : b - 1] for n, own in enumerate(pairs) for a, b in own])


def assert_is_padded(trainer, folder, batch):
    """Loss and gradient of a step are those of forward KL between padded logits."""
    value, gradients = step_and_gradients(trainer, batch)
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float64)
    student = trainer.student.model.eval()
    student.set_attn_implementation("sdpa")
    with torch.no_grad():
        p = padded(teacher, [*map(teacher_view, batch.samples)]).log_softmax(1)
    q = padded(student, batch.samples).log_softmax(1)
    expected = (p.exp() * (p - q)).sum(1).mean()
    student.zero_grad()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-11)
    for name, parameter in trainer.student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("mode", "system"), [("off", "null"), ("disk", "Be quick.")])
def test_losses_and_gradients_are_those_of_a_padded_computation(make, folder, mode, system):
    trainer = trainer_of(make("kd", *EXACT, "student.dropout=0", f"cache.mode={mode}", f"teacher.system={system}"))
    assert isinstance(trainer.teachers["teacher"], CachedTeacher if mode == "disk" else Teacher)
    batches = [batch for batch, _ in zip(trainer.batches(), range(3), strict=False)]
    assert {len(sample["spans"]) for batch in batches for sample in batch.samples} == {2, 4, 6}
    assert any(len(one["teacher_input_ids"]) > 96 for batch in batches for one in batch.samples)
    assert_is_padded(trainer, folder, batches[0])


def test_written_responses_are_scored_after_the_teachers_prompt(make, folder):
    more = "on_policy.replay_rows=0", "sampling.max_new_tokens=6", "student.dropout=0"
    trainer = trainer_of(make("imitkd", *EXACT, *more))
    given = next(trainer.batches())
    batch = trainer.select_batch(given)
    assert len(batch.samples) == 5
    for old, new in zip(given.samples, batch.samples, strict=True):
        for key in ("", "teacher_"):
            start = old[f"{key}spans"][-2]
            assert new[f"{key}input_ids"][:start] == old[f"{key}input_ids"][:start]
            assert new[f"{key}spans"] == [start, len(new[f"{key}input_ids"])]
        assert new["input_ids"][new["spans"][0] :] == new["teacher_input_ids"][new["teacher_spans"][0] :]
    kept, resumed = ReplayBuffer(5, 0), ReplayBuffer(5, 0)
    kept.add(batch.samples)
    resumed.load_state_dict(json.loads(json.dumps(kept.state_dict())))
    assert [*map(teacher_view, resumed.samples)] == [*map(teacher_view, batch.samples)]
    assert_is_padded(trainer, folder, batch)


def test_a_repacked_batch_of_another_device_or_of_a_sharded_teacher_gives_the_same_states(make, monkeypatch):
    """On a GPU, and with sharded weights, the teacher's samples are packed by their own lengths."""
    trainer = trainer_of(make("kd", *EXACT, "cache.mode=off"))
    (batch, *_) = next(trainer.batches()).micro_batches
    alone = trainer.teachers["teacher"].linear_head(batch).hidden
    read = []
    monkeypatch.setattr("abkd_fast.distributed.is_sharded", lambda model: True)
    monkeypatch.setattr("abkd_fast.distributed.all_reduce_max", lambda count: count + 2)  # another rank has more
    forward = trainer.teachers["teacher"].model.forward
    monkeypatch.setattr(
        trainer.teachers["teacher"].model, "forward", lambda part, loss: read.append(part.tokens) or forward(part, loss)
    )
    together = trainer.teachers["teacher"].linear_head(batch).hidden
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
    views = [*map(teacher_view, batch.samples)]
    longest = max(batch.tokens, *(len(view["input_ids"]) for view in views))
    assert max(read) <= longest
    assert read[-1] == read[-2] == read[-3]  # the passes for the other rank
    assert sum(read[:-2]) == sum(len(view["input_ids"]) for view in views) > batch.tokens


def test_cached_and_given_states_have_the_same_bits_and_are_of_what_the_teacher_reads(make, cache_folder):
    def losses(*overrides):
        trainer = trainer_of(make("ab", *overrides, name=str(len(runs))))
        runs.append(trainer)
        return [trainer.train_step(batch)[0].item() for batch in trainer.batches()]

    runs, system = [], "teacher.system=Be quick."
    expected = losses("cache.mode=off", system)
    assert losses("cache.mode=disk", system) == expected
    assert cache.main(make("ab", system, name="built").arguments) == 0  # finds them
    (folder,) = (path.parent for path in cache_folder.rglob("samples.safetensors"))
    given = "teacher.path=null", f"teacher.hidden_states={folder}"
    assert losses(*given, system) == expected
    with pytest.raises(ConfigError, match="15 of 15 samples are not in it"):
        losses(*given)
    train_set = runs[0].data.train_set
    layout = Layout(train_set)
    assert layout.rows == sum(map(count_labels, train_set))
    lengths = [len(train_set[index]["teacher_input_ids"]) for block in layout.blocks for index in block]
    assert lengths == sorted(lengths, reverse=True)
    own = train_set.remove_columns(["teacher_input_ids", "teacher_spans"])
    assert hash_samples(train_set) != hash_samples(own)


def test_a_served_teacher_has_read_its_own_prompt(write_jsonl):
    tokenizer = quickstart.tokenizer()
    row = {"prompt": "Add 1 and 2.\n", "output": "It is 3.", "teacher_prompt": "1 and 2 are 3.\n"}
    form = TeacherFormat(tokenizer, PromptFormat())
    dataset = tokenize(read_rows(write_jsonl([row])), tokenizer, 64, teacher=form).dataset
    own, read = (prompt_of(view) for view in (dataset[0], teacher_view(dataset[0])))
    response = dataset[0]["input_ids"][len(own) :]
    lines = [
        {
            "prompt_ids": prompt,
            "output_ids": response,
            "top_ids": [[7]] * len(response),
            "top_log_probs": [[-1.0]] * len(response),
        }
        for prompt in (read, own)
    ]
    paths = [write_jsonl([line], f"{number}.jsonl") for number, line in enumerate(lines)]
    TopKTargets(paths[0], dataset, ["rows.jsonl line 1"], 1024)
    with pytest.raises(ConfigError, match='"prompt_ids" has'):
        TopKTargets(paths[1], dataset, ["rows.jsonl line 1"], 1024)


def test_first_lines_and_shown_rows_say_what_the_teacher_reads(make, capsys, folder):
    run = make("ab")
    assert run("--dry-run") == 0
    assert "the teacher reads a prompt of its own in 12 of 15 rows; all prompts: on average" in capsys.readouterr().out
    assert run("--show-rows", "2") == 0
    plain, told = map(json.loads, capsys.readouterr().out.splitlines())
    assert "teacher_text" not in plain
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    assert told["teacher_text"].startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n")
    assert told["teacher_text"].endswith(told["trained"][-1])
    assert told["teacher_tokens"] == len(tokenizer(told["teacher_text"])["input_ids"]) > told["tokens"]
    assert make("sft", "teacher.path=null", "teacher=null", name="sft")("--dry-run") == 0
    note = "12 rows have a prompt of the teacher's own, which method sft does not read"
    assert note in capsys.readouterr().out


REFUSED = {
    "too long": (
        ["kd", "teacher.system=" + "Be kind. " * 40],
        r"rows.jsonl line \d+: the teacher reads \d+ tokens with its own prompt, and has 192 positions; shorten",
    ),
    "too long for what is written": (
        ["imitkd", "loss=fkl", "teacher.system=" + "Be kind. " * 20, "on_policy.replay_rows=0"],
        r"the teacher reads \d+ tokens with its own prompt",
    ),
    "both write": (
        ["minillm", "loss=rkl", "minillm.rollouts=4"],
        "method minillm draws tokens from a mixture of both models after one prompt, but the teacher has prompts of",
    ),
    "no template": (
        ["kd", "teacher.chat_template=nowhere.jinja"],
        r"teacher.chat_template: nowhere.jinja: can't be read",
    ),
    "reserved": (["kd", 'teacher.chat_template_kwargs={"tools": 1}'], "chat_template_kwargs: tools is no value of the"),
}


@pytest.mark.parametrize(("arguments", "error"), REFUSED.values(), ids=REFUSED)
def test_what_cant_be_read_is_refused_before_weights_load(make, arguments, error):
    run = make(*arguments)
    with pytest.raises(ConfigError, match=error):
        Trainer(load(run.arguments[1], run.arguments[3::2])[0])


def test_a_system_text_may_be_long_and_is_no_path(make):
    text = "Be kind. " * 600
    run = make("kd", f"teacher.system={text}")
    assert load(run.arguments[1], run.arguments[3::2])[0].teacher.system == text
    with pytest.raises(ConfigError, match=r"teacher\.system must be text, got 7"):
        load(run.arguments[1], ["teacher.system=7"])


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", ["kd", "imitkd"])
def test_two_processes_have_the_losses_of_one(make, parallel, method):
    more = *EXACT, "train.batch_size=6", "sampling.max_new_tokens=4", "on_policy.replay_rows=0", "student.dropout=0"
    more = tuple(override for override in more if method == "imitkd" or "on_policy" not in override)
    one, two = (
        make(method, *more, "log.every_steps=1", "cache.mode=off", *sets, name=name)
        for name, sets in (("one", ()), ("two", (f"train.parallel={parallel}",)))
    )
    assert one() == 0
    launch = "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "abkd_fast.train"
    subprocess.run([sys.executable, "-m", *launch, *two.arguments], check=True, timeout=300)
    ours, theirs = ([point["loss"] for point in run.points() if point.get("kind") == "train"] for run in (two, one))
    assert len(ours) == 3
    assert ours == pytest.approx(theirs, rel=1e-9)
