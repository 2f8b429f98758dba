"""Test sets: read, tokenized, cut as in the papers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pathlib

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..data import indexed_dataset
from ..data.rows import DEV, Row, read_rows
from ..data.tokenize import encode_prompts, references
from ..errors import ConfigError
from ..generation.sampling import SamplingParams

NAMES = {
    "dolly": "Dolly",
    "self-inst": "Self-Instruct",
    "vicuna": "Vicuna",
    "sinst": "Super-Natural",
    "s-ni": "Super-Natural",
    "uinst": "Unnatural",
    "unni": "Unnatural",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """How models are asked; the defaults are the papers' for test sets. Raises ConfigError for values out of range."""

    sampling: SamplingParams = dataclasses.field(default_factory=lambda: SamplingParams(no_repeat_ngram_size=6))
    max_prompt_length: int = 256  # the first so many tokens are read
    begin_token: bool = False  # before every prompt; the papers' Llama models got one here, though not in training

    def __post_init__(self) -> None:
        if self.max_prompt_length < 1:
            raise ConfigError(f"max_prompt_length is {self.max_prompt_length}, expected at least 1")

    def to_dict(self) -> dict:
        settings = {**dataclasses.asdict(self.sampling), **dataclasses.asdict(self)}
        left_out = ("sampling", "eos_token_ids")
        return {key: value for key, value in settings.items() if key not in left_out and value is not None}


@dataclasses.dataclass(frozen=True)
class TestSet:
    """Prompts in tokens, and the texts that responses are compared with."""

    name: str
    source: str
    prompts: list[list[int]]
    references: list[list[str]]
    cut: int  # prompts that were longer

    def identity(self) -> dict:
        content = json.dumps([self.prompts, self.references]).encode()
        return {"rows": len(self.prompts), "cut_prompts": self.cut, "content": hashlib.sha256(content).hexdigest()}


def read_sets(
    sets: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    protocol: Protocol,
    rows: int | None = None,
) -> list[TestSet]:
    """The sets, in tokens, under their names in the papers.

    Args:
        sets: JSONL files by name, or folders of the papers' .bin and .idx files.
        config: of the model that is to answer.
        rows: use only the first ones of each set.

    Raises ConfigError where a set, its name, or a row can't be used.
    """
    read: dict[str, TestSet] = {}
    for key, source in sets.items():
        name = NAMES.get(key.lower(), key)
        if not name.strip(". ") or "/" in name or not name.isprintable() or len(name.encode()) > 200:
            raise ConfigError(f"\"{key[:60]}\" can't be a set's name: its files are called by it")
        if name in read:
            raise ConfigError(f"{key}: there are two sets called {name}")
        try:
            _check_source(source)
            chosen = read_rows(source, rows, DEV, prompts_only=True)
            prompts, cut = _encode(chosen, tokenizer, config, protocol)
            read[name] = TestSet(name, source, prompts, references(chosen, tokenizer), cut)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None
    return [*read.values()]


def _check_source(source: str) -> None:
    """Raises ConfigError for what isn't one split: in training, folders are read whole, and Hub names' first split."""
    path = pathlib.Path(source)
    if source.startswith("quickstart:") or path.is_file() or indexed_dataset.find(source, DEV):
        return
    if path.is_dir():
        raise ConfigError(f"{source} is a folder, and expected is a file of it, for example {path / 'valid.jsonl'}")
    raise ConfigError(f"{source}: no such file")


def _encode(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, protocol: Protocol
) -> tuple[list[list[int]], int]:
    """Prompts in tokens, and how many of them are cut."""
    if protocol.begin_token and tokenizer.bos_token_id is None:
        raise ConfigError("a begin token is asked for, but the tokenizer has none")
    begin = [tokenizer.bos_token_id] if protocol.begin_token else []
    whole = [begin + prompt for prompt in encode_prompts(rows, tokenizer)]
    limit = protocol.max_prompt_length
    prompts = [prompt[:limit] for prompt in whole]
    positions = getattr(config, "max_position_embeddings", math.inf)
    for row, prompt in zip(rows, prompts, strict=True):
        if len(prompt) >= positions:
            raise ConfigError(
                f"{row.where}: the prompt has {len(prompt)} tokens, and the model {positions} positions: no room for "
                "an answer; lower max_prompt_length"
            )
    return prompts, sum(len(prompt) > limit for prompt in whole)
