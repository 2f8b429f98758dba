"""Cached states that a GPU's run reads from the disk before the step that needs them."""

import pytest
import torch

from abkd_fast.config.recipe import load
from abkd_fast.data.batches import pack
from abkd_fast.teacher.teacher import CachedTeacher, OnPolicyTeacher
from abkd_fast.training.trainer import Trainer
from runs import TIED, Run


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """A run whose teacher is mapped from the disk, as if for a GPU. Page-locked memory is ordinary memory here."""
    cache = {"mode": "disk", "dir": str(tmp_path / "cache")}
    run = Run(tmp_path, method="ab", teacher={"config": TIED}, cache=cache)
    trainer = Trainer(load(run.arguments[1], [])[0])
    trainer.build()
    empty = torch.empty
    monkeypatch.setattr(CachedTeacher, "_is_on_device", False)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    return trainer


def test_a_batch_brings_the_states_that_it_would_have_read(trainer):
    teacher = trainer.teachers["teacher"]
    for batch in list(trainer.batches())[:3]:
        for plain, read in zip(batch.micro_batches, trainer._for_gpu(batch).micro_batches, strict=True):
            expected = teacher.linear_head(plain).hidden
            assert torch.equal(read.teacher_hidden, expected)
            teacher.rows, rows = None, teacher.rows  # the step reads nothing
            assert torch.equal(teacher.linear_head(read).hidden, expected)
            assert torch.equal(read.to(torch.device("cpu")).teacher_hidden, expected)
            teacher.rows = rows


def test_an_on_policy_teacher_reads_the_datas_samples_ahead(trainer):
    teacher = OnPolicyTeacher(type("Live", (), {"model": trainer.student})(), trainer.teachers["teacher"])
    batch = next(trainer.batches()).micro_batches[0]
    expected = teacher.linear_head(batch).hidden
    read = teacher.read_ahead(batch)
    assert teacher.uncached(read.samples) == []
    trainer.teachers["teacher"].rows = None
    assert torch.equal(teacher.linear_head(read).hidden, expected)


def test_plain_text_and_states_on_the_device_are_left_alone(trainer, monkeypatch):
    (block,) = pack([{"input_ids": [1, 2, 3], "spans": [1, 3]}], max_tokens=8)
    block = type(block)(**{**vars(block), "is_pretrain": True})
    assert trainer.teachers["teacher"].read_ahead(block) is block
    monkeypatch.setattr(CachedTeacher, "_is_on_device", True)
    batch = next(trainer.batches()).micro_batches[0]
    assert trainer.teachers["teacher"].read_ahead(batch) is batch
