"""Quantized teachers and students, and teachers that are spread over devices."""

import copy
import importlib.util
import json
import logging
import pathlib
import shutil
import types

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora import CPU, SMALL, save_adapter, save_model
from test_wrappers import GEMMA3
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from abkd_fast import distributed, generate
from abkd_fast.config.models import LoraConfig, ModelConfig
from abkd_fast.config.recipe import load
from abkd_fast.data import quickstart
from abkd_fast.data.batches import pack
from abkd_fast.errors import ConfigError
from abkd_fast.models import loading, quantized
from abkd_fast.models.identity import hash_weights
from abkd_fast.teacher.store import HiddenStateStore
from abkd_fast.training import teachers
from abkd_fast.training.trainer import Trainer
from packed_models import samples
from runs import Run, assert_same, crash_and_resume

WIDE = {**SMALL, "hidden_size": 64, "intermediate_size": 128}  # quantized in blocks of 64
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base"), WIDE)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("large"), {**WIDE, "num_hidden_layers": 3}, seed=3)


@pytest.fixture(scope="module")
def fp8(base, tmp_path_factory):
    """A checkpoint as DeepSeek publishes: 8 bits, with a scale for each block of 128 x 128 numbers."""
    folder = pathlib.Path(shutil.copytree(base, tmp_path_factory.mktemp("fp8"), dirs_exist_ok=True))
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "_proj" in name:
            scale = tensor.abs().max() / 448
            tensors[f"{name}_scale_inv"], tensor = scale.view(1, 1), (tensor / scale).to(torch.float8_e4m3fn)
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return mark(folder, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"})


def mark(folder, settings):
    """Writes how its weights are quantized into a folder's configuration."""
    file = pathlib.Path(folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))
    return str(folder)


def load_model(key="teacher", **spec):
    spec = ModelConfig(**spec)
    return loading.load(spec, loading.read_meta_model(spec, key).whole, key, torch.float32, CPU)


def logits_of(model, rows):
    """The logits [N, V] of each row alone."""
    batches = [pack([row], max_tokens=64)[0] for row in rows]
    return torch.cat([model.head(model.hidden_states(batch)) for batch in batches])


class QuantizedRun(Run):
    """A small run of a 4-bit student with a new adapter, under a cached 4-bit teacher."""

    def __init__(self, folder, base, large):
        student = {"path": base, "quantize": "4bit", "lora": {"rank": 4}}
        sections = {"student": student, "teacher": {"path": large, "quantize": "4bit"}, "tokenizer": None}
        changes = ("train.steps=5", "checkpoint.every_steps=2", "eval.every_steps=5", "cache.mode=disk")
        super().__init__(folder, *changes, method="ab", **sections)

    def weights(self):
        return load_file(self.folder / "final" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def trained(base, large, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ABKD_CACHE", str(tmp_path_factory.mktemp("cache")))
        run = QuantizedRun(tmp_path_factory.mktemp("trained"), base, large)
        assert run() == 0
    return run


@needs_bitsandbytes
def test_resumed_run_is_the_undisturbed_one(tmp_path, base, large, trained, monkeypatch, capsys):
    run = QuantizedRun(tmp_path, base, large)
    crash_and_resume(run, monkeypatch, 3)
    assert_same(run, trained)
    said = capsys.readouterr().out
    assert "quantized  student: bitsandbytes 4-bit (nf4); rounding may depend on the batch" in said
    assert "quantized  teacher: bitsandbytes 4-bit (nf4); rounding may depend on the batch" in said
    assert "states cached" in said


@needs_bitsandbytes
def test_final_is_an_adapter_that_answers_on_the_quantized_base(tmp_path, base, trained, write_jsonl):
    final = trained.folder / "final"
    assert not [*final.glob("model*")]
    assert all("lora_" in name for name in trained.weights())
    model = loading.load(
        loading.model_spec(str(final)), AutoConfig.from_pretrained(base), "model", torch.float32, CPU
    ).eval()
    settings = BitsAndBytesConfig(**json.loads((final / "quantization_config.json").read_text()))
    theirs = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype=torch.float32)
    quantized.without_cpu_packing(theirs)
    theirs = peft.PeftModel.from_pretrained(theirs, str(final)).eval()
    (row,) = rows = samples([20])
    own = theirs(torch.tensor([row["input_ids"]])).logits[0, row["spans"][0] - 1 : -1]
    torch.testing.assert_close(logits_of(model, rows), own, rtol=1e-4, atol=1e-4)
    command = ["--model", str(final), "--temperature", "0", "--max-new-tokens", "3", "--device", "cpu"]
    out = str(tmp_path / "answers.jsonl")
    assert generate.main([*command, "--data", write_jsonl([{"prompt": "Add 1 and 2."}]), "--out", out]) == 0
    (answer,) = map(json.loads, pathlib.Path(out).read_text().splitlines())
    prompt = answer["prompt_ids"]
    greedy = theirs.generate(input_ids=torch.tensor([prompt]), max_new_tokens=3, do_sample=False)[0, len(prompt) :]
    known = len(AutoTokenizer.from_pretrained(final))
    assert answer["output_ids"] == [token for token in greedy.tolist() if token < known]


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_gradients_are_those_of_the_dequantized_student(base, bits):
    student = load_model("student", path=base, quantize=bits, lora=LoraConfig(rank=4, dropout=0.0))
    student.check()  # in eval mode bitsandbytes packs weights anew, on some CPUs
    quantized.check_gradients(student, bits)
    plain = copy.deepcopy(student)
    adapted = [m for m in plain.modules() if hasattr(m, "base_layer")]
    for module in adapted:
        rows = torch.eye(module.in_features)
        layer = nn.Linear(module.in_features, module.out_features, bias=False)
        with torch.no_grad():
            layer.weight.copy_(module.base_layer(rows).T)
        module.base_layer = layer
    (batch,) = pack(samples([20, 12]), max_tokens=64)
    gradients = []
    for model in (student, plain):
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        model.train()(batch, lambda head: (head.hidden @ head.weight.T).logsumexp(1).sum()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        error = (gradient - gradients[1][name]).norm() / gradients[1][name].norm()
        assert error < (1e-3 if bits == "4bit" else 0.1), name


@needs_bitsandbytes
def test_multimodal_student_saves_the_adapter_alone(tmp_path):
    path = save_model(tmp_path / "whole", GEMMA3)
    student = load_model("student", path=path, quantize="4bit", lora=LoraConfig(rank=4))
    assert student.weights()
    assert all("lora_" in name for name in student.weights())
    student.save(tmp_path / "final", quickstart.tokenizer(), student.weights())
    assert loading.model_spec(str(tmp_path / "final")).quantize == "4bit"


@needs_bitsandbytes
def test_8_bit_model_is_checked_with_a_tolerance_of_its_own(large, tmp_path):
    folder = shutil.copytree(large, tmp_path / "outliers")
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: 4 * tensor if "layernorm" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_model(path=str(folder), quantize="8bit").eval()
    with torch.no_grad():
        difference, _ = model.difference((9, 5))
    model.check()
    assert 2e-3 < difference < model.tolerance == quantized.TOLERANCE  # large values of one row change all of a batch
    assert load_model(path=large).tolerance is None


@needs_bitsandbytes
def test_adapter_of_a_quantized_teacher_is_attached_not_merged(base, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", base)
    model = load_model(path=base, adapter=adapter, quantize="4bit").eval()
    theirs = AutoModelForCausalLM.from_pretrained(base, quantization_config=model.causal_lm.config.quantization_config)
    quantized.without_cpu_packing(theirs)
    theirs = peft.PeftModel.from_pretrained(theirs, adapter).eval()
    (row,) = rows = samples([20])
    own = theirs(torch.tensor([row["input_ids"]])).logits[0, row["spans"][0] - 1 : -1]
    torch.testing.assert_close(logits_of(model, rows), own, rtol=1e-4, atol=1e-4)


@needs_bitsandbytes
@pytest.mark.parametrize(("bits", "share"), [("4bit", 0.5), ("8bit", 1)])
def test_dry_run_counts_the_bytes_of_quantized_weights(base, bits, share):
    meta = loading.read_meta_model(ModelConfig(path=base, quantize=bits), "teacher")
    sizes = {name: p.numel() for name, p in meta.model.named_parameters()}
    projections = sum(number for name, number in sizes.items() if "_proj" in name)
    others = sum(sizes.values()) - projections
    counted = meta.quantization.bytes(loading.meta_model(meta.whole, torch.bfloat16), torch.bfloat16)
    buffers = sum(buffer.nbytes for buffer in meta.model.buffers())
    assert counted == share * projections + 2 * others + buffers
    model = load_model(path=base, quantize=bits)
    held = sum(p.nbytes for p in model.parameters())
    assert held == meta.quantization.bytes(loading.meta_model(meta.whole, torch.float32), torch.float32) - buffers


@needs_bitsandbytes
def test_cache_belongs_to_the_quantization_and_to_no_device_map(base, tmp_path):
    def key(**teacher):
        student = {"path": base}
        run = Run(tmp_path, tokenizer=None, method="ab", student=student, teacher={"path": base, **teacher})
        return Trainer(load(run.arguments[1])[0]).teachers.caches["teacher"].file.key

    keys = [key(), key(quantize="4bit"), key(quantize="8bit")]
    assert len({*keys}) == 3
    assert key(device_map="auto") == keys[0]
    assert key(quantize="4bit", device_map="auto") == keys[1]


def test_hash_of_weights_that_are_not_quantized_is_as_ever(base):
    assert [*hash_weights(ModelConfig(path=base), AutoConfig.from_pretrained(base), "teacher")] == ["model.safetensors"]


def test_checkpoint_that_this_machine_can_only_dequantize(base, fp8):
    model, original = (load_model(path=path) for path in (fp8, base))
    assert model.tolerance is None  # it is an ordinary model now
    model.check()
    scaled = dict(load_file(pathlib.Path(fp8) / "model.safetensors"))
    for name, parameter in model.causal_lm.named_parameters():
        if "_proj" in name:
            exact = scaled[name].float() * scaled[f"{name}_scale_inv"]
            torch.testing.assert_close(parameter.data, exact, rtol=1e-2, atol=1e-6)  # by way of bfloat16
            assert parameter.dtype == original.head.weight.dtype
    meta = loading.read_meta_model(ModelConfig(path=fp8), "teacher")
    assert "fp8, dequantized while it loads" in meta.quantization.note
    plain = sum(p.numel() for p in meta.model.parameters()) * 4
    assert meta.quantization.bytes(loading.meta_model(meta.whole, torch.float32), torch.float32) >= plain


def test_scales_that_nothing_reads_are_refused(fp8, tmp_path):
    folder = pathlib.Path(shutil.copytree(fp8, tmp_path / "lost"))
    settings = json.loads((folder / "config.json").read_text())
    del settings["quantization_config"]
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"down_proj.weight_scale_inv, which is not read: is it quantized"):
        load_model(path=str(folder))


class WithoutGradient(nn.Linear):
    def forward(self, x):
        return super().forward(x.detach())


class WithWrongGradient(nn.Linear):
    def forward(self, x):
        return super().forward(x.detach() + 0.1 * (x - x.detach()))


@pytest.mark.parametrize("kind", [nn.Linear, WithoutGradient, WithWrongGradient])
def test_projections_that_lose_gradients_are_refused(kind):
    layers = nn.Sequential(nn.Linear(8, 8, bias=True), kind(8, 6)).requires_grad_(False)
    if kind is nn.Linear:
        quantized.check_gradients(layers, "none")
        return
    with pytest.raises(ConfigError, match=f"gradients don't pass through its {kind.__name__} layers"):
        quantized.check_gradients(layers, "4 bits")


def test_bitsandbytes_says_nothing_in_runs_that_are_not_quantized():
    """peft imports it, and on some CPUs it then asks for a package whose kernel loses gradients."""
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


@pytest.mark.parametrize(
    ("method", "package"),
    [("bitsandbytes", "bitsandbytes"), ("awq", "gptqmodel"), ("gptq", "gptqmodel"), ("torchao", "torchao")],
)
def test_missing_package_is_one_line_before_weights_load(base, tmp_path, method, package, monkeypatch):
    monkeypatch.setattr(quantized, "_has", lambda name: False)
    folder = mark(shutil.copytree(base, tmp_path / "marked"), {"quant_method": method, "bits": 4})
    with pytest.raises(ConfigError, match=f"teacher.path: .*: {method} weights need the package {package}: pip"):
        loading.read_meta_model(ModelConfig(path=folder), "teacher")
    with pytest.raises(ConfigError, match=r"teacher.quantize: bitsandbytes weights need the package bitsandbytes"):
        loading.read_meta_model(ModelConfig(path=base, quantize="8bit"), "teacher")


REFUSED = {
    "unknown method": ({"teacher": {"path": "@nonsense"}}, "nonsense weights can't be used here"),
    "twice": ({"teacher": {"path": "@fp8", "quantize": "4bit"}}, "quantized already, by fp8; leave teacher.quantize"),
    "no adapter": ({"student": {"path": "@fp8"}}, "only an adapter can be trained on these; give student.lora"),
    "random": (
        {"student": {"config": SMALL, "quantize": "4bit"}, "tokenizer": "quickstart"},
        "student.quantize: random weights are not loaded",
    ),
    "spread student": ({"student": {"path": "@base", "device_map": "auto"}}, "student.device_map: a student is"),
    "spread author": (
        {"student": {"path": "@base", "device_map": "auto"}, "method": "generate"},
        "student.device_map: a model that is spread over devices can't write here; use student.quantize",
    ),
    "spread adapter": (
        {"teacher": {"path": "@base", "adapter": "x", "device_map": "auto"}},
        "teacher.device_map: no adapter can be merged into a model that is spread",
    ),
    "spread writer": (
        {"teacher": {"path": "@base", "device_map": "auto"}, "method": "minillm", "loss": "rkl"},
        "teacher.device_map: minillm's teacher also writes",
    ),
}


@pytest.mark.parametrize(("sections", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_at_the_start(tmp_path, base, fp8, sections, message, capsys, monkeypatch):
    folders = {"@base": base, "@fp8": fp8}
    if sections.get("teacher", {}).get("path") == "@nonsense":
        folders["@nonsense"] = mark(shutil.copytree(base, tmp_path / "marked"), {"quant_method": "nonsense"})
    sections = {"student": {"path": base}, "teacher": {"path": base}, "method": "ab", "tokenizer": None, **sections}
    for role in ("student", "teacher"):
        sections[role] = {
            key: folders.get(value, value) if key == "path" else value for key, value in sections[role].items()
        }
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights load"))
    assert Run(tmp_path, **sections)() == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert message in line


MAPS = {
    "in memory": {"": "cpu"},
    "some layers on the disk": {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "disk",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    },
    "all on the disk": {"": "disk"},
}


@pytest.mark.parametrize("places", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("tied", [False, True])
def test_spread_teacher_gives_the_same_bits(tmp_path, places, tied, monkeypatch):
    path = save_model(tmp_path / "model", {**SMALL, "tie_word_embeddings": tied})
    if tied and "lm_head" in places:
        places = {**places, "lm_head": "cpu"}  # accelerate gives tied weights one place
    plain, read = load_model(path=path).eval(), AutoModelForCausalLM.from_pretrained

    def placed(*arguments, device_map, **options):
        assert device_map == "auto"
        return read(*arguments, device_map=places, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", placed)
    spread = load_model(path=path, device_map="auto").eval()
    assert any(p.is_meta for p in spread.parameters()) == ("disk" in places.values())
    assert not spread.can_compile
    assert plain.can_compile
    spread.check()
    rows = samples([20, 12])
    with torch.no_grad():
        assert torch.equal(logits_of(spread, rows), logits_of(plain, rows))
    assert torch.equal(spread.head.weight, plain.head.weight)  # what the cache keeps


def test_several_processes_spread_no_teacher_unless_its_cache_is_there(tmp_path, base, monkeypatch):
    teacher = {"path": base, "device_map": "auto"}
    run = Run(tmp_path, "cache.mode=disk", tokenizer=None, method="ab", student={"path": base}, teacher=teacher)
    several = types.SimpleNamespace(**{**vars(distributed), "world_size": lambda: 2})
    monkeypatch.setattr(teachers, "distributed", several)
    (config,) = load(run.arguments[1], run.arguments[3::2])
    with pytest.raises(ConfigError, match=r"teacher.device_map: one process spreads the teacher .* there are 2"):
        Trainer(config)
    monkeypatch.setattr(HiddenStateStore, "is_recorded", True)
    Trainer(config)


def test_a_broken_note_of_an_adapter_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/something"}')
    (tmp_path / quantized.SETTINGS).write_text("{")
    with pytest.raises(ConfigError, match=rf"{quantized.SETTINGS} can't be read"):
        loading.model_spec(str(tmp_path))
