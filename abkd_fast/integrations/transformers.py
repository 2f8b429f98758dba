"""Distillation within transformers' Trainer: its loop, schedules, callbacks and accelerate, with these losses."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ..data.batches import Batch
from ..errors import ConfigError
from ..losses.arguments import shared_vocabulary
from ..losses.divergences import Divergence, parse
from ..losses.fused_linear import fused_linear_divergence
from ..models import forms, loading
from ..models.attention import NAME
from ..models.causal_lm import CausalLM
from ..models.padded import pad
from ..teacher.folder import StatesFolder
from ..teacher.shards import Rows
from ..teacher.teacher import CachedTeacher, Teacher
from .rows import collate_rows

KEY = "hidden_states"


class DistillationTrainer(Trainer):
    """A `transformers.Trainer` whose loss is a divergence to a teacher, at the tokens whose labels are not -100.

    The loss comes from hidden states and output projections; no logits are held. Rows are packed end to end where the
    model computes the same that way, and padded otherwise; both models are checked on a small one before.

    Source: ABKD (arXiv 2505.04560), equation 5, and the other divergences of `abkd_fast.losses.divergences`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments | None = None,
        *,
        teacher: PreTrainedModel | None = None,
        hidden_states: str | pathlib.Path | None = None,
        divergence: Divergence | str = "ab:0.2,0.7",
        temperature: float = 1.0,
        hard_weight: float = 0.0,
        train_dataset: datasets.Dataset | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            model: the student, also a PEFT model.
            teacher: a model that runs in every step; or else
            hidden_states: a folder of `python -m abkd_fast.cache` with its states for these rows. Evaluation on other
                rows then needs the teacher, too.
            divergence: a value such as `AlphaBeta(0.2, 0.7)`, or its spelling in a recipe.
            temperature, hard_weight: as in `divergence_loss`.
            train_dataset: rows with input_ids and labels (-100 where nothing is trained; without labels all are).
            options: other arguments of `transformers.Trainer`.

        Raises ConfigError, a ValueError, for models that don't fit together, and for rows that the states lack.
        """
        if (teacher is None) == (hidden_states is None):
            raise ConfigError("give either teacher, a model, or hidden_states, the folder of its cache")
        if teacher is model:
            raise ConfigError("model and teacher are one model, which can't be trained and frozen: load it twice")
        if isinstance(teacher, str):
            raise ConfigError(f"teacher is text ({teacher}), expected a model: AutoModelForCausalLM.from_pretrained")
        args = args or TrainingArguments("output")
        self.divergence = parse(divergence) if isinstance(divergence, str) else divergence
        self.loss_options = {"divergence": self.divergence, "temperature": temperature, "hard_weight": hard_weight}
        self.folder = None if hidden_states is None else StatesFolder(str(hidden_states), KEY)
        if self.folder is not None:
            self.places, train_dataset = self._find(train_dataset)
        options.setdefault("data_collator", collate_rows)
        super().__init__(model, args, train_dataset=train_dataset, **options)
        self._signature_columns = ["input_ids", "labels", "attention_mask", "index"]
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True  # the sum over labels, divided once
        self.student = self._form(self.model, "model")
        self.teacher = self._cached() if self.folder else Teacher(self._form(teacher.to(args.device), "teacher"))
        if args.gradient_checkpointing and not getattr(self.student, "passes_options", True):
            problem = f"layers of a {self.student.causal_lm.config.model_type} model don't know packed rows when they"
            raise ConfigError(f"gradient_checkpointing: {problem} are computed again; use abkd_fast.distill")
        theirs = self.teacher.weight if self.folder else self.teacher.model.head.weight
        shared_vocabulary(len(self.student.head.weight), len(theirs))

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Trains. Afterwards both models have their own attention again, and can be used for anything."""
        with self._packed():
            return super().train(*arguments, **options)

    def evaluation_loop(self, *arguments: Any, **options: Any) -> Any:
        with self._packed():
            return super().evaluation_loop(*arguments, **options)

    @contextlib.contextmanager
    def _packed(self) -> Iterator[None]:
        """A context in which the models read packed rows, also where backward computes layers again."""
        forms = [self.student, *([] if self.folder else [self.teacher.model])]
        models = [form.causal_lm for form in forms if form.form == "packed"]
        before = [model.config._attn_implementation for model in models]
        for model in models:
            model.set_attn_implementation(NAME)
        try:
            yield
        finally:
            for model, name in zip(models, before, strict=True):
                model.set_attn_implementation(name)

    def _form(self, model: nn.Module, key: str) -> CausalLM:
        """The model, packed if that computes the same. Raises ConfigError where it is right in no form."""
        inner = model if isinstance(model, PreTrainedModel) else model.get_base_model()
        loading.fuse_activations(inner)
        before = inner.config._attn_implementation
        form = forms.choose(inner.config, key, self.args.device).build(model, key)
        inner.set_attn_implementation(before)
        return form

    def _find(self, rows: datasets.Dataset | None) -> tuple[Any, datasets.Dataset]:
        """The places of the rows' states, and the rows with the number of each."""
        if not isinstance(rows, datasets.Dataset):
            raise ConfigError(f"{KEY}: train_dataset is a {type(rows).__name__}, expected a datasets.Dataset")
        packed = (collate_rows([row])["batch"].samples[0] for row in rows)
        samples = datasets.Dataset.from_list([*packed])
        self.folder.check()
        places = self.folder.find(samples, lambda index: f"train_dataset row {index + 1}", {})
        self.folder.verify()
        return places, rows.add_column("index", [*range(len(rows))])

    def _cached(self) -> CachedTeacher:
        folder, dtype = self.folder, self.student.head.weight.dtype
        shape = loading.meta_model(loading.read_config(str(folder.folder))).get_output_embeddings().weight.shape
        head = tuple(None if part is None else part.to(self.args.device) for part in folder.head(shape, dtype))
        rows = Rows(folder.shards.map(), dtype)
        return CachedTeacher(rows, self.places, folder.samples, head, folder.logit_map, (folder.seconds, 0.0))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict]:
        """The divergence, summed over the batch's labels and divided by num_items_in_batch (None: their number)."""
        batch = inputs["batch"].to(self.args.device)
        count = len(batch.labels) if num_items_in_batch is None else num_items_in_batch
        loss = self._sum(model, batch) / count
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def _sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss is computed where the model calls its output projection: sharded weights are gathered there."""
        if self.folder and not all("index" in sample for sample in batch.samples):
            raise ConfigError(f"{KEY} has the states of train_dataset alone: other rows need teacher, a model")
        if self.student.form == "packed" and self.student.causal_lm.config._attn_implementation != NAME:
            raise RuntimeError("compute_loss works within train, evaluate and predict alone")
        states, losses = self.teacher.linear_head(batch), []
        input_ids, places = batch.input_ids, batch.positions
        if self.student.form == "padded":
            input_ids, places = (tensor.to(self.args.device) for tensor in pad(batch.samples))

        def loss_of(hidden: Tensor) -> None:
            own = self.student.linear_head(hidden.flatten(0, 1).index_select(0, places))
            heads = own.arguments("student") | states.arguments("teacher")
            losses.append(fused_linear_divergence(**heads, labels=batch.labels, reduction="sum", **self.loss_options))

        with self._entered(model, loss_of) as outputs:
            if self.student.form == "packed":
                self.student.run_body(input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
            else:
                self.student.run(input_ids=input_ids)
        (loss,) = losses
        return loss + 0.0 * outputs[0].sum()  # hooks on the outputs of a wrapped model run in backward, too

    @contextlib.contextmanager
    def _entered(self, model: nn.Module, loss_of: Callable[[Tensor], None]) -> Iterator[list[Tensor]]:
        """A context in which the student runs by way of `model`, which may wrap it, and tells its hidden states."""
        outputs, head = [], self.student.head

        def call(**inputs: Any) -> None:
            keep = head.forward
            head.forward = lambda hidden: (loss_of(hidden), keep(hidden))[1]
            outputs.append(model(**inputs).logits)
            head.forward = keep

        self.student.entry = call
        try:
            yield outputs
        finally:
            self.student.entry = None

    def prediction_step(self, model: nn.Module, inputs: dict, *_: Any, **__: Any) -> tuple[Tensor, None, None]:
        """The mean loss of a batch, over its labels; there are no logits."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None
