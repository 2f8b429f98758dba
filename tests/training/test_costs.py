import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from abkd_fast.config.training import TrainConfig
from abkd_fast.data.batches import pack
from abkd_fast.generation import decoder
from abkd_fast.generation.sampling import SamplingParams, sample, sample_mixture
from abkd_fast.models import loading
from abkd_fast.training import costs
from conftest import GPT2, LLAMA
from packed_models import build, samples

QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 16}
CPU = torch.device("cpu")


@pytest.mark.parametrize("config", [GPT2, LLAMA, QWEN3], ids=["gpt2", "llama-gqa", "qwen3"])
def test_operations_are_those_that_pytorch_counts(config):
    model = build(config, torch.float32)
    rows = samples([40, 17, 60])
    rows[0]["spans"] = [3, 9, 20, 40]
    (batch,) = pack(rows, max_tokens=128)
    # The mathematics of attention as plain products: those it counts, all of them, causal or not.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch, lambda head: (head.hidden @ head.weight.T).sum()).backward()
    cost = costs.ModelCost(model.model)
    causal = 3 * cost.attention_flops(len(row["input_ids"]) for row in rows)
    assert causal > 0
    assert costs.StepCost(cost, None, None, False).flops(rows) == counter.get_total_flops() - causal


def test_teacher_and_adapter_in_a_step():
    cost, rows = costs.ModelCost(loading.meta_model(AutoConfig.for_model(**LLAMA))), samples([40, 17])
    responses = 40 + 17 - sum(row["spans"][0] for row in rows)
    body, head = cost.body_flops([40, 17]), cost.head_flops(responses)
    assert costs.StepCost(cost, None, cost, False).flops(rows) == 4 * (body + head)
    assert costs.StepCost(cost, None, cost, True).flops(rows) == 3 * body + 4 * head
    assert costs.StepCost(cost, None, cost, False).flops(rows, taught=False) == 3 * (body + head)
    read = cost.body_flops([len(rows[0]["input_ids"])])
    assert costs.StepCost(cost, None, cost, False).flops(rows, read=rows[:1]) == 3 * body + 4 * head + read
    assert costs.StepCost(cost, 100, None, False).flops(rows) == 2 * (body + head)


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama-gqa"])
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_those_that_autograd_keeps(config, recompute):
    (batch,) = pack(samples([40, 17, 60]), max_tokens=128)
    model = build(config, torch.float32, num_hidden_layers=5).train()
    loading.fuse_activations(model)  # as loaded ones are
    if recompute:
        model.checkpoint_layers()
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        model.hidden_states(batch)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept.values()}
    measured = sum(size for address, size in storages.items() if address not in weights)
    counted = costs.activation_bytes(model.model.config, batch, torch.float32, recompute)
    if recompute:  # and one layer, whose tensors the hooks above don't see
        one = costs.activation_bytes(model.model.config, batch, torch.float32, False) / 5
        assert measured < counted < measured + 1.3 * one
    else:
        assert counted == measured


def test_memory_by_what_holds_it():
    config = AutoConfig.for_model(**LLAMA)
    cost = costs.ModelCost(loading.meta_model(config))
    (batch,) = pack(samples([40, 17]), max_tokens=64)
    trained = dict(
        costs.memory(costs.StepCost(cost, None, cost, True), config, batch, TrainConfig(), torch.float32, CPU)
    )
    assert trained["student's weights"] == 4 * cost.parameters
    assert trained["gradients and optimizer"] == 12 * cost.parameters
    assert trained["copies, while a checkpoint is written"] == 12 * cost.parameters
    assert trained["teacher"] == 4 * cost.head
    adapter = dict(
        costs.memory(costs.StepCost(cost, 100, None, False), config, batch, TrainConfig(), torch.bfloat16, CPU)
    )
    assert adapter["student's weights"] == 400 + 2 * cost.parameters
    assert adapter["gradients and optimizer"] == 1200
    assert "teacher" not in adapter


@pytest.mark.parametrize("teacher", [None, GPT2], ids=["student", "mixture"])
@pytest.mark.parametrize("config", [GPT2, LLAMA, QWEN3], ids=["gpt2", "llama-gqa", "qwen3"])
def test_memory_of_generation_is_what_it_takes(monkeypatch, config, teacher):
    held = []

    class Noted(decoder.Decoder):
        def _logits(self, states):
            if len(held) < len(models):  # the first step of each: nothing grows later
                copied = sum(x.weight.nbytes for x in self.model.modules() if "forward" in vars(x))
                held.append((sum(x.nbytes for x in (*self.keys, *self.values)), copied))
            return super()._logits(states)

    monkeypatch.setattr("abkd_fast.generation.sampling.Decoder", Noted)
    models = [build(each, torch.float32) for each in (config, teacher) if each]
    prompts = [sample["input_ids"] for sample in samples([9, 30, 4])]
    settings = SamplingParams(max_new_tokens=20, max_length=45)
    if teacher:
        sample_mixture(*models, 0.2, prompts, settings, [0, 1, 2], batch_size=2)
    else:
        sample(*models, prompts, settings, [0, 1, 2], batch_size=2)
    generators = [(costs.ModelCost(model.model), None) for model in models]
    parts = dict(costs.generation_memory(generators, 2, 45, torch.float32, CPU))
    cached, copied = map(sum, zip(*held, strict=True))
    expected = {"keys and values of 2 sequences": cached, "rearranged weights": copied}
    assert parts == {name: number for name, number in expected.items() if number}
    in_16_bits = dict(costs.generation_memory(generators, 2, 45, torch.bfloat16, CPU))
    assert in_16_bits == {"keys and values of 2 sequences": cached // 2}
    on_gpu = dict(costs.generation_memory(generators, 2, 45, torch.bfloat16, torch.device("cuda")))
    copies = 2 * generators[0][0].projections
    assert on_gpu == {"keys and values of 2 sequences": cached // 2 * 256 // 45, "16-bit copies of weights": copies}
