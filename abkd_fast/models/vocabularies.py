"""The tokens that the models of a run share, and the check that nothing uses another one."""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import datasets
import numpy as np
import pyarrow.compute
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError
from ..losses.arguments import shared_vocabulary

SHOWN = 3  # so many tokens are named in a line


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of a tokenizer, and which of them the models don't have in common.

    A token counts only where it is used. A published model may have fewer entries than its tokenizer has tokens
    (Gemma 3 1B), and the tokenizers of a family may differ in special tokens (Qwen 2.5 and Qwen 3).
    """

    tokenizer: PreTrainedTokenizerBase
    sizes: dict[str, int]  # the vocabulary entries of each model, by its role
    teacher_tokenizer: PreTrainedTokenizerBase | None = None  # or what has its get_vocab() and length

    @functools.cached_property
    def _tokens(self) -> tuple[dict[int, str], dict[int, str]]:
        """The tokens of both tokenizers by id."""
        ours = {index: token for token, index in self.tokenizer.get_vocab().items()}
        if self.teacher_tokenizer is None:
            return ours, ours
        return ours, {index: token for token, index in self.teacher_tokenizer.get_vocab().items()}

    @functools.cached_property
    def different(self) -> list[int]:
        """The ids that are another token, or none, in the teacher's tokenizer."""
        ours, theirs = self._tokens
        return sorted(index for index in {*ours, *theirs} if ours.get(index) != theirs.get(index))

    @functools.cached_property
    def lacking(self) -> list[int]:
        """The ids of tokens that a model has no entry for."""
        return sorted(index for index in self._tokens[0] if index >= min(self.sizes.values()))

    @functools.cached_property
    def shared(self) -> int | None:
        """How many tokens the losses compare, where they end before tokens that differ; None: all that both have."""
        ours, theirs = self._tokens
        last = max((index for index, token in ours.items() if theirs.get(index) == token), default=-1)
        at_end = [index for index in self.different if index > last]
        return at_end[0] if at_end and at_end[0] <= min(self.sizes.values()) else None

    def check_sizes(self) -> None:
        """Raises ConfigError for vocabularies of different sizes, where padding can't be the reason."""
        if "teacher" in self.sizes and self.shared is None:
            try:
                shared_vocabulary(*self.sizes.values())
            except ValueError as error:
                raise ConfigError(f"vocabulary: {error}") from None

    @functools.cached_property
    def _is_unusable(self) -> np.ndarray:
        """Whether a token can't be used, for every id of the run's tokenizer; empty if all can."""
        mask = np.zeros(max(len(self.tokenizer), 1 + max(self._tokens[0])), dtype=bool)
        mask[[index for index in self.different if index < len(mask)]] = True
        mask[min(self.sizes.values()) :] = True
        return mask if mask.any() else mask[:0]

    def check(self, ids: Iterable[int], where: str) -> None:
        """Raises ConfigError, which begins with `where`, for an id that the models don't have in common."""
        mask = self._is_unusable
        if (unusable := next((index for index in ids if len(mask) and mask[index]), None)) is not None:
            raise ConfigError(f"{where}: {self._reason(unusable)}")

    def check_samples(self, samples: datasets.Dataset, where: Callable[[int], str], column: str = "input_ids") -> None:
        """The same for tokenized data. where: the place of a sample, by its index. Data are read only if need be."""
        mask, first = self._is_unusable, 0
        table = samples.select_columns([column]).with_format("arrow")[:] if len(mask) else None
        for chunk in table.column(column).chunks if table else ():
            ids = chunk.flatten().to_numpy()
            unusable = mask[ids]
            if unusable.any():
                place = int(unusable.argmax())
                sample = first + pyarrow.compute.list_parent_indices(chunk)[place].as_py()
                raise ConfigError(f"{where(sample)}: {self._reason(int(ids[place]))}")
            first += len(chunk)

    def _reason(self, index: int) -> str:
        ours, theirs = (tokens.get(index) for tokens in self._tokens)
        sizes = ", ".join(f"{role} has {size}" for role, size in self.sizes.items())
        for role, size in self.sizes.items():
            if index >= size:
                return (
                    f"uses id {index} ({ours!r}), which the {role} lacks: the tokenizer has {len(self.tokenizer)} "
                    f"tokens, but the {role} fewer ({sizes}); leave the token out there, or give a {role} that has it"
                )
        return (
            f"uses an id that is another token for the teacher: the tokenizers of student ({len(self.tokenizer)} "
            f"tokens) and teacher ({len(self.teacher_tokenizer)}) differ at id {index} ({ours!r} / {theirs!r}), and "
            "distillation needs one vocabulary; leave it out there, or give the teacher's tokenizer as tokenizer"
        )

    def notes(self) -> Iterable[str]:
        """Lines for people about tokens that the models don't have in common, which nothing uses."""
        ours, theirs = self._tokens
        if self.lacking:
            named = _list(self.lacking, lambda index: repr(ours[index]))
            count = f"{len(self.lacking)} of the tokenizer's {len(self.tokenizer)} tokens"
            yield f"a model lacks {count}, which nothing uses: {named}"
        if self.different:
            named = _list(self.different, lambda index: f"{ours.get(index)!r} / {theirs.get(index)!r}")
            text = f"student and teacher differ at {len(self.different)} ids, which nothing uses: {named}"
            compared = min(self.sizes.values()) if self.shared is None else self.shared
            inside = sum(index < compared for index in self.different)
            if inside < len(self.different):
                text += f"; the loss compares the first {compared} tokens, which end before them"
            if inside:
                text += f"; the loss does compare {inside} of them, which lie between tokens that are the same"
            yield text


def _list(ids: list[int], describe: Callable[[int], str]) -> str:
    shown = ", ".join(f"{index} ({describe(index)})" for index in ids[:SHOWN])
    return f"{shown} and {len(ids) - SHOWN} others" if len(ids) > SHOWN else shown
