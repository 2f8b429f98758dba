import copy
import dataclasses
import functools
import pathlib

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from abkd_fast.config.models import ModelConfig
from abkd_fast.data.batches import pack
from abkd_fast.errors import ConfigError
from abkd_fast.losses.divergences import AlphaBeta
from abkd_fast.losses.fused_linear import fused_linear_divergence
from abkd_fast.losses.logits import divergence_loss
from abkd_fast.models import attention, loading
from conftest import GPT2, LLAMA, anonymous_bytes, needs_proc
from packed_models import build, padded_logits, samples

CPU = torch.device("cpu")


def test_fused_gelu_is_that_of_transformers():
    plain = build(GPT2, torch.float64).model
    fused = copy.deepcopy(plain)
    loading.fuse_activations(fused)
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64, requires_grad=True)
    for ours, theirs in zip(fused.transformer.h, plain.transformer.h, strict=True):
        assert type(ours.mlp.act) is not type(theirs.mlp.act)
        values, expected = ours.mlp.act(x), theirs.mlp.act(x)
        assert torch.allclose(values, expected, rtol=0, atol=1e-14)
        slopes = [torch.autograd.grad(y.sum(), x)[0] for y in (values, expected)]
        assert torch.allclose(*slopes, rtol=0, atol=1e-14)


def test_loaded_models_are_fused():
    config = AutoConfig.for_model(**GPT2)
    model = loading.load(ModelConfig(config=GPT2), config, "student", torch.float32, CPU)
    assert {type(block.mlp.act) for block in model.model.transformer.h} == {torch.nn.GELU}
    assert model.model.config.activation_function == "gelu_new"  # so is the model saved


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama-gqa"])
@pytest.mark.parametrize(
    ("dtype", "loss_tolerance", "gradient_tolerance"), [(torch.float32, 1e-6, 1e-5), (torch.float64, 1e-12, 1e-12)]
)
def test_packed_training_equals_padded(config, dtype, loss_tolerance, gradient_tolerance):
    rows = samples([5, 17, 2, 9, 31])
    student, teacher = build(config, dtype, seed=1), build(config, dtype, seed=2)
    (batch,) = pack(rows, max_tokens=64)
    divergence = AlphaBeta(0.2, 0.7)

    def loss(student):
        with torch.no_grad():
            theirs = teacher.hidden_states(batch)
        return fused_linear_divergence(
            student.hidden, student.weight, theirs, teacher.head.weight, divergence, batch.labels
        )

    packed = student(batch, loss)
    packed.backward()
    packed_gradients = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    with torch.no_grad():
        theirs = padded_logits(teacher.model, rows)
    padded = divergence_loss(padded_logits(student.model, rows), theirs, divergence)
    padded.backward()

    assert abs(packed.item() - padded.item()) <= loss_tolerance * abs(padded.item())
    for name, parameter in student.named_parameters():
        error = (packed_gradients[name] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-9)
        if name.endswith(("k_proj.bias", "c_attn.bias")):  # a key bias has no gradient: softmax is shift invariant
            error = (packed_gradients[name] - parameter.grad).norm() / packed_gradients[name].norm()
        assert error <= gradient_tolerance, name


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama-gqa"])
def test_micro_batches_do_not_change_the_loss(config):
    rows = samples([5, 17, 2, 9, 31])
    student = build(config, torch.float64)
    loss = functools.partial(lambda head: (head.hidden @ head.weight.T).logsumexp(1).sum())
    whole = sum(student(batch, loss) for batch in pack(rows, max_tokens=64))
    pieces = [student(batch, loss) for batch in pack(rows, max_tokens=31)]
    assert len(pieces) == 3
    torch.testing.assert_close(sum(pieces), whole, rtol=1e-12, atol=0)


SUPPORTED = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": 4},
    "qwen2": {**LLAMA, "model_type": "qwen2"},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 8},
    "gemma": {**LLAMA, "model_type": "gemma", "head_dim": 8},
    "gpt_neox": {**LLAMA, "model_type": "gpt_neox"},
    "opt": {"model_type": "opt", "vocab_size": 211, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 128, "word_embed_proj_dim": 32},
    "head size 100": {**LLAMA, "hidden_size": 200, "num_attention_heads": 2, "num_key_value_heads": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", SUPPORTED)
def test_check_accepts(name):
    build(SUPPORTED[name], torch.float32).check()


def test_check_notices_lost_boundaries(monkeypatch):
    # The trap that a shape test misses: attention that runs across the sequences of a packed row.
    model = build(LLAMA, torch.float32)
    one_sequence = attention._one_sequence

    def leaky(module, query, key, value, mask, **kwargs):
        out = one_sequence(query, key, value, query.shape[-1] ** -0.5, -1, 0.0)
        return out.transpose(1, 2), None

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, leaky)
    with pytest.raises(ConfigError, match="its logits differ"):
        model.check()


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


def test_dropout_setting_reaches_the_model():
    config = loading.read_meta_model(ModelConfig(config=GPT2, dropout=0.25), "student").config
    assert (config.attn_pdrop, config.resid_pdrop, config.embd_pdrop) == (0.25, 0.25, 0.25)


def test_only_what_is_trained_loses_its_attention_dropout(monkeypatch, caplog):
    monkeypatch.setattr(attention, "supports_dropout", lambda device: False)
    spec = ModelConfig(config={**LLAMA, "attention_dropout": 0.1})
    for key, dropout, warnings in (("model", 0.1, 0), ("teacher", 0.1, 0), ("student", 0.0, 1)):
        config = loading.read_meta_model(spec, key).config
        loading.load(spec, config, key, torch.float32, CPU)
        assert (config.attention_dropout, len(caplog.records)) == (dropout, warnings)
    assert "student: attention_dropout is 0.1, but" in caplog.text


def file_of(tensor):
    """The file that is mapped where a tensor's values are; empty where none is."""
    for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *path = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in span.split("-"))
        if start <= tensor.data_ptr() < end:
            return "".join(path)
    raise AssertionError("no such memory")


@needs_proc
def test_a_model_that_is_to_be_in_parts_stays_on_the_disk(tmp_path):
    config = AutoConfig.for_model(**{**LLAMA, "vocab_size": 400_000, "hidden_size": 64})  # 51 MB a projection
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(tmp_path)
    spec = ModelConfig(path=str(tmp_path))
    config = loading.read_meta_model(spec, "student").config
    config.dtype = torch.bfloat16  # not what the files have
    loading.load(spec, config, "student", torch.float32, CPU, in_parts=True)  # imports what loading needs
    before = anonymous_bytes()
    parts = loading.load(spec, config, "student", torch.float32, CPU, in_parts=True)
    assert anonymous_bytes() - before < 10e6
    whole = loading.load(spec, config, "student", torch.float32, CPU)
    assert {file_of(parameter) for parameter in parts.parameters()} == {str(tmp_path / "model.safetensors")}
    assert not any(file_of(parameter).endswith(".safetensors") for parameter in whole.parameters())
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours.float(), theirs)


def test_saved_model_generates(tmp_path):
    from abkd_fast.data import quickstart

    tokenizer = quickstart.tokenizer()
    model = build(LLAMA, torch.float32, vocab_size=len(tokenizer))
    model.save(tmp_path / "final", tokenizer, model.weights())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert attention.NAME not in (tmp_path / "final" / "config.json").read_text()
    ids = torch.tensor([tokenizer("Add 1 and 2.")["input_ids"]])
    out = loaded.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    torch.testing.assert_close(
        loaded(ids).logits, model.model(ids, cu_seq_lens_q=torch.tensor([0, ids.shape[1]])).logits
    )
    assert out.shape[1] > ids.shape[1]


def test_batch_moves_all_but_labels():
    (batch,) = pack(samples([5, 4]), max_tokens=16)
    moved = batch.to(torch.device("meta"))
    devices = {field.name: getattr(moved, field.name) for field in dataclasses.fields(moved)}
    assert {name for name, x in devices.items() if isinstance(x, torch.Tensor) and x.device == CPU} == {"labels"}


def test_check_tolerates_the_rounding_of_16_bits():
    # Under autocast hidden states may come out in float32, but are only as good as the products that made them.
    model = build(GPT2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        model.check()
        hidden = []
        (batch,) = pack(samples([9, 5]), max_tokens=14)
        model(batch, lambda head: hidden.extend(head[:2]) or head.hidden.sum())
    assert {x.dtype for x in hidden} == {torch.bfloat16}


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama-gqa"])
def test_compiled_layers_compute_the_same(config):
    plain = build(config, torch.float64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    compiled = copy.deepcopy(plain)
    compiled.compile(backend="aot_eager")
    names = [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in compiled.named_parameters()] == names, "checkpoints keep their names"
    for lengths in ([5, 17, 9], [7, 22, 3, 4]):
        (batch,) = pack(samples(lengths), max_tokens=64)
        results = []
        for model in (plain, compiled):
            model.zero_grad()
            loss = model(batch, lambda head: (head.hidden @ head.weight.T).logsumexp(1).sum())
            loss.backward()
            results.append([loss.detach(), *(p.grad for p in model.parameters())])
        torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)


@torch.library.custom_op("abkd_test::attention", mutates_args=())
def opaque_attention(query: torch.Tensor, cu_seqlens: torch.Tensor, longest: int) -> torch.Tensor:
    return query.clone()


@opaque_attention.register_fake
def _(query, cu_seqlens, longest):
    return torch.empty_like(query)


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama-gqa"])
def test_layers_compile_whole_around_an_attention_kernel(config, monkeypatch):
    """As on a GPU, where attention is one operator: no graph breaks, one piece of code for all layers and lengths."""

    def kernel(module, query, key, value, mask, *, cu_seq_lens_q, max_length_q, **_):
        return opaque_attention(query, cu_seq_lens_q, max_length_q).transpose(1, 2).contiguous(), None

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, kernel)
    torch._dynamo.reset()
    model = build(config, torch.float32)
    counter = torch._dynamo.testing.CompileCounter()
    model.compile(backend=counter, fullgraph=True)
    with torch.no_grad():
        for lengths in ([5, 17, 9], [7, 22, 3, 4], [30, 30]):
            model.hidden_states(pack(samples(lengths), max_tokens=64)[0])
    assert counter.frame_count == 1


def test_student_and_teacher_share_few_pieces_of_code(monkeypatch):
    """The student's training, its evaluation and the teacher's forward pass: one each, for any number of layers."""

    def kernel(module, query, key, value, mask, *, cu_seq_lens_q, max_length_q, **_):
        return opaque_attention(query, cu_seq_lens_q, max_length_q).transpose(1, 2).contiguous(), None

    opaque_attention.register_autograd(lambda ctx, gradient: (gradient, None, None))
    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, kernel)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    student, teacher = build(LLAMA, torch.float32).train(), build(LLAMA, torch.bfloat16, num_hidden_layers=3)
    for model in (student, teacher):
        model.compile(backend=counter, fullgraph=True)
    for lengths in ([5, 17, 9], [7, 22, 3, 4], [30, 30]):
        (batch,) = pack(samples(lengths), max_tokens=64)
        with torch.no_grad():
            teacher.hidden_states(batch)
        student.hidden_states(batch).sum().backward()
        with torch.no_grad():
            student.eval().hidden_states(batch)
        student.train()
    assert counter.frame_count == 3
