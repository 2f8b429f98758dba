"""Chat templates: from a checked row to the text of its prompt."""

import dataclasses
import typing

from transformers import PreTrainedTokenizerBase

from ..config.schema import DataConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """How rows become tokens, besides the tokenizer and its chat template: the keys of `data` with these names."""

    train_on: str = "all"
    begin_token: typing.Literal["auto", True, False] = "auto"
    chat_template_kwargs: dict | None = None

    @classmethod
    def from_config(cls, data: DataConfig) -> "PromptFormat":
        return cls(**{field.name: getattr(data, field.name) for field in dataclasses.fields(cls)})


def render_prompt(row: dict, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a row's prompt: all messages but the last one, by the tokenizer's chat template, or the prompt."""
    if "messages" in row:
        return tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
    return row["prompt"]
