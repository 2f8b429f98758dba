"""Runs that train, resume, merge and refuse LoRA adapters."""

import itertools
import json
import pathlib
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora import END, SMALL, load_packed, save_adapter, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from abkd_fast.config.models import LoraConfig
from abkd_fast.config.recipe import load
from abkd_fast.data import quickstart
from abkd_fast.data.batches import pack
from abkd_fast.errors import ConfigError
from abkd_fast.losses import chunks
from abkd_fast.models import loading
from abkd_fast.train import main
from abkd_fast.training.trainer import Trainer
from conftest import GPT2
from runs import Killed, Run, assert_same, at_step, crash


@pytest.fixture
def base(tmp_path):
    return save_model(tmp_path / "base", {**SMALL, "attention_dropout": 0.1})


class LoraRun(Run):
    """A small run that trains a new adapter on `base`."""

    def __init__(self, folder, base, *overrides, **sections):
        sections = {"student": {"path": base, "lora": {"rank": 4}}, "tokenizer": None, **sections}
        super().__init__(folder, *overrides, **sections)

    def weights(self):
        return load_file(self.folder / "final" / "adapter_model.safetensors")


def trainer(run):
    trainer = Trainer(load(run.arguments[1], run.arguments[3::2])[0])
    trainer.build()
    return trainer


@pytest.mark.parametrize("lora", [{"rank": 4}, None], ids=["lora", "all weights"])
def test_weights_that_are_trained_are_float32(tmp_path, base, lora):
    run = LoraRun(tmp_path, base, "train.dtype=bfloat16", student={"path": base, "lora": lora})
    for parameter in trainer(run).student.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)


def test_only_the_adapter_is_trained(tmp_path, base, monkeypatch):
    made = trainer(LoraRun(tmp_path, base))
    before = {name: p.detach().clone() for name, p in made.student.named_parameters()}
    shapes, product = [], chunks._product

    def watched(left, right, out, *more):
        shapes.append(out.shape)
        product(left, right, out, *more)

    monkeypatch.setattr(chunks, "_product", watched)
    for batch, _ in zip(made.batches(), range(3), strict=False):
        made.train_step(batch)
    head = made.student.head.weight.shape
    assert any(shape[-1] == head[1] for shape in shapes)  # the hidden states' gradient
    assert head not in shapes  # the projection's
    on_disk = load_file(pathlib.Path(base) / "model.safetensors")
    for name, parameter in made.student.named_parameters():
        if "lora_" in name:
            assert not torch.equal(parameter, before[name]), name
        else:
            own = name.removeprefix("model.base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, on_disk[own]), name


def test_decay_reaches_every_weight_of_an_adapter(tmp_path, base):
    adapter = save_adapter(tmp_path / "adapter", base, use_dora=True)  # with a vector of magnitudes
    made = trainer(LoraRun(tmp_path, base, student={"path": base, "adapter": adapter}))
    decayed, others = made.optimizer.param_groups
    assert {p.dim() for p in decayed["params"]} == {1, 2}
    assert decayed["weight_decay"] == 0.01
    assert others["params"] == []


def test_final_is_an_adapter_that_peft_loads(tmp_path, base, capsys):
    run = LoraRun(tmp_path, base)
    assert run() == 0
    assert "LoRA rank 4: 0.0M trained" in capsys.readouterr().out
    final = run.folder / "final"
    names = {path.name for path in final.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json"} <= names
    assert not names & {"model.safetensors", "config.json"}
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(final).eval()
    ours = load_packed("student", torch.float32, path=base, adapter=str(final)).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(final)("Add 1 and 2.")["input_ids"]])
    (batch,) = pack([{"input_ids": [*ids[0].tolist(), 0], "spans": [1, ids.shape[1] + 1]}], max_tokens=64)
    logits = ours.head(ours.hidden_states(batch))
    torch.testing.assert_close(logits, theirs(ids).logits[0], rtol=1e-5, atol=1e-5)
    without = AutoModelForCausalLM.from_pretrained(base)(ids).logits[0]
    assert (logits - without).abs().max() > 1e-3


@pytest.mark.parametrize(("dropout", "expected"), [(None, 0.25), (0.0, 0.0)])
def test_models_dropout_is_that_of_a_new_adapter_too(base, dropout, expected):
    model = load_packed("student", path=base, dropout=dropout, lora=LoraConfig(rank=4, dropout=0.25))
    assert model.model.peft_config["default"].lora_dropout == expected


@pytest.mark.parametrize("source", ["lora", "adapter"])
def test_resumed_run_is_the_undisturbed_one(tmp_path, base, monkeypatch, source):
    student = {"path": base, "lora": {"rank": 4}}
    if source == "adapter":
        student = {"path": base, "adapter": save_adapter(tmp_path / "adapter", base, lora_dropout=0.2)}
    undisturbed, run = (LoraRun(tmp_path / name, base, student=student) for name in ("undisturbed", "run"))
    assert undisturbed() == 0
    with monkeypatch.context() as patch:
        at_step(patch, 8, crash)
        with pytest.raises(Killed):
            run()
    saved = {path.name for path in (run.folder / "checkpoints" / "step-000005").iterdir()}
    assert "adapter_model.safetensors" in saved
    assert "model.safetensors" not in saved
    assert run("--resume", "--set", "train.gradient_checkpointing=true") == 0  # changes memory, not bits
    assert_same(run, undisturbed)
    settings = json.loads((run.folder / "final" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == base
    assert settings["lora_dropout"] == (0.1 if source == "lora" else 0.2)


def test_cache_belongs_to_the_adapter(tmp_path, base):
    adapter = save_adapter(tmp_path / "adapter", base)

    def key(**teacher):
        teacher = {"path": base, **teacher}
        run = LoraRun(tmp_path, base, method="ab", teacher=teacher)
        return Trainer(load(run.arguments[1])[0]).teachers.caches["teacher"].file.key

    first = key(adapter=adapter)
    assert key(adapter=adapter) == first
    assert key() != first
    settings = pathlib.Path(adapter) / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"lora_alpha": 32}))
    second = key(adapter=adapter)
    assert second != first
    save_adapter(adapter, base, seed=2)
    assert key(adapter=adapter) not in (first, second)


def test_distilling_from_a_merged_teacher_with_and_without_cache(tmp_path, base):
    teacher = {"path": base, "adapter": save_adapter(tmp_path / "adapter", base)}
    runs = [
        LoraRun(tmp_path / mode, base, f"cache.mode={mode}", method="ab", teacher=teacher) for mode in ("off", "disk")
    ]
    assert [run() for run in runs] == [0, 0]
    assert_same(*runs)


def test_adapter_moved_to_another_base_is_a_warning(tmp_path, base, caplog):
    adapter = save_adapter(tmp_path / "adapter", base)
    load_packed("student", path=base, adapter=adapter)
    assert not caplog.records
    moved = shutil.copytree(base, tmp_path / "moved")
    student = load_packed("student", path=str(moved), adapter=adapter)
    assert f"was trained on {base}, and goes on {moved} now" in caplog.text
    student.save(tmp_path / "again", quickstart.tokenizer(), student.weights())
    assert peft.PeftConfig.from_pretrained(tmp_path / "again").base_model_name_or_path == str(moved)


def test_broken_adapter_is_not_merged(tmp_path, base):
    adapter = save_adapter(tmp_path / "adapter", base)
    file = pathlib.Path(adapter) / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[min(tensors)][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=r"teacher.adapter: .* can't be merged \(NaNs detected"):
        load_packed("teacher", path=base, adapter=adapter)


LORA = {"rank": 4, "targets": ["q_proj", "v_proj"]}
BAD = {
    "both": ({"student": {"path": "@base", "adapter": "@adapter", "lora": LORA}}, "either adapter, to go on with one"),
    "random base": (
        {"student": {"config": SMALL, "lora": LORA}, "tokenizer": "quickstart"},
        "student: an adapter needs the same weights every time",
    ),
    "teacher is not trained": (
        {"method": "ab", "teacher": {"path": "@base", "lora": LORA}},
        "teacher.lora: a teacher is not trained; teacher.adapter merges",
    ),
    "no rank": ({"student": {"path": "@base", "lora": {"rank": 0}}}, "student.lora.rank is 0, expected at least 1"),
    "no targets": ({"student": {"path": "@base", "lora": {"targets": []}}}, "student.lora.targets is empty"),
    "unknown target": (
        {"student": {"path": "@base", "lora": {"targets": ["q_proj", "v_porj"]}}},
        "student.lora.targets: no v_porj in a llama model; its projections are down_proj, ",
    ),
    "output projection": (
        {"student": {"path": "@base", "lora": {"targets": ["q_proj", "lm_head"]}}},
        "student.lora.targets: q_proj, lm_head: adapts the output projection",
    ),
    "saved output projection": (
        {"student": {"path": "@base", "adapter": "@with_head"}},
        "adapts the output projection",
    ),
    "tied output projection": (
        {"student": {"path": "@gpt2-base", "adapter": "@with_embeddings"}},
        "adapts the output projection",
    ),
    "no folder": ({"student": {"path": "@base", "adapter": "./nowhere"}}, "./nowhere: no such adapter folder"),
    "whole model as adapter": (
        {"student": {"path": "@base", "adapter": "@base"}},
        "has no adapter_config.json, expected a LoRA adapter as peft saves it; it holds a whole model",
    ),
    "adapter as path": ({"student": {"path": "@adapter"}}, "holds a LoRA adapter: give it as student.adapter"),
    "adapter as teacher's path": (
        {"method": "ab", "teacher": {"path": "@adapter"}},
        "holds a LoRA adapter: give it as teacher.adapter",
    ),
    "adapter of a wider model": (
        {"student": {"path": "@base", "adapter": "@wider"}},
        "lora_A.weight is [4, 32] there, [4, 16] here",
    ),
    "adapter of a deeper model": (
        {"method": "ab", "teacher": {"path": "@base", "adapter": "@deeper"}},
        "layers.2.self_attn.q_proj.lora_A.weight is [4, 16] there, missing here",
    ),
    "other names": ({"student": {"path": "@base", "adapter": "@gpt2"}}, "can't be used (Target modules "),
    "other kind": ({"student": {"path": "@base", "adapter": "@ia3"}}, "is a IA3 adapter, expected LORA"),
    "broken settings": ({"student": {"path": "@base", "adapter": "@broken"}}, "@broken can't be used ("),
    "cut off": ({"student": {"path": "@base", "adapter": "@cut"}}, "@cut can't be used ("),
    "stage that is not": (
        {"stages": {"one": {}, "two": {"student": {"lora": None, "adapter": "stage:on"}}}},
        "student.adapter: stage:on: no such stage before this one; earlier stages: one",
    ),
    "stage's adapter as path": (
        {"stages": {"one": {}, "two": {"student": {"lora": None, "path": "stage:one"}}}},
        "student.path: stage:one is a LoRA adapter: give it as adapter, and its base @base as path",
    ),
    "stage's model as adapter": (
        {"stages": {"one": {"student": {"lora": None}}, "two": {"student": {"lora": None, "adapter": "stage:one"}}}},
        "student.adapter: stage:one is a whole model, not an adapter",
    ),
    "stage's adapter on another model": (
        {"stages": {"one": {}, "two": {"method": "ab", "teacher": {"path": "@gpt2-base", "adapter": "stage:one"}}}},
        "teacher.adapter: stage:one is an adapter of @base, but path is @gpt2-base",
    ),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders of models and adapters, good and bad."""
    root = tmp_path_factory.mktemp("places")
    base = save_model(root / "base", SMALL)
    save_adapter(root / "adapter", base)
    save_adapter(root / "with_head", base, modules_to_save=["lm_head"])
    save_adapter(root / "wider", save_model(root / "wider-base", {**SMALL, "hidden_size": 32}))
    save_adapter(root / "deeper", save_model(root / "deeper-base", {**SMALL, "num_hidden_layers": 3}))
    save_adapter(root / "gpt2", save_model(root / "gpt2-base", {**GPT2, **END, "vocab_size": 1024}))
    save_adapter(root / "with_embeddings", root / "gpt2-base", target_modules=["wte"])
    ia3 = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), ia3).save_pretrained(root / "ia3")
    for name in ("broken", "cut"):
        shutil.copytree(root / "adapter", root / name)
    (root / "broken" / "adapter_config.json").write_text("{")
    weights = root / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    return root


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_before_weights_load(tmp_path, places, capsys, monkeypatch, name):
    sections, message = BAD[name]
    text = json.dumps({"student": {"path": "@base", "lora": LORA}, "tokenizer": None, **sections})
    sections = json.loads(text.replace('"@', f'"{places}/'))
    run = Run(tmp_path, **sections)
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("weights were loaded"))
    assert run() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error.replace(f"{places}/", "@")
    assert not run.folder.exists()


def test_llama_recipe_at_reduced_size(tmp_path, shared, capsys):
    """The packaged three stages on real rows: heads of 100, as OpenLLaMA 3B has them, and Llama 2's tokenizer."""
    if not (shared / "tokenizers" / "llama2").is_dir():
        pytest.skip("no llama2 tokenizer in the data folder")
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "llama2")
    sizes = {"vocab_size": 32000, "hidden_size": 200, "intermediate_size": 64, "max_position_embeddings": 512}
    llama = {"model_type": "llama", "num_attention_heads": 2, **sizes, "bos_token_id": 1, "eos_token_id": 2}
    small = save_model(tmp_path / "small", {**llama, "num_hidden_layers": 1}, tokenizer)
    large = save_model(tmp_path / "large", {**llama, "num_hidden_layers": 2}, tokenizer, seed=1)
    dolly = shared / "data" / "dolly"
    with (dolly / "train.jsonl").open(encoding="utf-8") as rows:
        texts = [json.loads(row)["output"] for row in itertools.islice(rows, 30)]
    text = tmp_path / "text.txt"
    text.write_text("\n".join(texts), encoding="utf-8")
    overrides = [
        *(f"run.dir={tmp_path}", f"student.path={small}", f"teacher:student.path={large}"),
        *(f"teacher.path={large}", f"data.train={dolly / 'train.jsonl'}", f"data.dev={dolly / 'dev.jsonl'}"),
        *("data.train_rows=4", "data.dev_rows=2", "train.batch_size=2", "train.steps=2"),
        *("init:train.batch_size=2", "init:eval.every_steps=1", f"data.pretrain.path={text}"),
    ]
    arguments = ["--config", "llama.json", *(part for override in overrides for part in ("--set", override))]
    assert main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("memory     about ") == 3
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "LoRA rank 16: " in printed
    assert f"with {tmp_path / 'llama' / 'teacher' / 'final'} merged" in printed
    finals = [tmp_path / "llama" / stage / "final" for stage in ("init", "abkd")]
    adapters = [load_file(final / "adapter_model.safetensors") for final in finals]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(not torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    settings = peft.PeftConfig.from_pretrained(finals[1])
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (16, 64, 0.1)
    assert settings.base_model_name_or_path == small
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("is finished already") == 3
