"""The development rows during training: the loss, sampled answers, and their ROUGE-L."""

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
        self.answers = DevAnswers(config, rows, dev_set, tokenizer)
        self.notes: list[str] = []  # for people
        scored = self.answers.references[: self.answers.rouge_rows]
        if scored and (note := rouge.unsuited(scored, self.answers.unit)):
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


class DevAnswers:
    """Answers to the first development rows, sampled with the run's seed: for ROUGE-L, and as samples for the log.

    No n-gram is banned. Only rows with a text to compare with count, and prompts that leave room for an answer.
    """

    def __init__(
        self, config: Config, rows: list[Row], dev_set: datasets.Dataset, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Takes the checked rows, and the same rows tokenized. Raises ConfigError where no row can be answered."""
        self.rouge_rows, self.samples = config.eval.rouge_rows or 0, config.log.samples or 0
        self.rows, self.prompts, self.references = [], [], []
        if not (wanted := max(self.rouge_rows, self.samples)):
            return
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
            key = "eval.rouge_rows" if self.rouge_rows else "log.samples"
            raise ConfigError(f"{key}: no prompt of data.dev leaves room for an answer; raise data.max_length")
        self.rows, self.prompts = zip(*pairs[:wanted], strict=True)
        self.references = [references(row, tokenizer) for row in self.rows]
        self.seeds = response_seeds((config.run.seed, row) for row in range(len(self.prompts)))
        self.tokenizer, self.unit = tokenizer, config.eval.rouge_tokens
        ends = tokenizers.end_tokens(config.student.path, tokenizer, style)
        self.settings = SamplingParams(max_new_tokens=config.eval.max_new_tokens, eos_token_ids=ends)

    def measure(self, student: CausalLM, signals: StopSignals) -> tuple[float | None, list[dict]] | None:
        """ROUGE-L, mean over its rows, and the samples: row, prompt, output (references), response and its scores.

        None after a signal. Without rows for ROUGE-L there is None in its place. Collective.
        """
        answers = []
        # Rows that only the log wants have a pass of their own: no score depends on log.samples.
        for rows in (slice(0, self.rouge_rows), slice(self.rouge_rows, None)):
            if self.prompts[rows]:
                answers += self._answer(student, rows, signals)
                if signals.of_any_rank():
                    return None
        scores = [answer["rouge_l"] for answer in answers[: self.rouge_rows]]
        samples = zip(self.rows, self.prompts, self.references, answers[: self.samples], strict=False)
        return statistics.fmean(scores) if scores else None, [
            {"row": row.where, "prompt": self.tokenizer.decode(prompt), "output": outputs, **answer}
            for row, prompt, outputs, answer in samples
        ]

    def _answer(self, student: CausalLM, rows: slice, signals: StopSignals) -> list[dict]:
        """What `score_response` says of the answers to these rows. Ranks share the rows. After a signal some lack."""
        prompts, outputs, seeds = (
            distributed.local_shard(each[rows]) for each in (self.prompts, self.references, self.seeds)
        )
        answers = [{}] * len(prompts)

        def on_response(row: int, response: list[int]) -> None:
            answers[row] = score_response(self.tokenizer, response, outputs[row], self.unit)
            if signals.received:
                raise Interrupted(signals.received)

        with contextlib.suppress(Interrupted):
            sample(student, prompts, self.settings, seeds, 64, on_response)
        return distributed.gather_shards(answers)
