"""LoRA adapters and recomputed layers, against peft and transformers used plainly: padded, whole logits, float64."""

import peft
import pytest
import torch
import torch._dynamo.testing
from transformers import AutoConfig, AutoModelForCausalLM

from abkd_fast.config.models import LoraConfig, ModelConfig
from abkd_fast.data import quickstart
from abkd_fast.data.batches import pack
from abkd_fast.errors import ConfigError
from abkd_fast.losses import fused_linear
from abkd_fast.losses.divergences import AlphaBeta
from abkd_fast.losses.logits import divergence_loss
from abkd_fast.models import attention, loading
from abkd_fast.models.packed import PackedCausalLM
from conftest import GPT2, LLAMA
from packed_models import padded_logits, samples

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
    (tokenizer or quickstart.tokenizer()).save_pretrained(folder)
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
    return loading.load(spec, loading.read_meta_model(spec, key).config, key, dtype, CPU)


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

    def loss(student):
        identity = torch.eye(211, dtype=torch.float64)  # a teacher whose logits are its hidden states
        return fused_linear.fused_linear_divergence(
            student.hidden, student.weight, theirs, identity, divergence, batch.labels
        )

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
        student.train()(batch, lambda head: heads.append(head.weight) or head.hidden.sum()).backward()
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
        calls = []
        for layer in student.layers:
            next(layer.children()).register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        student(batch, lambda head: (head.hidden @ head.weight.T).logsumexp(1).sum()).backward()
        assert len(calls) == len(student.layers) * (2 if recomputes else 1)
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
    assert loading.read_meta_model(spec, "student").adapter_size == trained
    assert loading.read_meta_model(ModelConfig(path=base), "student").adapter_size is None


def test_recomputing_refuses_models_without():
    student = PackedCausalLM(AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA)), "student")
    student.causal_lm.supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match=r"train.gradient_checkpointing: a llama model has none"):
        student.checkpoint_layers()


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


@pytest.mark.parametrize("adapter", [{"lora": LoraConfig()}, {"adapter": "somewhere"}], ids=["new", "saved"])
def test_random_weights_get_no_adapter(adapter):
    """Without this check all weights were trained, in the type of frozen ones, and the adapter was left out."""
    for key in ("student", "teacher"):
        with pytest.raises(ConfigError, match=f"{key}: an adapter needs the same weights every time"):
            loading.load(ModelConfig(config=LLAMA, **adapter), AutoConfig.for_model(**LLAMA), key, torch.float32, CPU)
