"""The decoder of GPUs. On a CPU its attention is written out, and a graph is computed again when it is replayed."""

import contextlib
import copy
import gc
import types
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from abkd_fast.config.models import LoraConfig, ModelConfig
from abkd_fast.errors import ConfigError
from abkd_fast.generation import graphs
from abkd_fast.generation.decoder import Decoder, prepared
from abkd_fast.generation.sampling import SamplingParams, sample, sample_mixture
from abkd_fast.models import lora
from abkd_fast.models.packed import PackedCausalLM
from conftest import GPT2, LLAMA
from packed_models import build, samples

MODELS = {
    "gpt2": GPT2,
    "llama-gqa": LLAMA,
    "mistral-window": {**LLAMA, "model_type": "mistral", "sliding_window": 4},
    "odd-heads": {**LLAMA, "head_dim": 12},
}
MORE_THAN_WINDOWS = {
    "sinks": {"model_type": "granite_swa", "sliding_window": 4},
    "soft caps": {"model_type": "gemma2", "head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0},
    "chunks": {
        **{"model_type": "llama4_text", "head_dim": 8, "intermediate_size_mlp": 32, "num_local_experts": 2},
        **{"no_rope_layers": [1, 0], "attention_chunk_size": 6, "floor_scale": 4, "attn_temperature_tuning": True},
    },
    "narrow values": {
        **{"model_type": "deepseek_v3", "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8},
        **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 5, "first_k_dense_replace": 9},
    },
}
PROMPTS = [row["input_ids"] for row in samples([5, 17, 2, 9, 31, 1, 12, 3])]
SETTINGS = SamplingParams(max_new_tokens=12, no_repeat_ngram_size=3)
SEEDS = list(range(len(PROMPTS)))


def attend_slots(query, keys, values, starts, lengths, scale, window):
    assert starts.tolist() == list(range(len(query) + 1))
    outputs = []
    for q, k, v, length in zip(query, keys, values, lengths.tolist(), strict=True):
        seen = slice(0 if window is None else max(0, length - window), length)
        k, v = (x[seen].repeat_interleave(len(q) // x.shape[1], 1) for x in (k, v))  # [length, heads, dim]
        weights = (torch.einsum("hd,thd->ht", q, k) * scale).softmax(1)
        outputs.append(torch.einsum("ht,thd->hd", weights, v))
    return torch.stack(outputs)


@pytest.fixture
def captures(monkeypatch):
    """`sample` uses GraphDecoder. Returns the decoders that have captured a graph."""
    captured = []

    def capture(self):
        captured.append(self)
        self.hidden = self._all_slots()
        self.graph = types.SimpleNamespace(replay=lambda: self.hidden.copy_(self._all_slots()))

    monkeypatch.setattr("abkd_fast.generation.sampling.Decoder", graphs.graph_decoder)
    monkeypatch.setattr(graphs, "attend_slots", attend_slots)
    monkeypatch.setattr(graphs.GraphDecoder, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(total_memory=2**40))
    graphs.kept_decoders.clear()
    return captured


def generate(model, count=8, batch_size=3):
    with torch.autocast("cpu", torch.bfloat16):
        return sample(model, PROMPTS[:count], SETTINGS, SEEDS[:count], batch_size)


def change(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in filter(lambda x: x.requires_grad, model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("name", MODELS)
def test_all_slots_at_once_is_the_same(captures, monkeypatch, name):
    model = build(MODELS[name], torch.float64)
    with monkeypatch.context() as patch:
        patch.setattr("abkd_fast.generation.sampling.Decoder", Decoder)
        expected = sample(model, PROMPTS, SETTINGS, SEEDS, batch_size=3)
        mixed = sample_mixture(model, model, 0.5, PROMPTS[:3], SETTINGS, SEEDS[:3])
    assert sample(model, PROMPTS, SETTINGS, SEEDS, batch_size=3) == expected
    # Slots that are idle, and have tokens of the call before.
    assert sample(model, PROMPTS[5:], SETTINGS, SEEDS[5:], batch_size=2) == expected[5:]
    teacher = PackedCausalLM(copy.deepcopy(model.model), "teacher")
    ours = sample_mixture(model, teacher, 0.5, PROMPTS[:3], SETTINGS, SEEDS[:3])
    assert [tokens for tokens, *_ in ours] == [tokens for tokens, *_ in mixed]
    assert len(captures) == 2


@pytest.mark.parametrize("name", MORE_THAN_WINDOWS)
def test_what_attention_has_beside_windows(captures, monkeypatch, name):
    model = build(LLAMA, torch.float64, **MORE_THAN_WINDOWS[name], num_hidden_layers=2)
    arguments = PROMPTS[:3], SamplingParams(max_new_tokens=8), SEEDS[:3], 2
    with monkeypatch.context() as patch:
        patch.setattr("abkd_fast.generation.sampling.Decoder", Decoder)
        expected = sample(model, *arguments)
    assert sample(model, *arguments) == expected
    assert len(captures) == 1


def student(kind):
    if kind == "lora":
        spec = ModelConfig(path="base", lora=LoraConfig(rank=4))
        return PackedCausalLM(lora.attach_adapter(build(LLAMA, torch.bfloat16).model, spec, "student"), "student")
    return build(GPT2, torch.float32)


@pytest.mark.parametrize("kind", ["all weights", "lora"])
def test_graph_of_an_earlier_call_reads_new_weights(captures, kind):
    model, responses = student(kind), []
    for step in range(3):
        responses.append(generate(model))
        assert all("forward" not in vars(module) for module in model.modules())
        assert len(captures) == step + 1  # one of `model`, and of each copy
        assert generate(copy.deepcopy(model)) == responses[-1]
        change(model, step)
    assert responses[0] != responses[1] != responses[2]
    assert captures[0].copies
    assert {copied.dtype for pair in captures[0].copies for copied in pair if copied is not None} == {torch.bfloat16}


def test_decoder_goes_with_its_model(captures):
    model = build(GPT2, torch.float32)
    generate(model)
    captures.clear()
    references = weakref.ref(model), weakref.ref(graphs.kept_decoders[model])
    del model
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    generate(build(GPT2, torch.bfloat16).model)
    captures.clear()
    gc.collect()
    assert not graphs.kept_decoders, "a model that sampling has wrapped for one call leaves nothing"


def test_too_large_decoders_are_not_kept(captures, monkeypatch):
    first, second = (build(GPT2, torch.float32) for _ in range(2))
    generate(first)
    size = graphs.kept_decoders[first].nbytes
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(total_memory=8 * size))
    generate(second)
    assert second not in graphs.kept_decoders
    generate(first)
    assert first in graphs.kept_decoders
    assert len(captures) == 2


def test_new_decoder_where_the_kept_one_does_not_fit(captures, monkeypatch):
    monkeypatch.setattr(graphs, "BUCKET", 16)
    model = build(GPT2, torch.float32)
    for count, batch_size, expected in [(2, 2, 1), (1, 8, 1), (3, 3, 2), (4, 2, 2), (5, 2, 3), (5, 2, 3)]:
        generate(model, count, batch_size)
        assert len(captures) == expected
    model.model.to(torch.float64).to(torch.float32)  # other memory
    generate(model, 5, 2)
    assert len(captures) == 4
    with contextlib.suppress(ZeroDivisionError):
        sample(model, PROMPTS[:2], SETTINGS, SEEDS[:2], on_response=lambda *_: 1 / 0)
    assert not graphs.kept_decoders, "an error leaves nothing"


def test_without_graphs_it_goes_on(captures, monkeypatch):
    model = build(GPT2, torch.float32)
    expected = generate(model)
    graphs.kept_decoders.clear()

    def fail(self):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(graphs.GraphDecoder, "_capture", fail)
    with pytest.warns(RuntimeWarning, match=r"without CUDA graphs \(operation not permitted\)"):
        assert generate(model) == expected
    assert generate(model) == expected  # does not try again: a warning would be an error


def test_float32_on_a_gpu_is_refused():
    model = build(GPT2, torch.float32)
    with FakeTensorMode():
        model.head.weight = torch.nn.Parameter(torch.empty(211, 32, device="cuda"))
    with pytest.raises(ConfigError, match=r'student: it computes in float32, .* under torch.autocast\("cuda"'):
        sample(model, PROMPTS, SETTINGS, SEEDS)
    with FakeTensorMode():
        model.head.weight = torch.nn.Parameter(torch.empty(211, 32, device="cuda", dtype=torch.bfloat16))
    with prepared(model):
        pass


@pytest.mark.gpu
def test_graphs_change_nothing(monkeypatch):
    model = build(GPT2, torch.bfloat16, n_embd=64).cuda()
    settings = SamplingParams(max_new_tokens=40)
    with_graphs = sample(model, PROMPTS, settings, SEEDS, batch_size=3)

    class Eager(graphs.GraphDecoder):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.use_graph = False

    monkeypatch.setattr(graphs, "GraphDecoder", Eager)
    assert sample(model, PROMPTS, settings, SEEDS, batch_size=3) == with_graphs
