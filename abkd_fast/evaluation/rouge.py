"""Scores of responses: ROUGE-L and exact match, as the papers compute them.

ROUGE-L has the same bits as that of the `rouge_score` package with its stemmer, whose words and F1 it uses. Two things
are faster here: every stem is computed once, and the longest common subsequence takes a whole row of the table at a
time, as the bits of one number. A response is scored in less than a millisecond, so no other process is needed.
"""

import collections
import functools
import re
import string
import unicodedata
from collections.abc import Iterable, Sequence

from nltk.stem.porter import PorterStemmer  # what rouge_score takes
from rouge_score import scoring, tokenize
from transformers import PreTrainedTokenizerBase


class _Stemmer:
    """The stemmer that rouge_score's tokenizer asks for; remembers stems."""

    stem = staticmethod(functools.lru_cache(maxsize=1 << 16)(PorterStemmer().stem))


def rouge_l(response: str, references: Sequence[str], unit: str = "words") -> float:
    """100 times the F1 of ROUGE-L, the best over one or more references.

    unit: "words", those of rouge_score; or "characters": letters of any script, with their marks, and all other
    characters but white space, in lower case.
    """
    split = _characters if unit == "characters" else _words
    units = split(response)
    return 100 * max(_f1(split(reference), units) for reference in references)


def _words(text: str) -> list[str]:
    return tokenize.tokenize(text, _Stemmer)


def _characters(text: str) -> list[str]:
    units = []
    for character in unicodedata.normalize("NFC", text.lower()):
        if units and unicodedata.category(character).startswith("M"):  # a mark belongs to its letter
            units[-1] += character
        elif not character.isspace():
            units.append(character)
    return units


def named(name: str, unit: str) -> str:
    """A name in tables. Scores of different units are never in one column."""
    return name if unit == "words" else f"{name} ({unit})"


def unsuited(references: Iterable[Sequence[str]], unit: str) -> str | None:
    """A note where words leave out most of the references, and their scores mean little; None where they don't."""
    text = "".join("".join(outputs) for outputs in references).lower()
    known, every = len(re.findall("[a-z0-9]", text)), len(re.findall(r"\S", text))
    if unit != "words" or 2 * known >= every:
        return None
    share = f"only {known / every:.0%} of the references' characters are a-z or 0-9"
    return f"{share}, of which ROUGE-L's words are made: scores mean little; for other scripts there is"


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
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def score_response(
    tokenizer: PreTrainedTokenizerBase, response: list[int], outputs: list[str], unit: str = "words"
) -> dict:
    """The text of a response, given in tokens, and its scores."""
    known = [token for token in response if token < len(tokenizer)]  # a model may have more, which say nothing
    text = tokenizer.decode(known, skip_special_tokens=True).strip()
    return {"response": text, "rouge_l": rouge_l(text, outputs, unit), "exact_match": exact_match(text, outputs)}
