"""Training sequences that a model writes: samples whose responses are generated, for on-policy methods."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from .. import distributed
from ..config.schema import Config
from ..data.batches import step_samples
from ..generation.sampling import SamplingParams, sample, sample_mixture
from ..losses.arguments import shared_vocabulary
from ..models.packed import PackedCausalLM


class Rollouts:
    """Writes responses to the prompts of samples. Deterministic: seeds are a function of run.seed, step and place.

    What it gives are samples again, the end token included where one came, and "row", that of the prompt.
    """

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
        self.settings = SamplingParams.from_options(
            config.sampling,
            max_length=config.data.max_length,
            eos_token_ids=(tokenizer.eos_token_id,),
            # Vocabularies are padded to different sizes, and both models read what is written.
            vocabulary=shared_vocabulary(*(len(model.head.weight) for model in (student, teacher))),
        )
        self.counts = _nothing()

    def prompts(self, count: int, turn: int) -> list[dict]:
        """Samples of the data, `count` at a time; turn 0 gives the first, epoch after epoch."""
        return step_samples(self.train_set, count, self.config.run.seed, turn)

    def write(self, samples: list[dict], step: int) -> list[dict]:
        """The samples with responses by the student."""
        arguments, started = self._arguments(samples, step), self._now()
        with self.precision(), distributed.unsharded(self.student):
            responses = distributed.gather_shards(sample(self.student, *arguments))
        return self._with_responses(samples, responses, started)

    def write_mixed(self, samples: list[dict], step: int, teacher_weight: float) -> list[dict]:
        """As `write`, by the mixture of student and teacher (MiniLLM).

        "student_log_probs" and "teacher_log_probs" are lists of each model's own, of the tokens of the response.
        """
        arguments, started = self._arguments(samples, step), self._now()
        with self.precision(), distributed.unsharded(self.student, self.teacher):
            written = distributed.gather_shards(sample_mixture(self.student, self.teacher, teacher_weight, *arguments))
        responses, *log_probs = zip(*written, strict=True)
        rollouts = self._with_responses(samples, responses, started)
        return [
            rollout | {"student_log_probs": student, "teacher_log_probs": teacher}
            for rollout, student, teacher in zip(rollouts, *log_probs, strict=True)
        ]

    def metrics(self, steps: int) -> dict[str, float]:
        """For the log: what was generated since the last call, and the share of the `steps` since then that did it."""
        counts, self.counts = self.counts, _nothing()
        numbers = {"generating_share": counts["calls"] / steps}
        if counts["sequences"]:
            numbers["generated_tokens_per_second"] = counts["tokens"] / counts["seconds"]
            numbers["generated_length"] = counts["tokens"] / counts["sequences"]
        return numbers

    def _arguments(self, samples: list[dict], step: int) -> tuple[list[list[int]], SamplingParams, list[int], int]:
        """Of sampling this rank's share of the responses."""
        prompts = [_prompt(sample) for sample in samples]
        first = (self.config.run.seed << 40) + (step << 20)
        seeds = [first + place for place in range(len(samples))]
        return (
            distributed.local_shard(prompts),
            self.settings,
            distributed.local_shard(seeds),
            self.config.sampling.batch_size,
        )

    def _now(self) -> float:
        """The time, once the device has done what it was given before: none of that is generation."""
        if self.student.head.weight.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _with_responses(self, samples: list[dict], responses: Sequence[list[int]], started: float) -> list[dict]:
        self.counts["calls"] += 1
        self.counts["sequences"] += len(responses)
        self.counts["tokens"] += sum(map(len, responses))
        self.counts["seconds"] += time.perf_counter() - started
        return [
            {"input_ids": _prompt(sample) + response, "prompt_length": sample["prompt_length"], "row": sample["row"]}
            for sample, response in zip(samples, responses, strict=True)
        ]


def _prompt(sample: dict) -> list[int]:
    return sample["input_ids"][: sample["prompt_length"]]


def _nothing() -> dict[str, float]:
    return {"calls": 0, "sequences": 0, "tokens": 0, "seconds": 0.0}
