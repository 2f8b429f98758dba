"""Settings of sampling: meaning, defaults and ranges, for recipes, commands and `sample`. Imports no PyTorch."""

import dataclasses
from typing import Annotated

from ..errors import check_number
from .section import Section

# The settings that a response depends on, in the order in which files and commands list them.
OPTIONS = ("max_new_tokens", "max_length", "min_new_tokens", "temperature", "top_k", "top_p", "no_repeat_ngram_size")

NgramSize = Annotated[int, "no n-gram of so many tokens occurs twice, prompt included (0: no ban)", 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingKeys(Section):
    """The settings that every recipe section about sampling has as keys."""

    max_new_tokens: Annotated[int, "tokens of a response, at most", 1] = 256
    temperature: Annotated[float, "divides the logits; 0: always the most likely token", 0, 1e3] = 1.0
    top_k: Annotated[int, "sample only from this number of the most likely tokens (0: all)", 0] = 0
    top_p: Annotated[float, "sample only from the most likely tokens that have this probability together", 0, 1] = 1.0


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
        check_number("min_new_tokens", self.min_new_tokens, 0, self.max_new_tokens)

    @classmethod
    def from_options(cls, options: object, **others: object) -> "SamplingParams":
        """The settings that a recipe section or a command's options have, and others."""
        names = [field.name for field in dataclasses.fields(cls) if hasattr(options, field.name)]
        return cls(**{name: getattr(options, name) for name in names}, **others)

    def to_dict(self) -> dict:
        """The settings that a response depends on, besides the model and its tokenizer."""
        return {name: getattr(self, name) for name in OPTIONS}
