"""ROUGE-L of sampled answers on development rows. A file of its own, for its imports take half a second."""

from __future__ import annotations

import contextlib
import statistics

import datasets
from transformers import PreTrainedTokenizerBase

from .. import distributed
from ..config.schema import Config
from ..data.rows import Row
from ..data.tokenize import references
from ..errors import Interrupted
from ..evaluation.rouge import score_response
from ..generation.sampling import SamplingParams, response_seeds, sample
from ..models.packed import PackedCausalLM
from ..signals import StopSignals


class DevRouge:
    """ROUGE-L on the first development rows, in one sampled pass with the run's seed. No n-gram is banned."""

    def __init__(
        self, config: Config, rows: list[Row], dev_set: datasets.Dataset, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Takes the checked rows, and the same rows tokenized."""
        count = min(config.eval.rouge_rows, len(dev_set))
        samples = dev_set[:count]
        pairs = zip(samples["input_ids"], samples["prompt_length"], strict=True)
        self.prompts = [ids[:length] for ids, length in pairs]
        self.references = references([rows[number] for number in samples["row"]], tokenizer)
        self.seeds = response_seeds((config.run.seed, row) for row in range(count))
        self.tokenizer = tokenizer
        self.settings = SamplingParams(
            max_new_tokens=config.eval.max_new_tokens, eos_token_ids=(tokenizer.eos_token_id,)
        )

    def measure(self, student: PackedCausalLM, signals: StopSignals) -> float | None:
        """The mean over the rows; None after a signal. Ranks share the rows. Collective."""
        prompts, outputs, seeds = map(distributed.local_shard, (self.prompts, self.references, self.seeds))
        scores = [0.0] * len(prompts)

        def on_response(row: int, response: list[int]) -> None:
            scores[row] = score_response(self.tokenizer, response, outputs[row])["rouge_l"]
            if signals.received:
                raise Interrupted(signals.received)

        with contextlib.suppress(Interrupted):
            sample(student, prompts, self.settings, seeds, 64, on_response)
        return None if signals.of_any_rank() else statistics.fmean(distributed.gather_shards(scores))
