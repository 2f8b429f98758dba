"""Rows that a model wrote: token ids, and beside them the text for people, which may have lost tokens."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError


def check_text(values: dict, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError where a row has a text that is not that of its token ids.

    Somebody edited it then, or another tokenizer wrote the ids. Of prompts white space is not compared: templates and
    tokenizers change it.

    values: `Row.values` with prompt_ids.
    """
    wrong = None
    if "output" in values and _decode(tokenizer, values["output_ids"], skip_special_tokens=True) != values["output"]:
        wrong = "output"
    elif "prompt" in values or "messages" in values:
        wrong = _changed_before(values, tokenizer)
    if wrong:
        raise ConfigError(
            f"its token ids are not those of its {wrong}: the text was edited, or another tokenizer wrote them; remove "
            "prompt_ids and output_ids to train on the text"
        )


def _changed_before(values: dict, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The key of a text before the answer that is not in the ids; None if all are."""
    before = _bare(_decode(tokenizer, values["prompt_ids"]))

    def kept(text: str) -> str:  # what the tokenizer makes of it
        return _bare(_decode(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"]))

    if "prompt" in values:
        is_same = kept(values["prompt"]) in (before, before.removeprefix(tokenizer.bos_token or ""))
        return None if is_same else "prompt"
    texts = [one.get("content") for one in values["messages"] if one["role"] in ("system", "user")]
    is_same = all(kept(text) in before for text in texts if isinstance(text, str))
    return None if is_same else "messages"


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
    return tokenizer.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)


def _bare(text: str) -> str:
    return "".join(text.split())
