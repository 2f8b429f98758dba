"""Training sequences that a model writes: samples whose responses are generated, for on-policy methods."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

import datasets
from transformers import PreTrainedTokenizerBase

from .config import Config
from .data import step_samples
from .models import PackedCausalLM
from .sampling import SamplingSettings, sample, sample_mixture


class Rollouts:
    """Writes responses to the prompts of samples. Deterministic: seeds are a function of run.seed, step and place."""

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        train_set: datasets.Dataset,
        student: PackedCausalLM,
        teacher: PackedCausalLM,
        precision: Callable[[], contextlib.AbstractContextManager],
    ) -> None:
        """`precision`: the context that the models run in."""
        self.config, self.train_set = config, train_set
        self.student, self.teacher, self.precision = student, teacher, precision
        sampling = config.sampling
        self.settings = SamplingSettings(
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            eos_token_ids=(tokenizer.eos_token_id,),
        )
        self.sequences = self.tokens = 0
        self.seconds = 0.0

    def prompts(self, count: int, turn: int) -> list[dict]:
        """Samples of the data, `count` at a time; turn 0 gives the first, epoch after epoch."""
        return step_samples(self.train_set, count, self.config.run.seed, turn)

    def write(self, samples: list[dict], step: int) -> list[dict]:
        """The samples with responses by the student, cut to data.max_length; the end token included where one came."""
        arguments, started = self._arguments(samples, step), time.perf_counter()
        with self.precision():
            responses = sample(self.student, *arguments)
        return self._samples(arguments[0], responses, started)

    def write_mixed(self, samples: list[dict], step: int, teacher_weight: float) -> list[dict]:
        """As `write`, by the mixture of student and teacher (MiniLLM).

        "student_log_probs" and "teacher_log_probs" are lists of each model's own, of the tokens of the response.
        """
        arguments, started = self._arguments(samples, step), time.perf_counter()
        with self.precision():
            written = sample_mixture(self.student, self.teacher, teacher_weight, *arguments)
        responses, *log_probs = zip(*written, strict=True)
        rollouts = self._samples(arguments[0], responses, started)
        for rollout, student, teacher in zip(rollouts, *log_probs, strict=True):
            length = len(rollout["input_ids"]) - rollout["prompt_length"]
            rollout |= {"student_log_probs": student[:length], "teacher_log_probs": teacher[:length]}
        return rollouts

    def numbers(self) -> dict[str, float]:
        """For the log: what has been generated since the last call."""
        if not self.sequences:
            return {}
        numbers = {
            "generated_tokens_per_second": self.tokens / self.seconds,
            "generated_length": self.tokens / self.sequences,
        }
        self.sequences, self.tokens, self.seconds = 0, 0, 0.0
        return numbers

    def _arguments(self, samples: list[dict], step: int) -> tuple[list[list[int]], SamplingSettings, list[int], int]:
        prompts = [sample["input_ids"][: sample["prompt_length"]] for sample in samples]
        first = (self.config.run.seed << 40) + (step << 20)
        seeds = [first + place for place in range(len(samples))]
        return prompts, self.settings, seeds, self.config.sampling.batch_size

    def _samples(self, prompts: list[list[int]], responses: Sequence[list[int]], started: float) -> list[dict]:
        self.seconds += time.perf_counter() - started
        self.sequences += len(responses)
        self.tokens += sum(map(len, responses))
        longest = self.config.data.max_length
        return [
            {"input_ids": (prompt + response)[:longest], "prompt_length": len(prompt)}
            for prompt, response in zip(prompts, responses, strict=True)
        ]
