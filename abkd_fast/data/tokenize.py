"""Tokenization of checked rows. The result is stored on the disk."""

import hashlib
import json
import math
import pathlib

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError
from . import indexed_dataset
from .chat import render_prompt
from .rows import Row

# Columns of tokenized data: of a sample, and of a sample that comes from a row.
SAMPLE = datasets.Features(
    {"input_ids": datasets.List(datasets.Value("int32")), "spans": datasets.List(datasets.Value("int32"))}
)
ROW = datasets.Features({**SAMPLE, "row": datasets.Value("int64"), "row_length": datasets.Value("int32")})


def tokenize(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, max_prompt_length: int | None = None
) -> datasets.Dataset:
    """Tokenizes rows into the columns of ROW, one sample for each row that is not left out; lengths are in tokens:

    - input_ids: prompt, response and end token, cut to max_length tokens;
    - prompt_length: the number of tokens of the prompt;
    - row: the index of the sample's row in `rows`;
    - row_length: the length of the row before the cut.

    As in the papers, the prompt is tokenized alone, and the response is the rest of prompt and response tokenized
    together. There is no begin token. Rows whose prompt has more than max_prompt_length tokens are left out. The result
    is stored in the cache of `datasets`, under a hash of rows, tokenizer and limits.

    Raises ConfigError if no row is left, if a prompt leaves no room for a response, and for foreign token ids.
    """
    _check_rows(rows, tokenizer)
    content = [json.dumps(row.values, default=np.ndarray.tolist) for row in rows]
    limits = max_length, max_prompt_length
    key = fingerprint(content, tokenizer, limits)
    progress = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bar()
    dataset = datasets.Dataset.from_dict({"row": content}).map(
        lambda batch, numbers: _encode([json.loads(row) for row in batch["row"]], numbers, tokenizer, *limits),
        batched=True,
        with_indices=True,
        remove_columns=["row"],
        features=ROW,
        cache_file_name=str(arrow_file(key)),
        new_fingerprint=key,
    )
    if progress:
        datasets.enable_progress_bar()
    if not len(dataset):
        reason = f"the prompts exceed {max_prompt_length} tokens, so no row is left; raise data.max_prompt_length"
        raise ConfigError(f"{rows[0].where} and all others: {reason}")
    for number, spans in zip(dataset["row"][:], dataset["spans"][:], strict=True):
        _check_prompt(rows[number].where, spans[0], max_length)
    return dataset


def references(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts that a response is compared with: all outputs of a row.

    Raises ConfigError for a row of JSON that has none, or one that is not text.
    """
    if "output_ids" in row.values:
        return [tokenizer.decode(row.values["output_ids"], skip_special_tokens=True)]
    outputs = row.outputs if isinstance(row.outputs, list) else [row.outputs]
    if not outputs or not all(isinstance(text, str) for text in outputs):
        got = json.dumps(row.outputs)[:60]
        raise ConfigError(f'{row.where}: "output" must be a text or a list of texts to compare with, got {got}')
    return outputs


def encode_prompts(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of each prompt, as in `tokenize`.

    Raises ConfigError for an empty prompt, foreign token ids, and messages without a chat template in the tokenizer.
    """
    _check_rows(rows, tokenizer)
    values = [row.values for row in rows]
    if "prompt_ids" in values[0]:  # then all have them
        prompts = [np.asarray(row["prompt_ids"]).tolist() for row in values]
    else:
        prompts = tokenizer([render_prompt(row, tokenizer) for row in values], add_special_tokens=False)["input_ids"]
    for row, prompt in zip(rows, prompts, strict=True):
        _check_prompt(row.where, len(prompt))
    return prompts


def _check_rows(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> None:
    chat = next((row for row in rows if "messages" in row.values), None)
    if chat is not None and tokenizer.chat_template is None:
        raise ConfigError(f"{chat.where}: has messages, but the tokenizer has no chat template; use prompt and output")
    for row in rows:
        for ids in (row.values[key] for key in ("prompt_ids", "output_ids") if key in row.values):
            indexed_dataset.check_ids(row.where, ids, len(tokenizer))


def _check_prompt(where: str, length: int, max_length: float = math.inf) -> None:
    if length == 0:
        raise ConfigError(f"{where}: the prompt is empty: nothing predicts the first token of the response")
    if length >= max_length:
        reason = f"the prompt has {length} tokens and fills all {max_length}: nothing to learn"
        raise ConfigError(f"{where}: {reason}; raise data.max_length, or lower data.max_prompt_length")


def fingerprint(content: list, tokenizer: PreTrainedTokenizerBase, limits: tuple[int | None, ...]) -> str:
    """A hash of everything that tokenized data depend on. `content` holds JSON values."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    identity = [content, state, tokenizer.eos_token, getattr(tokenizer, "chat_template", None), limits]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def arrow_file(key: str) -> pathlib.Path:
    """The file for tokenized data with this fingerprint."""
    folder = pathlib.Path(datasets.config.HF_DATASETS_CACHE) / "abkd_fast"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{key}.arrow"


def _encode(
    rows: list[dict], numbers: list[int], tokenizer: PreTrainedTokenizerBase, max_length: int, max_prompt: int | None
) -> dict[str, list]:
    """The columns of ROW for the rows with these numbers."""
    binary = "prompt_ids" in rows[0]  # then all rows are
    pairs = [(row["prompt_ids"], row["output_ids"]) for row in rows] if binary else _token_ids(rows, tokenizer)
    samples = [
        ((prompt + response)[:max_length], [len(prompt), min(max_length, len(prompt + response))], number, len(prompt) + len(response))
        for number, (prompt, response) in zip(numbers, pairs, strict=True)
        if max_prompt is None or len(prompt) <= max_prompt
    ]
    return {name: [sample[place] for sample in samples] for place, name in enumerate(ROW)}


def _token_ids(rows: list[dict], tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[int]]]:
    """The tokens of each row's prompt, and those of its response, with an end token unless the response was cut."""
    prompts = [render_prompt(row, tokenizer) for row in rows]
    outputs = [row["messages"][-1]["content"] if "messages" in row else row["output"] for row in rows]
    wholes = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    whole_ids = tokenizer(wholes, add_special_tokens=False)["input_ids"]
    ends = [[tokenizer.eos_token_id] if row.get("ended", True) else [] for row in rows]
    return [
        (prompt, whole[len(prompt) :] + end) for prompt, whole, end in zip(prompt_ids, whole_ids, ends, strict=True)
    ]


def describe_long_rows(rows: list[Row], dataset: datasets.Dataset, max_length: int, max_prompt: int | None) -> str:
    """A text for people about rows that `tokenize` has cut or left out; empty if there are none."""
    kept = set(dataset["row"][:])
    left_out = [row.where for number, row in enumerate(rows) if number not in kept]
    cut = sum(length > max_length for length in dataset["row_length"][:])
    notes = []
    if cut:
        notes.append(f"{cut} of {len(rows)} rows exceed {max_length} tokens and are cut")
    if left_out:
        first = left_out[0] + ", …" * (len(left_out) > 1)
        notes.append(f"{len(left_out)} rows are left out: their prompts exceed {max_prompt} tokens ({first})")
    return "; ".join(notes)
