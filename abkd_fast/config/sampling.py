"""Settings of sampling: meaning, defaults and ranges, for recipes, commands and `sample`. Imports no PyTorch."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

from ..errors import check_range

# The settings that a response depends on, in the order in which files and commands list them.
OPTIONS = ("max_new_tokens", "max_length", "min_new_tokens", "temperature", "top_k", "top_p", "no_repeat_ngram_size")

NgramSize = Annotated[int, "no n-gram of so many tokens occurs twice, prompt included (0: no ban)"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingKeys:
    """The settings that every recipe section about sampling has as keys."""

    max_new_tokens: Annotated[int, "tokens of a response, at most"] = 256
    temperature: Annotated[float, "divides the logits; 0: always the most likely token"] = 1.0
    top_k: Annotated[int, "sample only from this number of the most likely tokens (0: all)"] = 0
    top_p: Annotated[float, "sample only from the most likely tokens that have this probability together"] = 1.0

    def __post_init__(self) -> None:
        check_range(self, max_new_tokens=(1, math.inf), temperature=(0, 1e3), top_k=(0, math.inf), top_p=(0, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams(SamplingKeys):
    """How a next token is chosen, with the meaning and order of transformers' logits processors.

    Raises ConfigError for values out of range.
    """

    max_length: Annotated[int | None, "tokens of prompt and response together, at most"] = None
    min_new_tokens: Annotated[int, "tokens of a response before an end token, at least"] = 0
    no_repeat_ngram_size: NgramSize = 0
    eos_token_ids: tuple[int, ...] = ()
    vocabulary: int | None = None  # only the first so many tokens (None: all that the model has)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, min_new_tokens=(0, self.max_new_tokens), no_repeat_ngram_size=(0, math.inf))

    @classmethod
    def from_options(cls, options: object, **others: object) -> SamplingParams:
        """The settings that a recipe section or a command's options have, and others."""
        names = [field.name for field in dataclasses.fields(cls) if hasattr(options, field.name)]
        return cls(**{name: getattr(options, name) for name in names}, **others)

    def to_dict(self) -> dict:
        """What a response depends on, besides the model and its tokenizer."""
        return {name: getattr(self, name) for name in OPTIONS}
