"""Rows that a model wrote: token ids, and beside them the text for people, which may have lost tokens."""

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError


def check_text(values: dict, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError where a row has a text that is not that of its token ids.

    Somebody edited it then, or another tokenizer wrote the ids. Of prompts white space is not compared: templates and
    tokenizers change it.

    values: `Row.values` with prompt_ids.
    """
    if wrong := next(_differing(values, tokenizer), None):
        raise ConfigError(
            f"its token ids are not those of its {wrong}: the text was edited, or another tokenizer wrote them; remove "
            "prompt_ids and output_ids to train on the text"
        )


def _differing(values: dict, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    if (
        "output" in values
        and tokenizer.decode(_list(values["output_ids"]), skip_special_tokens=True) != values["output"]
    ):
        yield "output"
    texts = {"prompt": [values["prompt"]] if "prompt" in values else []}
    messages = [one for one in values.get("messages", ()) if one["role"] in ("system", "user")]
    texts["messages"] = [one["content"] for one in messages if isinstance(one.get("content"), str)]
    if not any(texts.values()):
        return
    before = _bare(tokenizer.decode(_list(values["prompt_ids"])))
    for name, known in texts.items():
        for text in known:
            kept = _bare(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]))
            same = (before, before.removeprefix(tokenizer.bos_token or ""))
            if kept not in (same if name == "prompt" else before):
                yield name


def _list(ids: object) -> list[int]:
    return [int(token) for token in ids]


def _bare(text: str) -> str:
    return "".join(text.split())
