import json
import os
import shutil
import signal
import subprocess
import sys
import time

import datasets
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from abkd_fast.config.recipe import load
from abkd_fast.data import quickstart
from abkd_fast.errors import ConfigError
from abkd_fast.models import identity
from abkd_fast.teacher import store
from abkd_fast.teacher.teacher import CachedTeacher, Teacher
from abkd_fast.train import main
from abkd_fast.training.trainer import Trainer
from conftest import GPT2, LLAMA

LENGTH = 128
SHARD = "states-00001-of-00001.safetensors"
MODELS = {
    "gpt2": {**GPT2, "vocab_size": 1024, "n_embd": 48, "bos_token_id": 0, "eos_token_id": 0},
    "llama": {**LLAMA, "vocab_size": 1024, "hidden_size": 48, "bos_token_id": 0, "eos_token_id": 0},
}


def make_teacher(folder, kind="llama", seed=0):
    set_seed(seed)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[kind])).save_pretrained(folder)
    quickstart.tokenizer().save_pretrained(folder)


TRAIN = {"epochs": 2, "batch_size": 8, "max_tokens": 256, "device": "cpu"}


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe with a student that has dropout and a teacher in a folder; returns its path."""

    def write(kind="llama", **sections):
        make_teacher(tmp_path / "teacher", kind)
        student = {"hidden_size": 32} if kind == "llama" else {"n_embd": 32, "resid_pdrop": 0.1}
        values = {
            "run": {"name": "test", "dir": str(tmp_path / "runs")},
            "method": "ab",
            "tokenizer": "quickstart",
            "student": {"config": {**MODELS[kind], **student}},
            "teacher": {"path": str(tmp_path / "teacher")},
            "data": {"train": "quickstart:small", "train_rows": 60, "max_length": LENGTH},
            "train": TRAIN,
            **sections,
        }
        path = tmp_path / "recipe.json"
        path.write_text(json.dumps(values))
        return str(path)

    return write


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(store, "BLOCK_TOKENS", 300)


def loaded(path, *overrides):
    trainer = Trainer(load(path, overrides)[0])
    trainer.build()
    return trainer


def losses(trainer):
    return [trainer.train_step(batch)[0].item() for batch in trainer.batches()]


def only(folder):
    """The one cache in a folder of caches."""
    (found,) = [path for path in folder.iterdir() if path.is_dir()]
    return found


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("float64", marks=pytest.mark.slow)])
def test_losses_are_the_same_bits_in_every_mode(recipe, kind, dtype):
    path = recipe(kind, train={**TRAIN, "epochs": 1})
    results = {}
    for mode in ("off", "disk", "disk again", "memory"):
        trainer = loaded(path, f"cache.mode={mode.split()[0]}", f"train.dtype={dtype}")
        assert isinstance(trainer.teachers["teacher"], Teacher if mode == "off" else CachedTeacher)
        results[mode] = losses(trainer)
    assert len(results["off"]) == 60 // 8
    assert results["disk"] == results["disk again"] == results["memory"] == results["off"]
    # The packing of the training's micro-batches plays no part either.
    assert losses(loaded(path, "cache.mode=disk", f"train.dtype={dtype}", "train.max_tokens=128")) == losses(
        loaded(path, "cache.mode=off", f"train.dtype={dtype}", "train.max_tokens=128")
    )


def test_rows_are_the_padded_model_states(recipe):
    """Not only the same as without a cache: the hidden states of transformers' own forward pass, sample by sample."""
    trainer = loaded(recipe(), "train.dtype=float64")
    model = AutoModelForCausalLM.from_pretrained(trainer.config.teacher.path, dtype=torch.float64).eval()
    for index in (0, 7, 59):
        sample = trainer.data.train_set[index]
        ids = torch.tensor(sample["input_ids"])[None]
        with torch.no_grad():
            expected = model.model(ids).last_hidden_state[0, sample["spans"][0] - 1 : -1]
        rows = trainer.teachers["teacher"].rows[trainer.teachers["teacher"].places.sample(index)]
        torch.testing.assert_close(rows, expected, rtol=1e-10, atol=1e-12)


def test_second_run_finds_it_and_loads_no_teacher(recipe, cache_folder, capsys, monkeypatch, tmp_path):
    path = recipe()
    assert main(["--config", path]) == 0
    first = capsys.readouterr().out
    assert "computing 1 of 1 blocks" in first
    assert "built in" in first
    assert "the teacher's cache saved about" in first
    before = (only(cache_folder) / SHARD).stat().st_mtime_ns
    shutil.rmtree(tmp_path / "runs")
    loads = []
    original = Trainer._load
    monkeypatch.setattr(Trainer, "_load", lambda self, *a: (loads.append(a[2]), original(self, *a))[1])
    assert main(["--config", path]) == 0
    second = capsys.readouterr().out
    assert loads == ["student"]
    assert "computing" not in second
    assert "; found, will save about" in second
    assert (only(cache_folder) / SHARD).stat().st_mtime_ns == before


def test_body_is_freed_after_building(recipe):
    import gc

    def bodies():
        gc.collect()
        return sum(type(o).__name__ == "LlamaModel" and not o.embed_tokens.weight.is_meta for o in gc.get_objects())

    before = bodies()
    trainer = loaded(recipe())
    assert isinstance(trainer.teachers["teacher"], CachedTeacher)
    assert bodies() == before + 1, "the student's alone"


def test_random_teacher_is_known_by_its_weights(recipe, cache_folder):
    path = recipe(teacher={"config": MODELS["llama"]})
    expected = losses(loaded(path, "cache.mode=off"))
    assert losses(loaded(path)) == expected
    assert losses(loaded(path)) == expected
    only(cache_folder)
    losses(loaded(path, "run.seed=11"))
    assert sum(folder.is_dir() for folder in cache_folder.iterdir()) == 2


def test_key_changes_with_everything_that_rows_depend_on(recipe, tmp_path):
    path = recipe()

    def key(*overrides):
        return Trainer(load(path, overrides)[0]).teachers.caches["teacher"].file.key

    first = key()
    same = [
        "optim.lr=1",
        "run.seed=3",
        "train.max_tokens=512",
        "loss=fkl",
        "teacher.dropout=0.3",
        "data.max_length=127",
    ]
    assert {key(override) for override in same} == {first}, "max_length that cuts nothing changes no sample"
    different = [
        key(override)
        for override in (
            "data.max_length=64",
            "data.train_rows=59",
            "train.dtype=bfloat16",
            "data.train=quickstart:dev",
        )
    ]
    shutil.copytree(tmp_path / "teacher", tmp_path / "copy")
    assert key(f"teacher.path={tmp_path / 'copy'}") == first, "the content counts, not the place"
    weights = tmp_path / "teacher" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    times = weights.stat()
    weights.write_bytes(content)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    different.append(key())
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    different.append(key(f"teacher.path={tmp_path / 'copy'}"))
    assert len({first, *different}) == 1 + len(different)


def test_samples_hash_tells_tokens_from_boundaries():
    def digest(ids, spans):
        return store.hash_samples(datasets.Dataset.from_dict({"input_ids": ids, "spans": spans}))

    ids, others = [[1, 2, 3], [4, 5]], ([[1, 2], [3, 4, 5]], [[1, 2], [1, 3]])
    spans = [[1, 3], [1, 2]], [[2, 3], [1, 2]], [[1, 2, 2, 3], [1, 2]], [[1, 2], [2, 3, 1, 2]]
    variants = [others, *((ids, some) for some in spans)]  # the last two have the same bounds, one after the other
    assert len({digest(*variant) for variant in variants}) == len(variants)


def test_weights_are_hashed_once(recipe, cache_folder, monkeypatch):
    path = recipe()
    Trainer(load(path)[0])
    hashed = []
    monkeypatch.setattr(identity, "file_digest", lambda file: hashed.append(file) or "x")
    Trainer(load(path)[0])
    assert hashed == []
    (cache_folder / "weights.json").write_text("{broken")
    Trainer(load(path)[0])
    assert len(hashed) == 1


def test_teacher_changed_in_place_is_noticed(recipe, tmp_path):
    path = recipe()
    stale = losses(loaded(path))
    make_teacher(tmp_path / "teacher", seed=1)
    fresh = losses(loaded(path))
    assert fresh != stale
    assert fresh == losses(loaded(path, "cache.mode=off"))


def flip(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def change_index(folder, change):
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(change(index)))


DAMAGE = {
    "flipped bit": (lambda f: flip(f / SHARD, 1000), "1 of {n} blocks"),
    "flipped last bit": (lambda f: flip(f / SHARD, (f / SHARD).stat().st_size - 1), "1 of {n} blocks"),
    "truncated": (lambda f: os.truncate(f / SHARD, 30000), "blocks of"),
    "longer": (lambda f: (f / SHARD).open("ab").write(b"x"), None),
    "emptied": (lambda f: os.truncate(f / SHARD, 0), "{n} of {n} blocks"),
    "no states": (lambda f: (f / SHARD).unlink(), "{n} of {n} blocks"),
    "no index": (lambda f: (f / "index.json").unlink(), "computing {n} of {n}"),
    "torn index": (lambda f: os.truncate(f / "index.json", 100), "index.json is damaged: all is computed again"),
    "index of something else": (lambda f: (f / "index.json").write_text("[1]"), "index.json is damaged"),
    "wrong checksum": (lambda f: change_index(f, lambda i: {**i, "blocks": [1, *i["blocks"][1:]]}), "1 of {n} blocks"),
    "text as checksum": (lambda f: change_index(f, lambda i: {**i, "blocks": ["x", *i["blocks"][1:]]}), "1 of {n}"),
    "too few checksums": (lambda f: change_index(f, lambda i: {**i, "blocks": [1]}), "index.json is damaged"),
    "other identity": (lambda f: change_index(f, lambda i: {**i, "identity": {}}), "index.json is damaged"),
    "flipped head": (lambda f: flip(f / "head.safetensors", 5000), None),
    "no head": (lambda f: (f / "head.safetensors").unlink(), None),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_noticed_and_mended(recipe, cache_folder, capsys, small_blocks, name):
    path = recipe(train={**TRAIN, "steps": 3}, cache={"mode": "disk"})
    expected = losses(loaded(path))
    folder = only(cache_folder)
    whole = (folder / SHARD).read_bytes()
    blocks = len(json.loads((folder / "index.json").read_text())["blocks"])
    assert blocks > 5
    capsys.readouterr()
    damage, message = DAMAGE[name]
    damage(folder)
    assert losses(loaded(path)) == expected
    output = capsys.readouterr().out
    assert (message or "").format(n=blocks) in output
    assert sum("damaged" in line for line in output.splitlines()) <= 1
    assert (folder / SHARD).read_bytes()[: len(whole)] == whole
    losses(loaded(path))
    assert "computing" not in capsys.readouterr().out


# Builds with small blocks, a pause in each, and says so; the test kills it or lets it go on.
BUILD = """
import sys, time
from abkd_fast.config.recipe import load
from abkd_fast.teacher import store
from abkd_fast.training.trainer import Trainer
store.BLOCK_TOKENS = 300
record = store.HiddenStateStore.record
def slow_record(self, blocks):
    record(self, blocks)
    print("wrote", blocks[0][0], flush=True)
    time.sleep(float(sys.argv[2]))
store.HiddenStateStore.record = slow_record
print("start", flush=True)
trainer = Trainer(load(sys.argv[1], [])[0])
trainer.build()
print([trainer.train_step(batch)[0].item() for batch in trainer.batches()], flush=True)
"""


def builder(path, pause):
    command = [sys.executable, "-c", BUILD, path, str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1)


@pytest.mark.slow
def test_killed_builds_resume_to_the_same_bits(recipe, cache_folder, capsys, small_blocks):
    path = recipe()
    expected = losses(loaded(path))
    whole = (only(cache_folder) / SHARD).read_bytes()
    blocks = capsys.readouterr().out.count("computing") and len(loaded(path).teachers.caches["teacher"].layout.blocks)
    shutil.rmtree(only(cache_folder))
    written = []
    for stop_after in (1, 3, 2):
        process = builder(path, 0.01)
        count = 0
        for line in process.stdout:
            if line.startswith("wrote"):
                written.append(int(line.split()[1]))
                count += 1
            if count == stop_after:
                time.sleep(0.004 * stop_after)  # somewhere within the next block
                process.send_signal(signal.SIGKILL)
                break
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert len(set(written)) == len(written) == 6, "no block that was written is computed again"
    capsys.readouterr()
    assert losses(loaded(path)) == expected
    left = int(capsys.readouterr().out.split("computing ")[1].split()[0])
    assert blocks - 6 - 3 <= left <= blocks - 6, "each kill may have let one more block through"
    assert (only(cache_folder) / SHARD).read_bytes() == whole


@pytest.mark.slow
def test_killed_at_random_moments(recipe, cache_folder, small_blocks):
    path = recipe()
    expected = losses(loaded(path))
    whole = (only(cache_folder) / SHARD).read_bytes()
    shutil.rmtree(only(cache_folder))
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        process = builder(path, 0)
        line = process.stdout.readline()
        while line and "blocks" not in line:  # imports and loading are over
            line = process.stdout.readline()
        time.sleep(0.3 * torch.rand((), generator=generator).item())
        process.kill()
        process.communicate()
    assert losses(loaded(path)) == expected
    assert (only(cache_folder) / SHARD).read_bytes() == whole


@pytest.mark.slow
def test_two_builders_share_the_work(recipe, cache_folder, small_blocks):
    path = recipe()
    first = builder(path, 60)
    for line in first.stdout:
        if line.startswith("wrote"):
            break
    second = builder(path, 0)
    seen = []
    for line in second.stdout:
        seen.append(line)
        if "waiting" in line:
            break
    assert any("another process is building" in line for line in seen)
    first.kill()  # the second takes over, from the first block that is missing
    first.communicate()
    rest, _ = second.communicate()
    assert second.returncode == 0
    assert "wrote 0\n" not in rest
    assert "wrote 1\n" in rest
    assert json.loads(rest.splitlines()[-1]) == losses(loaded(path, "cache.mode=off"))


@pytest.mark.slow
def test_waiting_for_a_builder_that_finishes(recipe, small_blocks):
    path = recipe()
    processes = [builder(path, 0.02) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("wrote" in output for output in outputs) == 1, "one builds, the other finds"
    assert outputs[0].splitlines()[-1] == outputs[1].splitlines()[-1]


UNUSABLE = "cache.dir=/dev/null/x"


def test_folder_that_cannot_be_written_to(recipe, capsys, tmp_path):
    path = recipe()
    expected = losses(loaded(path, "cache.mode=off"))
    assert main(["--config", path, "--set", UNUSABLE, "--set", "cache.mode=disk"]) == 2
    error = capsys.readouterr().err
    assert "cache.dir: /dev/null is not a folder that can be written to; choose another, or cache.mode=off" in error
    assert not (tmp_path / "runs").exists()
    for mode in ("auto", "memory"):
        trainer = loaded(path, UNUSABLE, f"cache.mode={mode}")
        assert "in memory, not kept (/dev/null is not a folder" in trainer.teachers["teacher"].note
        assert losses(trainer) == expected


def test_full_disk(recipe, capsys, monkeypatch):
    path = recipe()
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**9))
    assert main(["--config", path, "--set", "cache.mode=disk"]) == 2
    assert "has 1.0 GB free, and 1.1 GB are needed; choose another, or cache.mode=off" in capsys.readouterr().err
    assert "not kept" in loaded(path).teachers["teacher"].note


@pytest.mark.parametrize("call", ["reserve", "write"])
def test_disk_that_fills_up_while_building(recipe, monkeypatch, call):
    path = recipe()
    expected = losses(loaded(path, "cache.mode=off"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.HiddenStateStore, call, full)
    with pytest.raises(ConfigError, match=r"No space left on device; choose another, or cache\.mode=off"):
        loaded(path, "cache.mode=disk")
    for mode, kind in (("auto", Teacher), ("memory", CachedTeacher)):
        trainer = loaded(path, f"cache.mode={mode}")
        assert isinstance(trainer.teachers["teacher"], kind)
        assert "No space left on device" in trainer.teachers["teacher"].note
        assert losses(trainer) == expected


def test_complete_cache_in_a_read_only_folder(recipe, cache_folder, monkeypatch):
    path = recipe()
    expected = losses(loaded(path))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    access = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: not str(p).startswith(str(cache_folder)) and access(p, mode))
    monkeypatch.setattr(store.filelock.FileLock, "acquire", refuse)
    monkeypatch.setattr(store, "atomic_write", refuse)
    trainer = loaded(path, "cache.mode=disk")
    assert "found" in trainer.teachers["teacher"].note
    assert losses(trainer) == expected


def test_what_auto_decides(recipe):
    path = recipe()

    def decide(memory, *overrides, device="cpu", dir=None):
        trainer = Trainer(load(path, [*overrides, *([f"cache.dir={dir}"] if dir else [])])[0])
        trainer.teachers.caches["teacher"].device = torch.device(device)
        return trainer.teachers.caches["teacher"].choose(memory)

    needed = Trainer(load(path)[0]).teachers.caches["teacher"].bytes
    nowhere = "/dev/null/x"
    assert decide(10**12) == (True, False, "")  # a mapped file is in a processor's memory anyway
    assert decide(10**12, device="cuda") == (True, True, "")
    assert decide(4 * needed, device="cuda") == (True, True, "")
    assert decide(4 * needed - 4, device="cuda") == (True, False, "")
    assert decide(10**12, dir=nowhere)[:2] == (False, True)
    disk, memory, reason = decide(0, dir=nowhere)
    assert (disk, memory) == (False, False)
    assert (
        reason == f"/dev/null is not a folder that can be written to, and {needed / 1e6:.1f} MB are too much for memory"
    )
    assert decide(10**12, "train.epochs=1") == (False, False, "no sample is seen twice")
    assert decide(10**12, "train.epochs=1", "cache.mode=disk")[0]
    assert decide(needed, "cache.mode=memory") == (True, True, "")
    with pytest.raises(ConfigError, match=r"cache\.mode is memory, but the teacher's states are .* use disk or off"):
        decide(needed - 1, "cache.mode=memory")
    loaded(path)
    assert decide(0, "train.epochs=1") == (True, False, ""), "what is there is used, however short the run"


def test_finished_stage_is_used_whatever_the_cache(recipe, capsys):
    path = recipe(stages={"one": {"train": {"steps": 2}}})
    assert main(["--config", path]) == 0
    assert main(["--config", path, "--set", "cache.mode=off"]) == 0
    assert "is finished already" in capsys.readouterr().out


def test_layout_covers_every_row_once():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 200, (500,), generator=generator).tolist()
    prompts = [1 + index % (length - 1) for index, length in enumerate(lengths)]
    ids = [list(range(length)) for length in lengths]
    spans = [list(pair) for pair in zip(prompts, lengths, strict=True)]
    layout = store.Layout(datasets.Dataset.from_dict({"input_ids": ids, "spans": spans}))
    slices = sorted((layout.sample(index) for index in range(500)), key=lambda s: s.start)
    assert [s.start for s in slices] == [0, *(s.stop for s in slices[:-1])]
    assert slices[-1].stop == layout.rows == sum(lengths) - sum(prompts)
    assert all(
        layout.sample(index).stop - layout.sample(index).start == lengths[index] - prompts[index]
        for index in range(500)
    )
    assert sorted(index for block in layout.blocks for index in block) == list(range(500))
    blocks = [layout.block(number) for number in range(len(layout.blocks))]
    assert [b.start for b in blocks] == [0, *(b.stop for b in blocks[:-1])]
    assert all(sum(lengths[index] for index in block) <= store.BLOCK_TOKENS for block in layout.blocks)
