"""What the DistillationTrainer is given: models, rows and settings, and one line for those that can't be used."""

import datasets
import peft
import pytest
import torch
from test_transformers_trainer import build, rows
from transformers import DataCollatorForSeq2Seq, TrainingArguments
from transformers.trainer_utils import EvalPrediction

from abkd_fast.integrations.rows import collate_rows
from abkd_fast.integrations.transformers import DistillationTrainer

STUDENT, TEACHER, ROWS = build("llama"), build("llama", 1), rows()
CHATS = datasets.Dataset.from_list([{"messages": [{"role": "user", "content": "x"}]}])
LORA = peft.LoraConfig(r=2, target_modules=["q_proj"])


@pytest.fixture
def arguments(tmp_path):
    def make(**options):
        shared = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
        return TrainingArguments(str(tmp_path / "out"), logging_steps=1, **shared, **options)

    return make


def stream(data):
    return datasets.IterableDataset.from_generator(lambda: iter(data))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teacher": None}, "give teacher, a model, or hidden_states"),
        ({"teacher": None, "hidden_states": "no/states"}, "hidden_states: no/states has no index.json"),
        ({"model": None}, "model is a NoneType, expected a transformers model"),
        ({"model": None, "model_init": lambda: STUDENT}, "model_init can't be used: .* give it as model"),
        ({"model": torch.nn.Linear(2, 2)}, "model is a Linear, expected a transformers model"),
        ({"model": "./no/model"}, "model: ./no/model can't be loaded"),
        ({"teacher": "./no/model"}, "teacher: ./no/model can't be loaded"),
        ({"teacher": 3}, "teacher is a int, expected a transformers model"),
        ({"teacher": STUDENT}, "model and teacher share weights"),
        ({"model": build("llama").requires_grad_(False)}, "model: none of its weights requires a gradient"),
        ({"teacher": build("llama", vocab_size=8192)}, "vocabulary"),
        ({"args": {"learning_rate": 1e-4}}, "args is a dict, expected transformers.TrainingArguments"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1, expected 0"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches would cut packed rows"),
        ({"data_collator": DataCollatorForSeq2Seq(None)}, "data_collator can't be used: rows are packed"),
        ({"compute_metrics": EvalPrediction}, "compute_metrics can't be used: no logits"),
        ({"compute_loss_func": max}, "compute_loss_func can't be used: the loss is a divergence"),
        ({"preprocess_logits_for_metrics": max}, "preprocess_logits_for_metrics can't be used"),
        ({"temperature": 0.0}, "temperature is 0.0, expected a positive number"),
        ({"temperature": float("nan")}, "temperature is nan, expected a positive number"),
        ({"temperature": "2"}, "temperature is '2', expected a number"),
        ({"hard_weight": 1.5}, "hard_weight is 1.5, expected 0 to 1"),
        ({"hard_weight": None}, "hard_weight is None, expected a number"),
        ({"divergence": "abc"}, 'unknown divergence "abc"'),
        ({"divergence": 0.5}, "divergence is a float, expected one of"),
        ({"train_dataset": CHATS}, "train_dataset has the columns messages; expected input_ids"),
        ({"eval_dataset": {"one": ROWS, "two": CHATS}}, "eval_dataset has the columns messages"),
        ({"train_dataset": datasets.DatasetDict(train=ROWS)}, "train_dataset has the splits train"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_wrong_arguments(arguments, given, message):
    of_args = {name: given.pop(name) for name in ("label_smoothing_factor", "accelerator_config") if name in given}
    given = {"args": arguments(**of_args), "model": STUDENT, "teacher": TEACHER, "train_dataset": ROWS} | given
    with pytest.raises(ValueError, match=message) as caught:
        DistillationTrainer(**given)
    assert "\n" not in str(caught.value)
    assert all(parameter.requires_grad for parameter in STUDENT.parameters())


def test_an_adapter_on_the_teacher_is_refused(arguments):
    base = build("llama")
    with pytest.raises(ValueError, match="model and teacher share weights"):
        DistillationTrainer(peft.get_peft_model(base, LORA), arguments(), teacher=base, train_dataset=ROWS)


def test_models_by_their_folders(arguments, tmp_path):
    STUDENT.save_pretrained(tmp_path / "student")
    TEACHER.save_pretrained(tmp_path / "teacher")
    losses = []
    folders = str(tmp_path / "student"), tmp_path / "teacher"
    for student, teacher in (folders, (STUDENT, TEACHER)):
        losses.append(DistillationTrainer(student, arguments(), teacher=teacher, eval_dataset=ROWS).evaluate())
    assert losses[0]["eval_loss"] == losses[1]["eval_loss"]


def test_streams(arguments):
    """Rows of unknown number, in training and evaluation: the losses of the same rows in memory."""
    losses = []
    for kind in (list, stream):
        options = arguments(max_steps=2, eval_strategy="steps", eval_steps=2, train_sampling_strategy="sequential")
        data = {"train_dataset": kind(ROWS), "eval_dataset": kind(rows(5, 4))}
        trainer = DistillationTrainer(build("llama"), options, teacher=build("llama", 1), **data)
        trainer.train()
        history = trainer.state.log_history
        losses.append([point[key] for point in history for key in ("loss", "eval_loss") if key in point])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


def test_rows_without_tokens(arguments):
    """Also those that come later, or whose columns nobody knows before."""
    trainer = DistillationTrainer(build("llama"), arguments(), teacher=build("llama", 1), train_dataset=ROWS)
    with pytest.raises(ValueError, match="has the columns messages; expected input_ids"):
        trainer.evaluate(CHATS)
    with pytest.raises(ValueError, match="a row has no input_ids; expected input_ids and labels"):
        trainer.evaluate(stream(CHATS))
    with pytest.raises(ValueError, match="a row has no input_ids"):
        collate_rows([*CHATS])
