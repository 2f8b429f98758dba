"""Chat templates: from a checked row to the text of its prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_prompt(row: dict, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a row's prompt: all messages but the last one, by the tokenizer's chat template, or the prompt."""
    if "messages" in row:
        return tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
    return row["prompt"]
