"""Messages and chat templates."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_prompt(row: dict, tokenizer: PreTrainedTokenizerBase) -> str:
    if "messages" in row:
        return tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
    return row["prompt"]
