"""Mixtures of experts: the auxiliary loss of a student's routers, and the load of its experts in the log."""

import json

import pytest
import torch
import torch._dynamo.testing
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral import modeling_mixtral

from abkd_fast.config.models import LoraConfig, ModelConfig
from abkd_fast.config.recipe import load
from abkd_fast.data.batches import make_step_batch, pack
from abkd_fast.errors import ConfigError
from abkd_fast.models import forms, loading
from abkd_fast.models.experts import Experts, describe
from abkd_fast.models.packed import PackedCausalLM
from abkd_fast.models.padded import PaddedCausalLM
from packed_models import samples
from runs import RECIPE, Run, assert_same, crash_and_resume

SIZES = {
    "vocab_size": 211,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.1,
    "pad_token_id": None,
}
MIXTRAL = {**SIZES, "model_type": "mixtral", "num_local_experts": 4, "output_router_logits": True}
QWEN3 = {**SIZES, "model_type": "qwen3_moe", "num_experts": 6, "moe_intermediate_size": 8, "output_router_logits": True}
JAMBA = {
    **SIZES,
    "model_type": "jamba",
    "num_experts": 4,
    "output_router_logits": True,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
    "mamba_d_state": 4,
    "mamba_dt_rank": 2,
}
FORMS = {"packed": PackedCausalLM, "padded": PaddedCausalLM}


def build(config, form="packed", **changes):
    """A student in training whose routers don't choose evenly."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**config, **changes}), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(200.0 if "gate.weight" in name or "router" in name else 4.0)
    student = FORMS[form](model.train(), "student")
    student.experts = Experts(model, model.router_aux_loss_coef)
    return student


def cross_entropy(labels):
    def loss(head):
        return torch.nn.functional.cross_entropy(head.hidden @ head.weight.T, labels)

    return loss


def own_loss(model, rows):
    """transformers' loss of padded rows with labels, and its auxiliary part before the factor."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids, labels, mask = (torch.full((len(rows), longest), value) for value in (0, -100, 0))
    for index, row in enumerate(rows):
        (start, stop), tokens = row["spans"], torch.tensor(row["input_ids"])
        ids[index, : len(tokens)], mask[index, : len(tokens)], labels[index, start:stop] = tokens, 1, tokens[start:stop]
    model.set_attn_implementation("eager")
    output = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, output_router_logits=True)
    return output.loss, output.aux_loss


def gradients(model):
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def assert_close(ours, theirs):
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-3 * gradient.norm(), name


@pytest.mark.parametrize(
    ("config", "form"), [(MIXTRAL, "packed"), (QWEN3, "packed"), (QWEN3, "padded"), (JAMBA, "padded")]
)
def test_loss_and_gradients_are_those_of_transformers(config, form):
    """One micro-batch in one process. The padded form is given one group: the auxiliary loss is none of parts."""
    student, rows = build(config, form), samples([16, 19, 17, 20])
    (batch,) = make_step_batch(rows, [], 512).micro_batches
    loss, router_loss = student(batch, cross_entropy(batch.labels))
    (loss + 0.1 * router_loss).backward()
    ours = gradients(student.causal_lm)
    expected, expected_aux = own_loss(student.causal_lm, rows)
    expected.backward()
    assert (loss + 0.1 * router_loss).item() == pytest.approx(expected.item(), rel=1e-5)
    assert router_loss.item() == pytest.approx(expected_aux.item(), rel=1e-5)
    assert abs(expected_aux.item() - 2) > 0.02, "the routers choose too evenly to tell"
    assert_close(ours, gradients(student.causal_lm))


@pytest.mark.parametrize("form", FORMS)
def test_parts_count_with_their_share_of_the_tokens(form):
    """Micro-batches, those of plain text too, and groups of padded sequences."""
    student, rows, texts = build(QWEN3, form), samples([40, 9, 38, 10]), samples([25, 25], seed=1)
    parts = make_step_batch(rows, texts, 60).micro_batches
    assert len(parts) > 2
    total = sum(student(part, cross_entropy(part.labels))[1] for part in parts)
    expected, tokens = 0.0, sum(len(row["input_ids"]) for row in (*rows, *texts))
    for part in parts:
        lengths = [len(row["input_ids"]) for row in part.samples]
        groups = [part.samples]
        if form == "padded":
            groups = [
                [row for row, length in zip(part.samples, lengths, strict=True) if (length > 20) == long]
                for long in (True, False)
            ]
        for group in filter(None, groups):
            share = sum(len(row["input_ids"]) for row in group) / tokens
            expected += share * own_loss(student.causal_lm, group)[1].item()
        if form == "packed":
            student.causal_lm.set_attn_implementation("abkd_packed")
    assert total.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recomputes", [False, True])
def test_each_token_is_counted_once(form, recomputes, monkeypatch):
    """Neither padding nor a layer that is computed again counts; nor do passes without gradients."""
    student, rows, aux_losses = build(MIXTRAL, form), samples([16, 20, 3, 18]), []
    compute = modeling_mixtral.load_balancing_loss_func
    monkeypatch.setattr(
        modeling_mixtral, "load_balancing_loss_func", lambda *args: aux_losses.append(1) or compute(*args)
    )
    (batch,) = pack(rows, 512)
    expected = gradients_and_tokens(student, batch)
    if recomputes:
        student.checkpoint_layers()
        assert len(aux_losses) == (1 if form == "packed" else 2), "one for each group"
        ours = gradients_and_tokens(student, batch)
        assert_close(ours[0], expected[0])
        assert torch.equal(ours[1], expected[1])
    chosen = []
    for router in (module for module in student.modules() if type(module).__name__ == "MixtralTopKRouter"):
        router.register_forward_hook(lambda module, inputs, output: chosen.append(output[2].flatten()))
    student.causal_lm.set_attn_implementation("eager")
    for row in rows:
        student.causal_lm(input_ids=torch.tensor([row["input_ids"]]), use_cache=False)
    own = torch.cat([torch.cat(chosen[layer::2]).bincount(minlength=4) for layer in range(2)])
    assert torch.equal(expected[1], own)
    with torch.no_grad():
        student(batch, cross_entropy(batch.labels))
    student.model.eval()
    assert torch.is_tensor(student(batch, cross_entropy(batch.labels)))
    assert not student.experts.tokens.any()


def gradients_and_tokens(student, batch):
    """Those of the auxiliary loss alone."""
    student(batch, cross_entropy(batch.labels))[1].backward()
    tokens = student.experts.tokens.clone()
    student.experts.tokens.zero_()
    found = gradients(student.causal_lm)
    return {name: gradient for name, gradient in found.items() if gradient is not None}, tokens


def test_numbers_of_the_log():
    experts = build(MIXTRAL).experts
    numbers = experts.load(torch.tensor([10, 10, 10, 10, 40, 0, 0, 0]))
    assert numbers == {"router_load_max": 2.5, "router_idle_experts": 0.375}
    assert experts.load(torch.zeros(8, dtype=torch.int64)) == {}


@pytest.mark.slow
def test_compiled_layers_stay_whole():
    """Counting splits no compiled layer, and layers share their code."""

    def graphs(student):
        counter = torch._dynamo.testing.CompileCounter()
        torch._dynamo.reset()
        student.compile(backend=counter)
        for lengths in ([9, 14], [20, 3]):
            (batch,) = pack(samples(lengths), 64)
            student(batch, cross_entropy(batch.labels)).backward()
        return counter.frame_count

    student, plain = (build(QWEN3, "padded", output_router_logits=False, router_aux_loss_coef=0.0) for _ in range(2))
    plain.experts = None
    assert graphs(student) == graphs(plain)
    assert student.experts.tokens.sum() == 2 * 2 * 46


def run_of(folder, *overrides, **config):
    sizes = {"vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 0, "router_jitter_noise": 0.1}
    student = {"config": {**MIXTRAL, **sizes, **config}}
    values = {"train": {**RECIPE["train"], "steps": 4}, "checkpoint": {"every_steps": 2}, "log": {"every_steps": 3}}
    return Run(folder, *overrides, student=student, eval={"every_steps": 4}, **values)


def test_a_resumed_run_is_the_undisturbed_one(tmp_path, monkeypatch, capsys):
    """With routing that is random in training."""
    undisturbed = run_of(tmp_path / "undisturbed")
    assert undisturbed() == 0
    assert "router     auxiliary loss times 0.1, over all tokens of a step" in (said := capsys.readouterr().out)
    assert "random in training, by the seed: jitter_noise is 0.1" in said
    run = run_of(tmp_path / "run")
    crash_and_resume(run, monkeypatch, 3)
    assert_same(run, undisturbed)
    points = [point for point in run.points() if point.get("kind") == "train"]
    assert [point["step"] for point in points] == [3, 4]
    for point in points:
        assert point["loss_router"] == pytest.approx(2, abs=0.5)
        assert 1 <= point["router_load_max"] <= 2
        assert 0 <= point["router_idle_experts"] < 1


def test_the_log_has_the_loss_of_the_method_and_the_factor_of_the_recipe(tmp_path, capsys):
    points = {}
    for factor in (0, 50):
        run = run_of(tmp_path / str(factor), f"student.router_aux_loss={factor}", "log.every_steps=1", "train.steps=3")
        assert run() == 0
        lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        points[factor] = [line for line in lines if line["kind"] == "train"]
    assert "no auxiliary loss: student.router_aux_loss is 0" in capsys.readouterr().out
    assert points[0][0]["loss"] == points[50][0]["loss"]
    assert points[0][2]["loss"] != points[50][2]["loss"]
    assert "loss_router" not in points[0][0]
    assert points[50][0]["grad_norm"] > points[0][0]["grad_norm"]


def test_an_adapter_gets_the_gradient(tmp_path):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MIXTRAL))
    model.save_pretrained(tmp_path)
    spec = ModelConfig(path=str(tmp_path), lora=LoraConfig(rank=2, dropout=0.0))
    meta = loading.read_meta_model(spec, "student")
    assert meta.router_loss_weight == 0.1
    student = loading.load(spec, meta.config, "student", torch.float32, torch.device("cpu")).train()
    student.experts = Experts(student.causal_lm, meta.router_loss_weight)
    (batch,) = pack(samples([9, 14]), 64)
    found, tokens = gradients_and_tokens(student, batch)
    assert tokens.sum() == 2 * 2 * 23
    assert found
    assert all("lora_" in name for name in found)
    assert any(gradient.any() for gradient in found.values())


LLAMA4 = {**SIZES, "model_type": "llama4_text", "num_local_experts": 4, "output_router_logits": True}
LLAMA = {**SIZES, "model_type": "llama"}


@pytest.mark.parametrize(
    ("config", "wanted", "weight", "line"),
    [
        (MIXTRAL, None, 0.1, "auxiliary loss times 0.1, over all tokens"),
        (MIXTRAL, 0.3, 0.3, "auxiliary loss times 0.3"),
        (MIXTRAL, 0.0, 0.0, "no auxiliary loss: student.router_aux_loss is 0"),
        ({**MIXTRAL, "output_router_logits": False}, None, 0.0, "student.router_aux_loss=0.1 adds it"),
        (LLAMA4, None, 0.0, "no auxiliary loss: transformers has none for a llama4_text model"),
    ],
)
def test_first_lines_say_what_is_added(config, wanted, weight, line):
    meta = loading.read_meta_model(ModelConfig(config=config, router_aux_loss=wanted), "student")
    assert meta.router_loss_weight == weight
    assert line in next(describe(meta.model, weight, wanted))


def test_a_factor_needs_a_loss(tmp_path):
    for config in (LLAMA4, LLAMA):
        with pytest.raises(ConfigError, match=r"student\.router_aux_loss is 0\.1, but transformers computes no"):
            loading.read_meta_model(ModelConfig(config=config, router_aux_loss=0.1), "student")
    values = {**RECIPE, "method": "kd", "teacher": {"path": "teacher", "router_aux_loss": 0.1}}
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"teacher\.router_aux_loss: a teacher is not trained"):
        load(str(tmp_path / "recipe.json"))


def test_routing_that_depends_on_company_is_refused(monkeypatch):
    """Experts that choose their tokens, and so a token's experts depend on all other tokens of a pass."""

    def choose_tokens(self, hidden_states):
        logits = hidden_states.reshape(-1, self.hidden_dim) @ self.weight.T
        best = logits.softmax(-1) * (logits == logits.topk(max(1, len(logits) // 4), dim=0).values.unsqueeze(1)).any(0)
        scores, indices = best.topk(self.top_k, dim=-1)
        return logits, scores, indices

    config = AutoConfig.for_model(**{**MIXTRAL, "num_local_experts": 3})
    assert forms.choose(config, "student").problem is None
    monkeypatch.setattr(modeling_mixtral.MixtralTopKRouter, "forward", choose_tokens)
    config = AutoConfig.for_model(**{**MIXTRAL, "num_local_experts": 5})
    with pytest.raises(ConfigError, match="it is not causal"):
        forms.choose(config, "student")


def test_keys_compressed_from_more_tokens_than_the_check_has_are_found():
    """DeepSeek V4 makes one key of 128 tokens, also of several packed sequences."""
    sizes = {"moe_intermediate_size": 8, "n_routed_experts": 4, "num_hidden_layers": 3}
    config = AutoConfig.for_model(**{**SIZES, **sizes, "model_type": "deepseek_v4"})
    assert {*config.layer_types} == {"heavily_compressed_attention"}
    assert forms.choose(config, "student").problem is not None
