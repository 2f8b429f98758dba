"""Measurements on the development rows during training: the loss, and ROUGE-L of sampled answers."""

import contextlib
import statistics

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from .. import distributed
from ..config.schema import Config
from ..data.batches import make_step_batch
from ..data.chat import PromptFormat
from ..data.rows import Row
from ..data.tokenize import encode_prompts, references
from ..errors import ConfigError, Interrupted
from ..evaluation import rouge
from ..evaluation.rouge import score_response
from ..generation.sampling import SamplingParams, response_seeds, sample
from ..methods.base import cross_entropy
from ..models import tokenizers
from ..models.causal_lm import CausalLM
from ..signals import StopSignals


class DevEvaluator:
    """The development rows, and what is measured on them."""

    def __init__(
        self, config: Config, rows: list[Row], dev_set: datasets.Dataset, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Takes the checked rows, and the same rows tokenized."""
        self.dev_set, self.every_steps, self.max_tokens = dev_set, config.eval.every_steps, config.train.max_tokens
        self.rouge = DevRouge(config, rows, dev_set, tokenizer) if config.eval.rouge_rows else None
        self.notes: list[str] = []  # for people
        if self.rouge and (note := rouge.unsuited(self.rouge.references, self.rouge.unit)):
            self.notes.append(f"data.dev: {note} eval.rouge_tokens=characters")

    def is_due(self, step: int, steps: int, steps_per_epoch: int) -> bool:
        """Before the first step, after the last, and every eval.every_steps (by default once an epoch)."""
        return step in (0, steps) or step % (self.every_steps or steps_per_epoch) == 0

    @torch.no_grad()
    def loss(self, student: CausalLM, device: torch.device, signals: StopSignals) -> float | None:
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


class DevRouge:
    """ROUGE-L on the first development rows, in one sampled pass with the run's seed. No n-gram is banned."""

    def __init__(
        self, config: Config, rows: list[Row], dev_set: datasets.Dataset, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Takes the checked rows, and the same rows tokenized."""
        # One answer a row, the last: a row of messages may have several samples, and its last turn may be cut away.
        known = [rows[index] for index in dict.fromkeys(dev_set["row"])]
        style = PromptFormat.from_config(config.data)
        prompts = encode_prompts(known, tokenizer, style)
        pairs = [
            (row, prompt)
            for row, prompt in zip(known, prompts, strict=True)
            if len(prompt) < config.data.max_length and any(references(row, tokenizer))  # a call of a tool has no text
        ]
        if not pairs:
            raise ConfigError("eval.rouge_rows: no prompt of data.dev leaves room for an answer; raise data.max_length")
        answered, self.prompts = zip(*pairs[: config.eval.rouge_rows], strict=True)
        self.references = [references(row, tokenizer) for row in answered]
        self.seeds = response_seeds((config.run.seed, row) for row in range(len(self.prompts)))
        self.tokenizer, self.unit = tokenizer, config.eval.rouge_tokens
        ends = tokenizers.end_tokens(config.student.path, tokenizer, style)
        self.settings = SamplingParams(max_new_tokens=config.eval.max_new_tokens, eos_token_ids=ends)

    def measure(self, student: CausalLM, signals: StopSignals) -> float | None:
        """The mean over the rows; None after a signal. Ranks share the rows. Collective."""
        prompts, outputs, seeds = map(distributed.local_shard, (self.prompts, self.references, self.seeds))
        scores = [0.0] * len(prompts)

        def on_response(row: int, response: list[int]) -> None:
            scores[row] = score_response(self.tokenizer, response, outputs[row], self.unit)["rouge_l"]
            if signals.received:
                raise Interrupted(signals.received)

        with contextlib.suppress(Interrupted):
            sample(student, prompts, self.settings, seeds, 64, on_response)
        return None if signals.of_any_rank() else statistics.fmean(distributed.gather_shards(scores))
