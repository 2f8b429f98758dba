"""Scores of responses: ROUGE-L and exact match, as the papers compute them.

ROUGE-L is that of the `rouge_score` package with its stemmer, bit for bit. The words are its own, with each stem
remembered; the longest common subsequence comes from operations on whole rows of the table at once, as bits of one
number. A response costs less than a millisecond, so it is scored where it ends, and no other processes are needed.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import string
from collections.abc import Iterable, Sequence

import datasets
from nltk.stem.porter import PorterStemmer  # what rouge_score takes
from rouge_score import scoring, tokenize
from transformers import PreTrainedTokenizerBase

from .. import distributed
from ..config.schema import Config
from ..data.rows import Row, references
from ..generation.sampling import SamplingSettings, sample
from ..models.loading import PackedCausalLM
from ..training.checkpoint import Interrupted, StopSignals


class _Stemmer:
    """What rouge_score's tokeniser asks for stems, each computed once."""

    stem = staticmethod(functools.lru_cache(maxsize=1 << 16)(PorterStemmer().stem))


def rouge_l(response: str, references: Sequence[str]) -> float:
    """The F1 of ROUGE-L x 100, that of the best of at least one reference."""
    words = tokenize.tokenize(response, _Stemmer)
    return 100 * max(_f1(tokenize.tokenize(reference, _Stemmer), words) for reference in references)


def _f1(reference: list[str], response: list[str]) -> float:
    if not reference or not response:
        return 0.0
    common = _common_length(reference, response)
    return scoring.fmeasure(common / len(response), common / len(reference))


def _common_length(first: list[str], second: list[str]) -> int:
    """The length of the longest common subsequence (Hyyrö 2004).

    A row of the usual table grows by 0 or 1 from one column to the next: bit i is 0 where it grows at word i.
    """
    places: dict[str, int] = {}
    for index, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << index
    full = row = (1 << len(first)) - 1
    for word in second:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & full
    return len(first) - row.bit_count()


def exact_match(response: str, references: Sequence[str]) -> bool:
    """Whether the response is one of the references, but for case, punctuation and white space."""
    return _bare(response) in map(_bare, references)


def _bare(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def judge(tokenizer: PreTrainedTokenizerBase, response: list[int], outputs: list[str]) -> dict:
    """A response's text and scores."""
    text = tokenizer.decode(response, skip_special_tokens=True).strip()
    return {
        "response": text,
        "rouge_l": rouge_l(text, outputs),
        "exact_match": exact_match(text, outputs),
    }


def response_seeds(questions: Iterable[tuple[int, int]]) -> list[int]:
    """Of (seed, row) pairs: a response depends on the two and its prompt, on nothing else."""
    return [(seed << 32) + row for seed, row in questions]


class DevelopmentRouge:
    """ROUGE-L on the first development rows: one sampled pass with the run's seed, and no n-gram banned."""

    def __init__(
        self, config: Config, rows: list[Row], dev_set: datasets.Dataset, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Takes the checked rows, and those of them that were tokenised."""
        count = min(config.eval.rouge_rows, len(dev_set))
        samples = dev_set[:count]
        pairs = zip(samples["input_ids"], samples["prompt_length"], strict=True)
        self.prompts = [ids[:length] for ids, length in pairs]
        self.references = references([rows[number] for number in samples["row"]], tokenizer)
        self.seeds = response_seeds((config.run.seed, row) for row in range(count))
        self.tokenizer = tokenizer
        self.settings = SamplingSettings(
            max_new_tokens=config.eval.max_new_tokens, eos_token_ids=(tokenizer.eos_token_id,)
        )

    def measure(self, student: PackedCausalLM, signals: StopSignals) -> float | None:
        """The mean over the rows, which ranks share; None where a signal arrives."""
        prompts, outputs, seeds = map(distributed.share, (self.prompts, self.references, self.seeds))
        scores = [0.0] * len(prompts)

        def on_response(row: int, response: list[int]) -> None:
            scores[row] = judge(self.tokenizer, response, outputs[row])["rouge_l"]
            if signals.received:
                raise Interrupted(signals.received)

        with contextlib.suppress(Interrupted):
            sample(student, prompts, self.settings, seeds, 64, on_response)
        return None if signals.of_any_rank() else statistics.fmean(distributed.joined(scores))
