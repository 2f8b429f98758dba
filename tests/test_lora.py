"""LoRA adapters and recomputed layers, against peft and transformers used plainly: padded, whole logits, float64."""

import itertools
import json
import pathlib
import shutil

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import GPT2, LLAMA
from safetensors.torch import load_file, save_file
from test_models import padded_logits, samples
from test_resume import Killed, Run, assert_same, at_step, crash
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from abkd_fast import attention, fused_linear, models, tasks
from abkd_fast.config import ConfigError, LoraConfig, ModelConfig
from abkd_fast.data import pack
from abkd_fast.divergences import AlphaBeta
from abkd_fast.ops import divergence_loss
from abkd_fast.recipe import load
from abkd_fast.train import main
from abkd_fast.trainer import Trainer

CPU = torch.device("cpu")
END = {"eos_token_id": 0, "bos_token_id": 0}
SMALL = {**LLAMA, **END, "vocab_size": 1024, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}


def save_model(folder, config, tokenizer=None, seed=0):
    """A random model whose logits are not nearly uniform, as a folder."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    model.save_pretrained(folder)
    (tokenizer or tasks.tokenizer()).save_pretrained(folder)
    return str(folder)


def save_adapter(folder, base, seed=1, **settings):
    """An adapter that does something: a new one's second factor is zero."""
    gpt2 = AutoConfig.from_pretrained(base).model_type == "gpt2"
    settings = {"target_modules": ["c_attn", "c_fc"] if gpt2 else ["q_proj", "v_proj"], "r": 4, **settings}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=gpt2, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return str(folder)


WITHOUT_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


@pytest.fixture(params=[{**GPT2, **END, **WITHOUT_DROPOUT}, LLAMA], ids=["gpt2", "llama"])
def folders(request, tmp_path):
    """A base and an adapter of it."""
    base = save_model(tmp_path / "base", request.param)
    return base, save_adapter(tmp_path / "adapter", base, lora_dropout=0.3)


def load_packed(key, dtype=torch.float64, **spec):
    spec = ModelConfig(**spec)
    return models.load(spec, models.read_config(spec, key), key, dtype, CPU)


def plain(folders, dtype=torch.float64):
    """peft's own model."""
    base, adapter = folders
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)


def test_packed_gradient_equals_padded(folders):
    base, adapter = folders
    rows = samples([5, 17, 2, 9, 31])
    student, reference = load_packed("student", path=base, adapter=adapter), plain(folders)
    student.check()
    (batch,) = pack(rows, max_tokens=64)
    theirs = torch.randn(len(batch.labels), 211, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    divergence = AlphaBeta(0.2, 0.7)

    def loss(hidden, weight, bias):
        identity = torch.eye(211, dtype=torch.float64)  # a teacher whose logits are its hidden states
        return fused_linear.fused_linear_divergence(hidden, weight, theirs, identity, divergence, batch.labels)

    packed = student.eval()(batch, loss)
    packed.backward()
    reference.eval()
    padded = divergence_loss(padded_logits(reference, rows), theirs, divergence)
    padded.backward()

    torch.testing.assert_close(packed, padded, rtol=1e-12, atol=0)
    expected = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
    gradients = {name.removeprefix("model."): p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    assert all("lora_" in name for name in gradients)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-11 * expected[name].norm(), name


def test_dropout_in_training(folders):
    """One row alone draws the very masks that it draws in peft's own model."""
    base, adapter = folders
    student, reference = load_packed("student", path=base, adapter=adapter).train(), plain(folders).train()
    rows = samples([19])
    (batch,) = pack(rows, max_tokens=19)
    logits = []
    for compute in (
        lambda: student.hidden_states(batch) @ student.head.weight.T,
        lambda: padded_logits(reference, rows),
        lambda: student.eval().hidden_states(batch) @ student.head.weight.T,
    ):
        torch.manual_seed(5)
        logits.append(compute())
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-12, atol=1e-12)
    assert (logits[0] - logits[2]).abs().max() > 1e-3


def test_dropout_can_be_taken_from_an_adapter(folders):
    base, adapter = folders
    student = load_packed("student", path=base, adapter=adapter, dropout=0.0).train()
    rates = [module.p for module in student.modules() if isinstance(module, torch.nn.Dropout)]
    assert set(rates) <= {0.0}
    assert student.model.peft_config["default"].lora_dropout == 0
    (batch,) = pack(samples([19]), max_tokens=19)
    torch.testing.assert_close(student.hidden_states(batch), student.eval().hidden_states(batch), rtol=0, atol=0)


def test_merged_teacher_equals_adapter(folders):
    base, adapter = folders
    (batch,) = pack(samples([5, 17, 9]), max_tokens=64)
    teacher = load_packed("teacher", path=base, adapter=adapter)
    assert not teacher.has_adapter
    student = load_packed("student", path=base, adapter=adapter).eval()
    torch.testing.assert_close(
        teacher.eval().hidden_states(batch), student.hidden_states(batch), rtol=1e-12, atol=1e-12
    )
    without = load_packed("teacher", path=base).eval().hidden_states(batch)
    assert (teacher.hidden_states(batch) - without).abs().max() > 1e-2


def test_merging_rounds_once(folders):
    """bfloat16 weights are those of the exact sum, within half a unit of the last of 8 bits (and float32's error)."""
    base, adapter = folders
    merged = load_packed("teacher", torch.bfloat16, path=base, adapter=adapter).model
    exact = dict(plain(folders).merge_and_unload().named_parameters())
    for name, parameter in merged.named_parameters():
        assert parameter.dtype == torch.bfloat16
        error = (parameter.double() - exact[name]).abs()
        assert (error <= 2**-8 * exact[name].abs() + 1e-7).all(), name
    frequencies = [buffer for name, buffer in merged.named_buffers() if name.endswith("inv_freq")]
    assert all(buffer.dtype == torch.float32 for buffer in frequencies)


def test_bfloat16_keeps_the_base_in_16_bits_and_the_adapter_in_32(folders):
    base, adapter = folders
    student = load_packed("student", torch.bfloat16, path=base, adapter=adapter)
    types = {name: p.dtype for name, p in student.named_parameters()}
    assert {types[name] for name in types if "lora_" in name} == {torch.float32}
    assert {types[name] for name in types if "lora_" not in name} == {torch.bfloat16}
    inputs, heads = set(), []
    for name, module in student.named_modules():
        if name.endswith("lora_dropout.default"):
            module.register_forward_hook(lambda module, arguments, output: inputs.add(arguments[0].dtype))
    (batch,) = pack(samples([9, 5]), max_tokens=14)
    with torch.autocast("cpu", torch.bfloat16):
        student.check()
        student.train()(batch, lambda hidden, weight, bias: heads.append(weight) or hidden.sum()).backward()
    assert inputs == {torch.bfloat16}
    assert heads[0].data_ptr() == student.head.weight.data_ptr()  # no copy of a frozen matrix in every step
    assert all(p.grad.isfinite().all() for name, p in student.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("has_adapter", [True, False], ids=["lora", "all weights"])
def test_recomputed_layers_give_the_same_bits(folders, has_adapter):
    base, adapter = folders
    (batch,) = pack(samples([5, 17, 9]), max_tokens=64)
    results = []
    for recomputes in (False, True):
        spec = {"path": base, "dropout": 0.1} | ({"adapter": adapter} if has_adapter else {})
        student = load_packed("student", torch.float32, **spec).train()
        if recomputes:
            student.checkpoint_layers()
        torch.manual_seed(7)
        before = attention.calls
        student(batch, lambda hidden, weight, bias: (hidden @ weight.T).logsumexp(1).sum()).backward()
        layers = student.causal_lm.config.num_hidden_layers
        assert attention.calls - before == layers * (2 if recomputes else 1)
        results.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
        embedded = student.causal_lm.get_input_embeddings()(batch.input_ids)
        assert embedded.requires_grad != has_adapter  # nothing below the first adapter has a gradient to compute
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_cost_counts_the_adapter(folders):
    base, adapter = folders
    student = load_packed("student", path=base, adapter=adapter)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    spec = ModelConfig(path=base, adapter=adapter)
    assert models.adapter_size(spec, student.causal_lm.config, "student") == trained
    assert models.adapter_size(ModelConfig(path=base), student.causal_lm.config, "student") is None


def test_recomputing_refuses_models_without():
    student = models.PackedCausalLM(AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA)), "student")
    student.causal_lm.supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match=r"train.gradient_checkpointing: a llama model has none"):
        student.checkpoint_layers()


@pytest.fixture
def base(tmp_path):
    return save_model(tmp_path / "base", {**SMALL, "attention_dropout": 0.1})


def test_layers_with_an_adapter_compile_whole(tmp_path, monkeypatch):
    """As on a GPU, where attention is one operator: no graph breaks.

    One piece of code is for the first layer, whose input has no gradient, one for all others.
    """

    def kernel(module, query, *_, **__):
        return query.transpose(1, 2).contiguous(), None

    base = save_model(tmp_path / "base", {**SMALL, "num_hidden_layers": 4})
    adapter = save_adapter(tmp_path / "adapter", base, lora_dropout=0.1)
    uncompiled, compiled = (load_packed("student", path=base, adapter=adapter) for _ in range(2))
    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, kernel)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled.compile(backend=counter, fullgraph=True)
    (batch,) = pack(samples([5, 17, 9]), max_tokens=64)
    results = []
    for student in (uncompiled, compiled):
        torch.manual_seed(0)
        student.train().hidden_states(batch).logsumexp(1).sum().backward()
        results.append({name: p.grad for name, p in student.named_parameters() if "lora_B" in name})
    assert counter.frame_count == 2
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


class LoraRun(Run):
    """A small run that trains a new adapter on `base`."""

    def __init__(self, folder, base, *overrides, **sections):
        sections = {"student": {"path": base, "lora": {"rank": 4}}, "tokenizer": None, **sections}
        super().__init__(folder, *overrides, **sections)

    def weights(self):
        return load_file(self.folder / "final" / "adapter_model.safetensors")


def trainer(run):
    trainer = Trainer(load(run.arguments[1], run.arguments[3::2])[0])
    trainer._load()
    return trainer


@pytest.mark.parametrize("lora", [{"rank": 4}, None], ids=["lora", "all weights"])
def test_weights_that_are_trained_are_float32(tmp_path, base, lora):
    run = LoraRun(tmp_path, base, "train.dtype=bfloat16", student={"path": base, "lora": lora})
    for parameter in trainer(run).student.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)


def test_only_the_adapter_is_trained(tmp_path, base, monkeypatch):
    made = trainer(LoraRun(tmp_path, base))
    before = {name: p.detach().clone() for name, p in made.student.named_parameters()}
    shapes, product = [], fused_linear._product

    def watched(left, right, out, *more):
        shapes.append(out.shape)
        product(left, right, out, *more)

    monkeypatch.setattr(fused_linear, "_product", watched)
    for batch, _ in zip(made._batches(), range(3), strict=False):
        made._step(batch)
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
    (batch,) = pack([{"input_ids": [*ids[0].tolist(), 0], "prompt_length": 1}], max_tokens=64)
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
        return Trainer(load(run.arguments[1])[0]).cache.file.key

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
    student.save(tmp_path / "again", tasks.tokenizer())
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
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("weights were loaded"))
    assert run() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error.replace(f"{places}/", "@")
    assert not run.folder.exists()


@pytest.mark.parametrize("dim", [100, 104, 3])
def test_heads_in_multiples_of_8(dim):
    """What a GPU's kernel sees is padded, what it gives is not; gradients too."""
    q, k, v = (torch.randn(2, 7, dim, dtype=torch.float64, requires_grad=True) for _ in range(3))
    seen = []

    def kernel(q, k, v):
        seen.append(q.shape[-1])
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=dim**-0.5)

    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    result = attention._in_multiples_of_8(kernel, q, k, v)
    assert seen == [-(-dim // 8) * 8]
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)
    upstream = torch.randn_like(expected)
    for ours, theirs in zip(*(torch.autograd.grad(x, (q, k, v), upstream) for x in (result, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


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
