"""Rollouts: samples whose responses a model writes during training, for on-policy methods."""

import collections
import contextlib
import time
from collections.abc import Callable, Sequence

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from .. import distributed
from ..config.schema import Config
from ..data.batches import prompt_of, step_samples, teacher_view
from ..data.chat import PromptFormat
from ..generation.sampling import SamplingParams, sample, sample_mixture
from ..losses.arguments import shared_vocabulary
from ..models import tokenizers
from ..models.causal_lm import CausalLM


class Rollouts:
    """Writes responses to the prompts of samples.

    It is deterministic: a seed is a function of run.seed, the step and the prompt's place in it. It returns samples
    again. Their responses include the end token where one came; their "row" is that of the prompt.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        train_set: datasets.Dataset,
        student: CausalLM,
        teacher: CausalLM | None,
        precision: Callable[[], contextlib.AbstractContextManager],
        vocabulary: int | None = None,
    ) -> None:
        """teacher: None where only the student writes, and `vocabulary` is given.

        precision: makes the context that the models run in.

        vocabulary: how many tokens the models share, where that is fewer than both have.
        """
        self.config, self.train_set = config, train_set
        ends = tokenizers.end_tokens(config.student.path, tokenizer, PromptFormat.from_config(config.data))
        self.student, self.teacher, self.precision = student, teacher, precision
        self.settings = SamplingParams.from_options(
            config.sampling,
            max_length=config.data.max_length,
            eos_token_ids=ends,
            # Vocabularies may be padded to different sizes, and both models read what is written.
            vocabulary=vocabulary or shared_vocabulary(*(len(model.head.weight) for model in (student, teacher))),
        )
        self.counts = collections.Counter()  # since the last call of `metrics`

    def prompts(self, count: int, turn: int) -> list[dict]:
        """The samples of the data whose prompts a round answers: `count` at a time, epoch after epoch, from turn 0."""
        return step_samples(self.train_set, count, self.config.run.seed, turn)

    def write(self, samples: list[dict], step: int) -> list[dict]:
        """The samples with responses of the student in place of their own."""
        arguments, started = self._arguments(samples, step), self._now()
        with self.precision(), distributed.unsharded(self.student):
            responses = distributed.gather_shards(sample(self.student, *arguments))
        return self._with_responses(samples, responses, started)

    def write_mixed(self, samples: list[dict], step: int, teacher_weight: float) -> list[dict]:
        """The same with responses of the mixture of student and teacher (MiniLLM).

        "student_log_probs" and "teacher_log_probs" are lists of each model's own log-probabilities of the response.
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
        """Values for the log since the last call: what was generated, and the share of the `steps` that generated."""
        counts, self.counts = self.counts, collections.Counter()
        numbers = {"generating_share": counts["calls"] / steps}
        if counts["sequences"]:
            numbers["generated_tokens_per_second"] = counts["tokens"] / counts["seconds"]
            numbers["generated_length"] = counts["tokens"] / counts["sequences"]
        return numbers

    def _arguments(self, samples: list[dict], step: int) -> tuple[list[list[int]], SamplingParams, list[int], int]:
        """The arguments of sampling for this rank's share of the responses."""
        prompts = [prompt_of(sample) for sample in samples]
        first = (self.config.run.seed << 40) + (step << 20)
        seeds = [first + place for place in range(len(samples))]
        prompts, seeds = map(distributed.local_shard, (prompts, seeds))
        return prompts, self.settings, seeds, self.config.sampling.batch_size

    def _now(self) -> float:
        """The time, once the device has done the work queued before, which is not generation."""
        if self.student.head.weight.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _with_responses(self, samples: list[dict], responses: Sequence[list[int]], started: float) -> list[dict]:
        tokens, seconds = sum(map(len, responses)), time.perf_counter() - started
        self.counts.update(calls=1, sequences=len(responses), tokens=tokens, seconds=seconds)
        return [answered(sample, response) for sample, response in zip(samples, responses, strict=True)]


def answered(sample: dict, response: list[int]) -> dict:
    """The sample with this response in place of its last one, which alone is trained: the data wrote the others.

    The teacher reads it after its own prompt.
    """
    result = _with_response(sample, response) | {"row": sample["row"]}
    if (view := teacher_view(sample)) is not sample:
        result |= {f"teacher_{name}": values for name, values in _with_response(view, response).items()}
    return result


def _with_response(sample: dict, response: list[int]) -> dict:
    prompt = prompt_of(sample)
    ids = prompt + response
    return {"input_ids": ids, "spans": [len(prompt), len(ids)]}
