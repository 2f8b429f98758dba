"""Distillation within transformers' Trainer: its loop, schedules, callbacks and accelerate, with these losses."""

import contextlib
import dataclasses
import pathlib
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from ..data.batches import Batch, count_labels
from ..errors import ConfigError
from ..losses.arguments import shared_vocabulary
from ..losses.divergences import Divergence
from ..losses.fused_linear import fused_linear_divergence
from ..models.attention import NAME
from ..models.experts import Experts, loss_weight
from ..models.padded import pad, token_mask
from ..teacher.folder import StatesFolder
from ..teacher.teacher import Teacher
from .arguments import check_models, check_options, check_rows, check_settings, load_model, loss_options
from .models import entered, form_of, packed_attention
from .rows import COLUMN, collate_rows
from .states import KEY, cached_teacher, find_states


class DistillationTrainer(Trainer):
    """A `transformers.Trainer` whose loss is a divergence to a teacher, at the tokens whose labels are not -100.

    The loss comes from hidden states and output projections; no logits are held. Rows are packed end to end where the
    model computes the same that way, and padded otherwise; both models are checked on a small one before.

    Source: ABKD (arXiv 2505.04560), equation 5, and the other divergences of `abkd_fast.losses.divergences`.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | pathlib.Path | None = None,
        args: TrainingArguments | None = None,
        *,
        teacher: PreTrainedModel | nn.Module | str | pathlib.Path | None = None,
        hidden_states: str | pathlib.Path | None = None,
        divergence: Divergence | str = "ab:0.2,0.7",
        temperature: float = 1.0,
        hard_weight: float = 0.0,
        train_dataset: datasets.Dataset | datasets.IterableDataset | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            model: the student, also a PEFT model. A folder or a name on the Hub is loaded in the type of its weights.
            teacher: a model that runs in every step, likewise. It is frozen, and stays so.
            hidden_states: a folder of `python -m abkd_fast.cache` with a teacher's states for train_dataset. They take
                the place of the teacher there; it is then given for evaluation on other rows, or not at all.
            divergence: a value such as `AlphaBeta(0.2, 0.7)`, or its spelling in a recipe.
            temperature, hard_weight: as in `divergence_loss`.
            train_dataset: rows with input_ids and labels (-100 where nothing is trained; without labels all are).
            options: other arguments of `transformers.Trainer`.

        Raises ConfigError, a ValueError, for arguments that can't be used, models that don't fit together, and rows
        that the states lack.
        """
        if teacher is None and hidden_states is None:
            raise ConfigError("give teacher, a model, or hidden_states, the folder of its cache, or both")
        if teacher is None and options.get("eval_dataset") is not None:
            raise ConfigError(f"eval_dataset: {KEY} has the states of train_dataset alone; give teacher, too")
        args = TrainingArguments("output") if args is None else args
        check_settings(args)
        check_options(options)
        for name, rows in (("train_dataset", train_dataset), ("eval_dataset", options.get("eval_dataset"))):
            check_rows(name, rows)
        self.loss_options = loss_options(divergence, temperature, hard_weight)
        self.folder = None if hidden_states is None else StatesFolder(str(hidden_states), KEY)
        if self.folder:
            places, train_dataset = find_states(self.folder, train_dataset)
        model, teacher = load_model("model", model), None if teacher is None else load_model("teacher", teacher)
        check_models(model, teacher, train_dataset is not None)
        options["data_collator"] = collate_rows
        super().__init__(model, args, train_dataset=train_dataset, **options)
        # Packed rows can't be cut, so each process reads a stream itself.
        self.accelerator.dataloader_config.dispatch_batches = False
        self._signature_columns = ["input_ids", "labels", "attention_mask", COLUMN]
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True  # the sum over labels, divided once
        self.student = form_of(self.model, "model", args.device)
        if router_weight := loss_weight(self.student.causal_lm, None, "model"):
            self.student.experts = Experts(self.student.causal_lm, router_weight)
        self.states = self.teacher = None
        if self.folder:
            self.states = cached_teacher(self.folder, places, self.student.head.weight.dtype, args.device)
        if teacher is not None:
            self.teacher = Teacher(form_of(teacher.to(args.device), "teacher", args.device))
        if args.gradient_checkpointing and not getattr(self.student, "passes_options", True):
            problem = f"layers of a {self.student.causal_lm.config.model_type} model don't know packed rows when they"
            raise ConfigError(f"gradient_checkpointing: {problem} are computed again; use abkd_fast.distill")
        for theirs in filter(None, (self.states, self.teacher and self.teacher.model.head)):
            shared_vocabulary(len(self.student.head.weight), len(theirs.weight))

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Trains. Afterwards both models have their own attention again; the teacher stays frozen, as in `eval()`."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            # `evaluate` leaves this mark, with which accelerate would not wrap the model in DDP.
            vars(self.model).pop("_is_accelerate_prepared", None)
        with self._packed():
            return super().train(*arguments, **options)

    def evaluation_loop(self, *arguments: Any, metric_key_prefix: str = "eval", **options: Any) -> EvalLoopOutput:
        """The metric `loss` is the mean over all labels."""
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with self._packed():
            output = super().evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix, **options)
        total, count = self.sums.tolist()
        if count:
            output.metrics[f"{metric_key_prefix}_loss"] = total / count
        return output

    def _packed(self) -> contextlib.AbstractContextManager:
        return packed_attention([self.student, *([self.teacher.model] if self.teacher else [])])

    def _remove_unused_columns(self, dataset: datasets.Dataset, description: str | None = None) -> datasets.Dataset:
        check_rows(f"the {description} set", dataset)
        return super()._remove_unused_columns(dataset, description)

    def get_batch_samples(self, *arguments: Any) -> tuple[list[dict], Tensor | int | None]:
        """Also notes the share of each batch in the step's tokens, which the loss of routers is weighted by."""
        batches, count = super().get_batch_samples(*arguments)
        if self.student.experts:
            tokens = torch.tensor([inputs["batch"].tokens for inputs in batches], device=self.args.device)
            is_mean_of_all = self.args.average_tokens_across_devices
            total = (self.accelerator.gather(tokens.sum()) if is_mean_of_all else tokens).sum()
            for inputs, share in zip(batches, (tokens / total).tolist(), strict=True):
                inputs["batch"] = dataclasses.replace(inputs["batch"], token_share=share)
        return batches, count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict]:
        """The divergence, summed over the batch's labels and divided by num_items_in_batch (None: their number).

        In training, and where the configuration asks for it, also the auxiliary loss of routers.
        """
        batch = inputs["batch"].to(self.args.device)
        count = len(batch.labels) if num_items_in_batch is None else num_items_in_batch
        loss = self._losses(model, batch, "sum") / count
        experts = self.student.experts
        if experts and (router_loss := experts.take_loss()) is not None:
            loss = loss + experts.loss_weight * router_loss * (batch.token_share / batch.tokens)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over the processes
        return (loss, {}) if return_outputs else loss

    def _losses(self, model: nn.Module, batch: Batch, reduction: str) -> Tensor:
        """The sum of the losses of the batch's labels, or each of them [N]."""
        have_states = self.states and all("index" in sample for sample in batch.samples)
        teacher = self.states if have_states else self.teacher
        if teacher is None:
            raise ConfigError(f"{KEY} has the states of train_dataset alone: other rows need teacher, a model, too")
        if self.student.form == "packed" and self.student.causal_lm.config._attn_implementation != NAME:
            raise RuntimeError("compute_loss works within train, evaluate and predict alone")
        states, losses = teacher.linear_head(batch), []
        input_ids, places, device = batch.input_ids, batch.positions, self.args.device
        if self.student.form == "padded":
            input_ids, places = (tensor.to(device) for tensor in pad(batch.samples))

        def loss_of(hidden: Tensor) -> Tensor:
            own = self.student.linear_head(hidden.flatten(0, 1).index_select(0, places))
            heads = own.arguments("student") | states.arguments("teacher")
            options = {"labels": batch.labels, "reduction": reduction, **self.loss_options}
            losses.append(fused_linear_divergence(**heads, **options))
            return losses[0].sum()

        with entered(self.student, model, loss_of) as outputs:
            if self.student.form == "packed":
                self.student.run_body(input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
            else:
                self.student.run(token_mask(batch.samples).to(device), input_ids=input_ids)
        (loss,) = losses
        return loss + 0.0 * outputs[0].sum()  # hooks on the outputs of a wrapped model run in backward, too

    def prediction_step(self, model: nn.Module, inputs: dict, *_: Any, **__: Any) -> tuple[None, None, None]:
        """Adds the losses and the number of labels of the batch's rows to the sums. There are no logits."""
        counts = [*map(count_labels, inputs["batch"].samples)]
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = self._losses(model, inputs["batch"].to(self.args.device), "none")
        sums = torch.stack([row.double().sum() for row in losses.split(counts)])
        rows = torch.stack([sums, torch.tensor(counts).to(sums)], dim=1)
        # All processes have equally many rows. Those that fill up the last batch don't count.
        self.sums = self.sums + self.accelerator.gather_for_metrics(rows).sum(0)
        return None, None, None
