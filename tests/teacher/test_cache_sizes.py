"""What a cache takes of the disk: the output projection in the teacher's type, one file for several caches."""

import json
import os
import re
import zlib

import pytest
import safetensors.torch
import torch
from test_cache import change_index, flip, losses, only
from test_cache import recipe as recipe  # a fixture
from test_states_folder import given, trainer_of
from test_states_folder import small as small  # a fixture
from transformers import AutoModelForCausalLM

from abkd_fast import cache
from abkd_fast.config.recipe import load
from abkd_fast.console import format_bytes
from abkd_fast.files import disk_bytes
from abkd_fast.teacher import housekeeping, store
from abkd_fast.training import dry_run
from abkd_fast.training.trainer import Trainer

HEAD = "head.safetensors"


@pytest.fixture
def teacher_in_16_bits(small, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "teacher")


def stored_types(folder):
    return {name: tensor.dtype for name, tensor in safetensors.torch.load_file(folder / HEAD).items()}


def said(path, *overrides):
    (line,) = [line for line in dry_run.describe(Trainer(load(path, overrides)[0])) if line.startswith("  cache ")]
    return line


def test_the_projection_of_a_checkpoint_in_16_bits(small, teacher_in_16_bits, cache_folder):
    wanted = "cache.mode=disk"
    expected = losses(trainer_of(small, "cache.mode=off"))
    at_most = re.search(r"at most (\S+) MB on the disk", said(small, wanted))[1]
    for _ in ("built", "found"):
        teacher = trainer_of(small, wanted)
        assert losses(teacher) == expected
        assert teacher.teachers["teacher"].weight.dtype == torch.float32
    folder = only(cache_folder)
    assert stored_types(folder) == {"weight": torch.bfloat16}
    taken = f"{folder} ({format_bytes(disk_bytes(folder))} on the disk)"
    assert taken in teacher.teachers["teacher"].note
    assert f"in {taken}, found" in said(small, wanted)
    assert disk_bytes(folder) < 1e6 * float(at_most)
    given_states = trainer_of(small, *given(folder))
    assert losses(given_states) == expected
    assert taken in given_states.teachers["teacher"].note
    # One of an earlier version is in the type of the computation, and says nothing about types.
    content = safetensors.torch.save({"weight": teacher.teachers["teacher"].weight})
    (folder / HEAD).write_bytes(content)
    change_index(folder, lambda index: {**index, "files": {**index["files"], HEAD: zlib.crc32(content)}})
    assert losses(trainer_of(small, wanted)) == expected
    assert (folder / HEAD).read_bytes() == content


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_projections_come_back_to_the_bit(small, cache_folder, kept):
    """Numbers that only `kept` can hold, among them a negative zero and the smallest; NaN is kept as it is."""
    file = Trainer(load(small)[0]).teachers.caches["teacher"].file
    file.folder.mkdir(parents=True)
    weight = torch.randn(9, 4, dtype=torch.float64).to(kept)
    weight[0, :3] = torch.tensor([-0.0, 0.0, torch.finfo(kept).smallest_normal / 2])
    for dtype in {torch.float32, torch.float64} - ({torch.float32} if kept == torch.float64 else set()):
        wide, bias = weight.to(dtype), torch.full((9,), 1 / 3, dtype=torch.float64)
        file.write_head(wide, bias)
        assert stored_types(file.folder) == {"weight": kept, "bias": torch.float64}
        got, got_bias = store.read_head(file.folder)
        assert got.dtype == dtype
        assert torch.equal(got.view(torch.uint8), wide.view(torch.uint8))
        assert torch.equal(got_bias, bias)
    wide[0, 0] = -torch.nan
    file.write_head(wide, None)
    assert torch.equal(store.read_head(file.folder)[0].view(torch.uint8), wide.view(torch.uint8))


def head_written(file, folder, weight):
    """Writes the projection of a cache that has nothing else yet."""
    file.folder, file.files = folder, {}
    folder.mkdir(parents=True, exist_ok=True)
    file.write_head(weight, None)
    return folder


def test_caches_of_one_teacher_share_its_projection(small, cache_folder, capsys, monkeypatch):
    file, weight = Trainer(load(small)[0]).teachers.caches["teacher"].file, torch.randn(1024, 48)
    first, second = (head_written(file, cache_folder / (digit * 32), weight) for digit in "01")
    assert os.path.samefile(first / HEAD, second / HEAD)
    size = (first / HEAD).stat().st_blocks * 512
    assert disk_bytes(first, second) == disk_bytes(first) + disk_bytes(second) - size
    assert housekeeping.folders(cache_folder) == [first, second]
    assert not os.path.samefile(head_written(file, cache_folder / ("2" * 32), weight + 1) / HEAD, first / HEAD)

    whole = (first / HEAD).read_bytes()
    flip(first / HEAD, 5000)
    assert (second / HEAD).read_bytes() != whole, "damage of one is damage of both"
    for folder in (first, second):  # what is damaged is not linked
        head_written(file, folder, weight)
        assert (folder / HEAD).read_bytes() == whole
    assert os.path.samefile(first / HEAD, second / HEAD)

    own = disk_bytes(first) - size
    assert cache.main(["--clear", first.name]) == 0
    assert capsys.readouterr().out.split()[:2] == format_bytes(own).split(), "what the other has is not free again"
    assert torch.equal(store.read_head(second)[0], weight)

    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    assert not os.path.samefile(head_written(file, first, weight) / HEAD, second / HEAD)
    assert not [*cache_folder.rglob("*.tmp")]


def test_a_new_cache_needs_room_for_its_projection(small):
    file = Trainer(load(small)[0]).teachers.caches["teacher"].file
    assert file.missing_bytes == file.largest_bytes > sum(file.shards.sizes) + 1024 * 48 * 4
    assert json.loads(file.origin.config)["hidden_size"] == 48
