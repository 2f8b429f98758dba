"""Scores of responses: ROUGE-L and exact match, as the papers compute them.

ROUGE-L has the same bits as that of the `rouge_score` package with its stemmer, whose words and F1 it uses. Two things
are faster here: every stem is computed once, and the longest common subsequence takes a whole row of the table at a
time, as the bits of one number. A response is scored in less than a millisecond, so no other process is needed.
"""

from __future__ import annotations

import collections
import functools
import string
from collections.abc import Iterable, Sequence

from nltk.stem.porter import PorterStemmer  # what rouge_score takes
from rouge_score import scoring, tokenize
from transformers import PreTrainedTokenizerBase


class _Stemmer:
    """The stemmer that rouge_score's tokenizer asks for; remembers stems."""

    stem = staticmethod(functools.lru_cache(maxsize=1 << 16)(PorterStemmer().stem))


def rouge_l(response: str, references: Sequence[str]) -> float:
    """100 times the F1 of ROUGE-L, the best over one or more references."""
    words = tokenize.tokenize(response, _Stemmer)
    return 100 * max(_f1(tokenize.tokenize(reference, _Stemmer), words) for reference in references)


def _f1(reference: list[str], response: list[str]) -> float:
    if not reference or not response:
        return 0.0
    common = _common_length(reference, response)
    return scoring.fmeasure(common / len(response), common / len(reference))


def _common_length(first: list[str], second: list[str]) -> int:
    """The length of the longest common subsequence (Hyyrö 2004).

    A row of the usual table grows by 0 or 1 from one column to the next. Bit i of `row` is 0 if it grows at word i.
    """
    places = collections.defaultdict(int)  # word -> the bits of its places in `first`
    for index, word in enumerate(first):
        places[word] |= 1 << index
    full = row = (1 << len(first)) - 1
    for word in second:
        matches = row & places[word]
        row = (row + matches | row - matches) & full
    return len(first) - row.bit_count()


def exact_match(response: str, references: Sequence[str]) -> bool:
    """Whether the response is one of the references, apart from case, punctuation and white space."""
    return _bare(response) in map(_bare, references)


def _bare(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score_response(tokenizer: PreTrainedTokenizerBase, response: list[int], outputs: list[str]) -> dict:
    """The text of a response, given in tokens, and its scores."""
    text = tokenizer.decode(response, skip_special_tokens=True).strip()
    return {"response": text, "rouge_l": rouge_l(text, outputs), "exact_match": exact_match(text, outputs)}


def response_seeds(questions: Iterable[tuple[int, int]]) -> list[int]:
    """Sampling seeds for pairs (seed, row). A response depends on these two and its prompt, on nothing else."""
    return [(seed << 32) + row for seed, row in questions]
