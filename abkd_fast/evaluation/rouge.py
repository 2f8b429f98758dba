"""Scores of responses: ROUGE-L and exact match, as the papers compute them.

ROUGE-L is that of the `rouge_score` package with its stemmer, bit for bit. The words are its own, with each stem
remembered; the longest common subsequence comes from operations on whole rows of the table at once, as bits of one
number. A response costs less than a millisecond, so it is scored where it ends, and no other processes are needed.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Iterable, Sequence

from nltk.stem.porter import PorterStemmer  # what rouge_score takes
from rouge_score import scoring, tokenize
from transformers import PreTrainedTokenizerBase


class _Stemmer:
    """What rouge_score's tokenizer asks for stems, each computed once."""

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


def score_response(tokenizer: PreTrainedTokenizerBase, response: list[int], outputs: list[str]) -> dict:
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
