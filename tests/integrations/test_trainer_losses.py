"""Within transformers' Trainer: the loss of routers, the loss of an evaluation, and what DDP makes of the loss."""

import copy

import pytest
import torch
import torch.distributed as dist
from test_transformers_trainer import gradients, our_step, rows
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from abkd_fast.data.batches import make_step_batch
from abkd_fast.errors import ConfigError
from abkd_fast.integrations.rows import collate_rows, spans_of
from abkd_fast.integrations.transformers import DistillationTrainer
from abkd_fast.losses.divergences import parse
from abkd_fast.losses.fused_linear import fused_linear_divergence
from abkd_fast.models import forms
from abkd_fast.models.experts import Experts
from conftest import LLAMA

ROUTERS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.1, "output_router_logits": True, "pad_token_id": None}
MIXTRAL = {**LLAMA, **ROUTERS, "model_type": "mixtral", "num_local_experts": 4}
LAYERS = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0}
MAMBA = {"mamba_d_state": 4, "mamba_dt_rank": 2, "num_hidden_layers": 2}
JAMBA = {**LLAMA, **ROUTERS, **LAYERS, **MAMBA, "model_type": "jamba", "num_experts": 4}
FAMILIES = {"llama": LLAMA, "mixtral": MIXTRAL, "jamba": JAMBA}


def build(name, seed=0, **changes):
    torch.manual_seed(seed)
    values = FAMILIES[name] | {"vocab_size": 1024, "initializer_range": 0.1} | changes
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=torch.float32)


@pytest.fixture
def make(tmp_path):
    def trainer(student, teacher, **options):
        shared = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
        arguments = TrainingArguments(str(tmp_path / "out"), **shared, **options)
        return DistillationTrainer(student, arguments, teacher=teacher, train_dataset=rows(), eval_dataset=rows(7, 5))

    return trainer


def our_loss(model, teacher, parts):
    """The objective of a step of our own trainer, and its gradients."""
    student, frozen = (forms.choose(m.config, "student").build(m, "student") for m in (model.train(), teacher))
    student.experts = Experts(student.causal_lm, model.config.router_aux_loss_coef)
    count, total = sum(len(part.labels) for part in parts), 0.0
    for part in parts:
        with torch.no_grad():
            states = frozen(part, lambda head: head).arguments("teacher")

        def loss_of(head, part=part, states=states):
            options = {"divergence": parse("ab:0.2,0.7"), "labels": part.labels, "reduction": "sum"}
            return fused_linear_divergence(**head.arguments("student"), **states, **options) / count

        loss, router_loss = student(part, loss_of)
        objective = loss + student.experts.loss_weight * router_loss
        objective.backward()
        total += objective.item()
    return total, gradients(model)


@pytest.mark.parametrize(("name", "tokens"), [("mixtral", 1000), ("mixtral", 40), ("jamba", 1000)])
def test_loss_of_routers_is_our_trainers(make, name, tokens):
    """Also with accumulation: each batch has its share of the step's tokens."""
    student, teacher = build(name), build("llama", 1)
    data = [*rows(4)][2 if name == "jamba" else 0 :]  # our own trainer pads no rows to one length that differ more
    samples = [{"input_ids": row["input_ids"], "spans": spans_of(row["labels"])} for row in data]
    parts = make_step_batch(samples, [], tokens).micro_batches
    assert (len(parts) > 1) == (tokens < 100)
    expected, expected_gradients = our_loss(copy.deepcopy(student), copy.deepcopy(teacher), parts)
    trainer = make(student.train(), teacher)
    assert trainer.student.form == ("padded" if name == "jamba" else "packed")
    batches = [{"batch": part, "labels": part.labels, "shift_labels": part.labels} for part in parts]
    batches, count = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    total = 0.0
    with trainer._packed():
        for inputs in batches:
            loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=count)
            loss.backward()
            total += loss.item()
    assert total == pytest.approx(expected, rel=1e-5)
    assert total > 0.2, "the loss of the routers is the larger part"
    for key, gradient in gradients(student).items():
        torch.testing.assert_close(gradient, expected_gradients[key], rtol=1e-5, atol=1e-6, msg=key)


def test_routers_whose_configuration_asks_for_no_loss(make):
    trainer = make(build("mixtral", output_router_logits=False), build("llama", 1), max_steps=1)
    assert trainer.student.experts is None
    trainer.train()


@pytest.mark.parametrize("size", [3, 8])
def test_evaluation_is_the_mean_over_labels(make, size):
    """However many rows, and labels, a batch has."""
    student, teacher = build("llama"), build("llama", 1)
    samples = [{"input_ids": row["input_ids"], "spans": spans_of(row["labels"])} for row in rows(7, 5)]
    expected, _ = our_step(copy.deepcopy(student), copy.deepcopy(teacher), samples)
    trainer = make(student, teacher, per_device_eval_batch_size=size)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert trainer.predict(rows(7, 5)).metrics["test_loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_weights_that_ddp_takes_for_unused(make, tmp_path):
    """The output projection gets its gradient from the loss alone, and DDP looks for it from the outputs on."""
    student, teacher, data = build("llama"), build("llama", 1), [*rows(4)]
    trainer = make(student, teacher)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        found = []
        for model in (student, DistributedDataParallel(student, find_unused_parameters=True)):
            student.zero_grad()
            with trainer._packed():
                trainer.compute_loss(model, collate_rows(data)).backward()
            found.append({name: gradient.clone() for name, gradient in gradients(student).items()})
    finally:
        dist.destroy_process_group()
    assert "lm_head.weight" in found[0]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_sharded_weights_of_deepspeed_are_refused(make, monkeypatch):
    monkeypatch.setattr("abkd_fast.integrations.arguments.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ConfigError, match="ZeRO stage 3 shards what the losses read"):
        make(build("llama"), build("llama", 1))


def test_several_gpus_of_one_process_are_refused(tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    arguments._n_gpu = 2
    with pytest.raises(ConfigError, match="one process sees 2 GPUs: start one for each"):
        DistillationTrainer(build("llama"), arguments, teacher=build("llama", 1), train_dataset=rows())
