"""Measurements on the development rows during training: the loss, and ROUGE-L of sampled answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from .. import distributed
from ..config.schema import Config
from ..data.batches import make_step_batch
from ..data.rows import Row
from ..methods.base import cross_entropy
from ..models.packed import PackedCausalLM
from ..signals import StopSignals

if TYPE_CHECKING:
    from .dev_rouge import DevRouge


class DevEvaluator:
    """The development rows, and what is measured on them."""

    def __init__(
        self, config: Config, rows: list[Row], dev_set: datasets.Dataset, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Takes the checked rows, and the same rows tokenized."""
        self.dev_set, self.every_steps, self.max_tokens = dev_set, config.eval.every_steps, config.train.max_tokens
        self.rouge: DevRouge | None = None
        if config.eval.rouge_rows is not None:
            from .dev_rouge import DevRouge  # its import takes half a second, and most runs don't need it

            self.rouge = DevRouge(config, rows, dev_set, tokenizer)

    def is_due(self, step: int, steps: int, steps_per_epoch: int) -> bool:
        """Before the first step, after the last, and every eval.every_steps (by default once an epoch)."""
        return step in (0, steps) or step % (self.every_steps or steps_per_epoch) == 0

    @torch.no_grad()
    def loss(self, student: PackedCausalLM, device: torch.device, signals: StopSignals) -> float | None:
        """The cross-entropy of the responses, mean over their tokens; None after a signal. Collective."""
        student.eval()
        total = torch.zeros((), device=device, dtype=torch.float64)
        batch = make_step_batch(list(self.dev_set), [], self.max_tokens)
        for part in batch.micro_batches:
            total += student(part.to(device), lambda head, part=part: cross_entropy(head, part))
            if signals.received:
                break
        student.train()
        return None if signals.of_any_rank() else distributed.all_reduce_sum(total).item() / batch.num_labels
