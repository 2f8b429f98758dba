"""Mixtures of experts: the auxiliary loss of a student's routers, and the load of its experts in the log."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from abkd_fast.data.batches import make_step_batch
from abkd_fast.models.experts import Experts
from abkd_fast.models.packed import PackedCausalLM
from abkd_fast.models.padded import PaddedCausalLM
from packed_models import samples

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
    assert abs(expected_aux.item() - 2) > 0.05, "the routers choose too evenly to tell"
    assert_close(ours, gradients(student.causal_lm))
