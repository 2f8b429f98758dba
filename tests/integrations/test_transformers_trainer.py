"""Distillation within transformers' Trainer: the same loss and gradients as in our own trainer."""

import copy
import json

import datasets
import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from abkd_fast import cache
from abkd_fast.data import quickstart
from abkd_fast.data.batches import collate
from abkd_fast.data.chat import PromptFormat
from abkd_fast.data.rows import read_rows
from abkd_fast.data.tokenize import tokenize
from abkd_fast.errors import ConfigError
from abkd_fast.integrations.rows import collate_rows, spans_of
from abkd_fast.integrations.transformers import DistillationTrainer
from abkd_fast.losses.divergences import parse
from abkd_fast.losses.fused_linear import fused_linear_divergence
from abkd_fast.models import forms
from conftest import GPT2, LLAMA

VOCAB = 1024
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
GEMMA = {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}
FAMILIES = {
    "llama": {**LLAMA, "vocab_size": VOCAB},
    "gpt2": {**GPT2, "vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, **NO_DROPOUT},
    "gemma2": {**LLAMA, "vocab_size": VOCAB, **GEMMA},
    "bloom": {"model_type": "bloom", "vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4},
}  # fmt: skip


def build(name, seed=0, **changes):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**FAMILIES[name] | changes)).float()


def rows(count=12, seed=3):
    """Tokens and labels: some have two trained parts, some have none before their end."""
    generator, made = torch.Generator().manual_seed(seed), []
    for number in range(count):
        ids = torch.randint(VOCAB, (7 + 3 * (number % 5),), generator=generator).tolist()
        labels = [-100] * 3 + ids[3:]
        if number % 3 == 0:
            labels[4] = -100
        made.append({"input_ids": ids, "labels": labels})
    return datasets.Dataset.from_list(made)


@pytest.fixture
def arguments(tmp_path):
    def make(**options):
        shared = {"output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4, "report_to": "none"}
        shared |= {"use_cpu": True, "max_steps": 3, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
        return TrainingArguments(**shared | options)

    return make


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def our_step(model, teacher, samples, loss="ab:0.2,0.7", hard_weight=0.0, temperature=1.0):
    """The loss and gradients of our own trainer's step: `CausalLM.forward` with the fused loss, a mean over labels."""
    batch = collate(samples)
    student, frozen = (forms.choose(m.config, "student").build(m, "student") for m in (model, teacher))
    with torch.no_grad():
        states = frozen(batch, lambda head: head)
    options = {
        "divergence": parse(loss),
        "labels": batch.labels,
        "hard_weight": hard_weight,
        "temperature": temperature,
    }
    value = student(
        batch,
        lambda head: fused_linear_divergence(**head.arguments("student"), **states.arguments("teacher"), **options),
    )
    value.backward()
    return value.detach(), gradients(model)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"divergence": "jsd:0.1", "hard_weight": 0.3, "temperature": 2.0}], ids=str)
def test_loss_and_gradients_are_our_trainers(name, options, arguments):
    student, teacher, data = build(name), build(name, 1), rows(4)
    samples = [{"input_ids": row["input_ids"], "spans": spans_of(row["labels"])} for row in data]
    ours = {"loss": options.get("divergence", "ab:0.2,0.7"), **{k: v for k, v in options.items() if k != "divergence"}}
    expected, expected_gradients = our_step(copy.deepcopy(student), copy.deepcopy(teacher), samples, **ours)
    trainer = DistillationTrainer(student, arguments(), teacher=teacher, train_dataset=data, **options)
    assert trainer.student.form == ("padded" if name == "bloom" else "packed")
    inputs = collate_rows([*data])
    with trainer._packed():
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    found = gradients(student)
    assert found.keys() == expected_gradients.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected_gradients[key], rtol=1e-6, atol=1e-7, msg=key)
    assert not gradients(teacher)


def test_training_saving_and_evaluation(arguments, tmp_path):
    student, teacher = build("llama"), build("llama", 1, initializer_range=0.1)
    options = {
        "max_steps": 12,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": 12,
    }
    trainer = DistillationTrainer(
        student, arguments(**options), teacher=teacher, train_dataset=rows(), eval_dataset=rows(8, 4)
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [point["loss"] for point in trainer.state.log_history if "loss" in point]
    assert losses[-1] < 0.9 * losses[0]
    assert trainer.evaluate()["eval_loss"] != before
    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[1, 2, 3, 4]])
    for model in (student, teacher):
        assert model.generate(ids, max_new_tokens=2, pad_token_id=0).shape[1] >= 5, "the models can be used again"
    torch.testing.assert_close(loaded(ids).logits, student(ids).logits, rtol=1e-5, atol=1e-5)
    assert "abkd" not in (tmp_path / "saved" / "config.json").read_text()


def test_accumulation_changes_nothing(arguments):
    """Two micro-batches of one step count every label once, however many each has."""
    weights = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_grad_norm": 0.0}
        student = build("llama")
        sgd = arguments(**options, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant")
        DistillationTrainer(student, sgd, teacher=build("llama", 1), train_dataset=rows(12)).train()
        weights.append([parameter.detach().clone() for parameter in student.parameters()])
    for others in weights[1:]:
        for one, other in zip(weights[0], others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_recomputed_layers_give_the_same_gradients(arguments):
    results = []
    for recompute in (False, True):
        student = build("llama")
        options = arguments(gradient_checkpointing=recompute, max_steps=2, learning_rate=1e-2)
        DistillationTrainer(student, options, teacher=build("llama", 1), train_dataset=rows()).train()
        results.append([parameter.detach() for parameter in student.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_losses_outside_of_training_are_refused(arguments):
    """The model's own attention would not know where a packed row begins."""
    trainer = DistillationTrainer(build("llama"), arguments(), teacher=build("llama", 1), train_dataset=rows())
    with pytest.raises(RuntimeError, match="within train, evaluate and predict alone"):
        trainer.compute_loss(trainer.model, collate_rows([*rows(2)]))


def test_adapters(arguments, tmp_path):
    torch.manual_seed(5)
    student = peft.get_peft_model(build("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    options = arguments(max_steps=4, learning_rate=1e-1)
    trainer = DistillationTrainer(student, options, teacher=build("llama", 1), train_dataset=rows())
    trainer.train()
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    trainer.save_model(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


@pytest.fixture
def cached(tmp_path, write_jsonl):
    """A teacher, the folder of its states by `python -m abkd_fast.cache`, and their rows, with a column of a user's."""
    teacher = build("llama", 1, bos_token_id=0, eos_token_id=0)
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer = quickstart.tokenizer()
    tokenizer.save_pretrained(tmp_path / "teacher")
    texts = [{"prompt": f"What is {n} plus 2?", "output": f"It is {n + 2}."} for n in range(12)]
    write_jsonl(texts)
    recipe = {
        "run": {"name": "x", "dir": str(tmp_path)},
        "tokenizer": "quickstart",
        "student": {"config": FAMILIES["gpt2"] | {"n_positions": 512}},
        "teacher": {"path": str(tmp_path / "teacher")},
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 128},
        "train": {"device": "cpu"},
        "cache": {"dir": str(tmp_path / "states")},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert cache.main(["--config", str(tmp_path / "recipe.json")]) == 0
    (folder,) = [path.parent for path in (tmp_path / "states").rglob("index.json")]
    tokenized = tokenize(read_rows(str(tmp_path / "rows.jsonl")), tokenizer, 128, 256, PromptFormat()).dataset
    data = datasets.Dataset.from_list([
        {
            "input_ids": row["input_ids"],
            "labels": [-100] * row["spans"][0] + row["input_ids"][row["spans"][0] :],
            "index": 0,
        }
        for row in tokenized
    ])  # fmt: skip
    return teacher, folder, data


def test_states_in_place_of_a_teacher(arguments, cached):
    """The losses are those of the teacher itself, which is there for other rows, if it is given."""
    teacher, folder, data = cached
    others = rows(3).add_column("index", [0] * 3)
    options = arguments(max_steps=4, eval_strategy="steps", eval_steps=2)
    losses = []
    for given in ({"teacher": teacher}, {"teacher": teacher, "hidden_states": folder}):
        trainer = DistillationTrainer(build("gpt2"), options, train_dataset=data, eval_dataset=others, **given)
        trainer.train()
        history = trainer.state.log_history
        losses.append([point[key] for point in history for key in ("loss", "eval_loss") if key in point])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 6
    alone = DistillationTrainer(build("gpt2"), arguments(), hidden_states=folder, train_dataset=trainer.train_dataset)
    with pytest.raises(ConfigError, match="other rows need teacher"):
        alone.evaluate(others)
    states = {"hidden_states": folder}
    with pytest.raises(ConfigError, match="train_dataset row 1"):
        DistillationTrainer(build("gpt2"), arguments(), train_dataset=rows(), **states)
    with pytest.raises(ConfigError, match="eval_dataset: hidden_states has the states of train_dataset alone"):
        DistillationTrainer(build("gpt2"), arguments(), train_dataset=data, eval_dataset=others, **states)


def test_labels_and_masks():
    assert spans_of([-100, -100, 5, 6, -100, 7]) == [2, 4, 5, 6]
    assert spans_of([4, 5, 6]) == [1, 3], "nothing predicts the first token"
    assert spans_of([-100] * 4) == []
    padded = {"input_ids": [0, 0, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1], "labels": [-100, -100, -100, 6, 7]}
    batch = collate_rows([padded, {"input_ids": [1, 2, 3]}])
    assert batch["batch"].input_ids.tolist() == [[5, 6, 7, 1, 2, 3]]
    assert batch["labels"].tolist() == [6, 7, 2, 3]
    with pytest.raises(ValueError, match="label 1 of a row is 9, and its token 2"):
        collate_rows([{"input_ids": [1, 2, 3], "labels": [-100, 9, 3]}])
    with pytest.raises(ValueError, match="2 labels and 3 tokens"):
        collate_rows([{"input_ids": [1, 2, 3], "labels": [-100, 2]}])
    for row in ({"input_ids": [1, 2], "labels": [-100, -100]}, {"input_ids": [1]}):
        with pytest.raises(ValueError, match="has no token to train"):
            collate_rows([row])
