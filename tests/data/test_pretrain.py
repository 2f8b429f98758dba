"""The plain-text term: its blocks, its loss and gradient, and its place in a run."""

import errno
import json
import pathlib

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from abkd_fast.config.recipe import load
from abkd_fast.config.schema import PretrainConfig
from abkd_fast.data import pretrain, quickstart
from abkd_fast.data.batches import step_samples
from abkd_fast.data.rows import read_rows
from abkd_fast.errors import ConfigError, Interrupted
from abkd_fast.methods.base import Method
from abkd_fast.training.trainer import Trainer
from conftest import GPT2
from runs import Killed, Run, assert_same, at_step, crash, poison

TEXTS = [
    f"{row.values['prompt']}{row.values['output']}\n\n  Ünd {n}." for n, row in enumerate(read_rows("quickstart:dev"))
]
END = quickstart.tokenizer().eos_token_id


def blocks(path, length=16, **options):
    dataset = pretrain.load_blocks(PretrainConfig(path=str(path), **options), quickstart.tokenizer(), length)
    assert all(spans == [1, length] for spans in dataset["spans"])
    return dataset["input_ids"][:]


def expected(texts, length=16):
    stream = [token for text in texts for token in (*quickstart.tokenizer()(text)["input_ids"], END)]
    return [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]


@pytest.mark.parametrize("piece", [1, 500, pretrain.PIECE])
def test_documents_are_joined_and_cut(write_jsonl, monkeypatch, piece):
    monkeypatch.setattr(pretrain, "PIECE", piece)
    rows = [{"text": text, "meta": 1} for text in TEXTS[:30]]
    path = write_jsonl([*rows[:9], {"text": " \n"}, *rows[9:]])
    assert blocks(path) == expected(TEXTS[:30])
    assert blocks(path, 7) == expected(TEXTS[:30], 7)
    assert blocks(path, rows=20) == expected([*TEXTS[:20]])


def test_text_files(tmp_path, monkeypatch):
    whole = tmp_path / "book.txt"
    whole.write_text("\n".join(TEXTS[:5]))
    assert blocks(whole) == expected(["\n".join(TEXTS[:5])])
    # Longer ones are tokenized in pieces of whole lines, and still are one document.
    monkeypatch.setattr(pretrain, "PIECE", 300)
    (block,) = blocks(whole, len(quickstart.tokenizer()("\n".join(TEXTS[:5]))["input_ids"]) - 20)
    assert END not in block
    text = quickstart.tokenizer().decode(block)
    assert len(text) > 900
    assert whole.read_text().startswith(text)


def test_one_document_a_line(tmp_path):
    lines = tmp_path / "data.txt"
    lines.write_text("\n".join(text.replace("\n", "<@x(x!>") for text in TEXTS[:8]) + "\n")
    assert blocks(lines) == expected(TEXTS[:8])


def test_folders(tmp_path, write_jsonl, write_indexed):
    write_jsonl([{"text": text} for text in TEXTS[:4]], "b.jsonl")
    (tmp_path / "a.txt").write_text(TEXTS[5])
    assert blocks(tmp_path) == expected([TEXTS[5], *TEXTS[:4]])
    write_indexed(expected(TEXTS[6:9]))
    assert blocks(tmp_path) == expected(TEXTS[6:9])


@pytest.mark.parametrize("items", [3, pretrain.ITEMS])
def test_binary_files(write_indexed, tmp_path, monkeypatch, items):
    """The papers' blocks stay as they are; others are joined and cut anew, without another end token."""
    monkeypatch.setattr(pretrain, "ITEMS", items)
    papers = expected(TEXTS[:20])
    path = write_indexed(papers[:11])
    assert blocks(path) == papers[:11]
    assert blocks(path.replace(".bin", ".idx"), rows=5) == papers[:5]
    write_indexed(papers[11:], "train_1")
    assert blocks(tmp_path) == papers
    assert blocks(tmp_path, 8) == [half for block in papers for half in (block[:8], block[8:])]
    uneven = write_indexed([papers[0], papers[1][:3], [], papers[1][3:]], "other", "uint32")
    assert blocks(uneven) == papers[:2]


def test_result_is_kept_by_content(write_jsonl, tmp_path, monkeypatch, capsys):
    path = write_jsonl([{"text": text} for text in TEXTS[:9]])
    first = blocks(path)
    assert "tokenizing" in capsys.readouterr().out
    moved = write_jsonl([{"text": text} for text in TEXTS[:9]], "moved.jsonl")
    assert blocks(moved) == first
    assert "tokenizing" not in capsys.readouterr().out
    write_jsonl([{"text": text} for text in TEXTS[1:9]])
    assert blocks(path) == expected(TEXTS[1:9])


@pytest.mark.parametrize(("error", "raised"), [(Killed(), Killed), (OSError(errno.ENOSPC, "No space"), Interrupted)])
def test_half_written_result_is_never_used(write_jsonl, monkeypatch, error, raised):
    def fail(path, blocks):
        path.write_bytes(b"half")
        raise error

    path = write_jsonl([{"text": text} for text in TEXTS[:9]])
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "_write", fail)
        with pytest.raises(raised, match=r"can't be written .*No space" if raised is Interrupted else None):
            blocks(path)
    folder = pathlib.Path(datasets.config.HF_DATASETS_CACHE)
    assert not [*folder.rglob("*.arrow"), *folder.rglob("*.tmp")]
    assert blocks(path) == expected(TEXTS[:9])
    (arrow,) = folder.rglob("*.arrow")
    arrow.rename(f"{arrow}.4242.tmp")  # as a killed process leaves it
    assert blocks(path) == expected(TEXTS[:9])
    assert not [*folder.rglob("*.tmp")]


BAD = {
    "none.jsonl": (None, "none.jsonl: no such file or folder"),
    "none": (None, "none: no such file or folder"),
    "text.parquet": ("x", "expected a .jsonl, .txt or .bin file, or a folder with some"),
    "one.jsonl": ('{"text": "Hello."}', "is too short for one block of data.max_length = 16"),
    "empty.jsonl": ("", "is too short for one block"),
    "empty.txt": ("", "is too short for one block"),
    "keys.jsonl": ('{"text": "x"}\n{"txt": "x"}', 'line 2: expected a JSON object with "text"'),
    "type.jsonl": ('{"text": ["x"]}', 'line 1: expected a JSON object with "text"'),
    "list.jsonl": ("[1]", 'line 1: expected a JSON object with "text"'),
    "broken.jsonl": ('{"text": "x"}\n\n{"text": "x', "line 3: broken JSON"),
    "half.jsonl": ('{"text": "\\ud800"}', "line 1: has half of a surrogate pair"),
    "latin.jsonl": (b'{"text": "\xff"}', "is not UTF-8 text"),
    "latin.txt": (b"\xff", "is not UTF-8 text"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_text_is_named(tmp_path, name):
    content, message = BAD[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as error:
        blocks(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_folders_and_foreign_ids_are_named(tmp_path, write_indexed):
    with pytest.raises(ConfigError, match=r"expected a .* or a folder with some"):
        blocks(tmp_path)
    with pytest.raises(ConfigError, match="item 2: has token id 65535, but the tokenizer has 840 tokens"):
        blocks(write_indexed([[1, 2, 3], [4, 65535, 5]]))
    (tmp_path / "train_0.idx").unlink()
    with pytest.raises(ConfigError, match=r"train_0\.idx: can't be read"):
        blocks(tmp_path)


def test_batches_take_every_block_once_an_epoch(write_jsonl):
    path = write_jsonl([{"text": text} for text in TEXTS[:20]])
    dataset = pretrain.load_blocks(PretrainConfig(path=path), quickstart.tokenizer(), 64)
    batches = len(dataset) // 4
    assert batches > 2
    epochs = [
        [block["index"] for step in range(batches) for block in step_samples(dataset, 4, 10, epoch * batches + step)]
        for epoch in (0, 1)
    ]
    assert epochs[0] != epochs[1]
    assert all(len(set(epoch)) == 4 * batches for epoch in epochs)


@pytest.fixture
def text(write_jsonl):
    """Enough for 3 batches of 4 blocks of 128 tokens, so that a run of 12 steps sees each 4 times."""
    path = write_jsonl([{"text": text} for text in TEXTS[:32]], "text.jsonl")
    assert 12 <= len(blocks(path, 128)) < 16
    return path


def padded_loss(model, sequences, first_labels):
    """Logits and labels of the tokens with a loss, by transformers itself, on right-padded rows with a mask."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*ids, *[END] * (longest - len(ids))] for ids in sequences])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    counts = torch.zeros_like(mask, dtype=torch.bool)
    for row, (ids_, first) in enumerate(zip(sequences, first_labels, strict=True)):
        counts[row, first : len(ids_)] = True
    return logits[:, :-1][counts[:, 1:]], ids[counts]


@pytest.mark.parametrize("method", ["sft", "kd"])
def test_loss_and_gradient(tmp_path, text, method):
    """Several micro-batches of samples and of blocks: the gradient is that of the sum of both means, on padded rows."""
    config = {**GPT2, "vocab_size": 1024, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**config, "initializer_range": 0.5}))
    teacher.save_pretrained(tmp_path / "teacher")
    quickstart.tokenizer().save_pretrained(tmp_path / "teacher")
    overrides = [f"data.pretrain.path={text}", "data.pretrain.weight=0.3", f"method={method}", "loss=fkl"]
    overrides += [
        "train.dtype=float64",
        "train.max_tokens=128",
        "optim.clip_norm=1e9",
        f"teacher.path={tmp_path / 'teacher'}",
    ]
    run = Run(tmp_path / "run", student={"config": config})
    run_trainer = Trainer(load(run.arguments[1], overrides)[0])
    run_trainer.build()
    batch = next(run_trainer.batches())
    assert [part.is_pretrain for part in batch.micro_batches] == [False, False, True, True, True, True]
    samples, texts = batch.samples, batch.pretrain_blocks
    assert [len(samples), len(texts), *{len(block["input_ids"]) for block in texts}] == [4, 4, 128]
    captured = {}
    run_trainer.optimizer.register_step_pre_hook(
        lambda *_: captured.update({name: p.grad.clone() for name, p in run_trainer.student.named_parameters()})
    )
    weights = {name: p.detach().clone() for name, p in run_trainer.student.named_parameters()}
    loss, _, parts = run_trainer.train_step(batch)
    run_trainer.student.load_state_dict(weights, strict=False)

    model = run_trainer.student.model
    model.set_attn_implementation("sdpa")
    sequences = [sample["input_ids"] for sample in samples], [sample["spans"][0] for sample in samples]
    logits, labels = padded_loss(model, *sequences)
    by_method = torch.nn.functional.cross_entropy(logits, labels)
    if method == "kd":
        with torch.no_grad():
            theirs = padded_loss(teacher.double().eval(), *sequences)[0].log_softmax(1)
        by_method = (theirs.exp() * (theirs - logits.log_softmax(1))).sum(1).mean()
    by_text = torch.nn.functional.cross_entropy(*padded_loss(model, [block["input_ids"] for block in texts], [1] * 4))
    total = by_method + 0.3 * by_text
    model.zero_grad()
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-12)
    assert parts["loss_method"].item() == pytest.approx(by_method.item(), rel=1e-12)
    assert parts["loss_pretrain"].item() == pytest.approx(by_text.item(), rel=1e-12)
    for name, parameter in run_trainer.student.named_parameters():
        torch.testing.assert_close(captured[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_run_resumes_to_the_same_bits(tmp_path, monkeypatch, text, capsys):
    """Crashes within a window and within the second epoch of blocks. The parts of the logged loss sum up to it."""
    overrides = [f"data.pretrain.path={text}", "data.pretrain.weight=0.5"]
    undisturbed, run = (Run(tmp_path / name, *overrides) for name in ("undisturbed", "run"))
    assert undisturbed() == 0
    assert "blocks of 128 tokens, one a sample; weight 0.5" in capsys.readouterr().out
    points = [point for point in undisturbed.points() if point.get("kind") == "train"]
    assert len(points) == 4
    for point in points:
        assert point["loss"] == pytest.approx(point["loss_method"] + 0.5 * point["loss_pretrain"], rel=1e-6)
    assert points[-1]["loss_pretrain"] < points[0]["loss_pretrain"] - 0.1
    with monkeypatch.context() as patch:
        at_step(patch, 7, crash)
        with pytest.raises(Killed):
            run()
    file = pathlib.Path(text)
    original = file.read_text()
    file.write_text(original + json.dumps({"text": "More." * 99}))
    assert run("--resume") == 2
    assert "data.pretrain: its text or the tokenizer has changed since" in capsys.readouterr().err
    file.write_text(original)
    assert run("--resume") == 0
    assert "step-000005" in capsys.readouterr().out
    assert_same(run, undisturbed)


def test_work_counts_text_and_samples_count_rows(tmp_path, text, capsys):
    run = Run(tmp_path, f"data.pretrain.path={text}", "data.dev=null")
    assert run("--dry-run") == 0
    assert "blocks of 128 tokens, one a sample; weight 1" in capsys.readouterr().out
    assert run() == 0
    _, *others = Trainer(load(run.arguments[1], [*run.arguments[3::2], "run.name=other"])[0]).batches()
    tokens = sum(part.tokens for batch in others[2:5] for part in batch.micro_batches)  # of the second point
    assert tokens > 3 * 4 * 128
    point = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[1])
    assert point["tokens_per_second"] * point["seconds_per_sample"] == pytest.approx(tokens / 12)


def test_weight_zero_leaves_the_text_unread(tmp_path):
    runs = [
        Run(tmp_path / "without", "train.steps=3"),
        Run(tmp_path / "zero", "train.steps=3", "data.pretrain.path=nowhere.txt", "data.pretrain.weight=0"),
    ]
    assert [run() for run in runs] == [0, 0]
    assert_same(*runs)


def test_run_checks_text_first(tmp_path, text, capsys):
    assert Run(tmp_path / "a", "data.pretrain.path=nowhere.txt")() == 2
    assert "nowhere.txt: no such file" in capsys.readouterr().err
    assert Run(tmp_path / "b", f"data.pretrain.path={text}", "data.pretrain.rows=5")() == 2
    assert "blocks of 128 tokens are fewer than train.batch_size = 4" in capsys.readouterr().err
    assert not (tmp_path / "b" / "test").exists()


def test_non_finite_text_loss_stops_the_run(tmp_path, monkeypatch, text, capsys):
    finite = Method.pretrain_loss
    monkeypatch.setattr(Method, "pretrain_loss", lambda *args, **kwargs: np.inf * finite(*args, **kwargs))
    assert Run(tmp_path, f"data.pretrain.path={text}", "data.dev=null")() == 1
    assert "error: step 1: loss inf" in capsys.readouterr().err


def test_skipped_steps_are_in_no_mean(tmp_path, monkeypatch, text):
    run = Run(tmp_path, f"data.pretrain.path={text}", "train.on_nonfinite=skip", "log.every_steps=1", "train.steps=3")
    poison(monkeypatch, 2)
    assert run() == 0
    points = [point for point in run.points() if point.get("kind") == "train"]
    assert [point["loss_pretrain"] is None for point in points] == [False, True, False]
