"""Test sets: read, tokenized, and cut as in the papers."""

import dataclasses
import hashlib
import json
import pathlib
import typing
from collections.abc import Callable

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..config.sampling import SamplingParams
from ..config.training import EvalConfig
from ..data import indexed_dataset
from ..data.chat import PromptFormat
from ..data.rows import DEV, Row, Rows, read_rows
from ..data.tokenize import encode_prompts, references
from ..errors import ConfigError, check_number
from ..files import check_path_length
from ..models import loading

NAMES = {
    "dolly": "Dolly",
    "self-inst": "Self-Instruct",
    "vicuna": "Vicuna",
    "sinst": "Super-Natural",
    "s-ni": "Super-Natural",
    "uinst": "Unnatural",
    "unni": "Unnatural",
}
PAPERS_SAMPLING = SamplingParams.from_options(EvalConfig())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a model answers test sets; the defaults are the papers'. Raises ConfigError for values out of range."""

    sampling: SamplingParams = PAPERS_SAMPLING
    max_prompt_length: int = 256  # longer prompts are cut to their first tokens
    begin_token: typing.Literal["auto", True, False] = "auto"  # before every prompt; as in training, by default
    chat_template_kwargs: dict | None = None
    rouge_tokens: str = "words"  # or "characters": the units of ROUGE-L

    def __post_init__(self) -> None:
        check_number("max_prompt_length", self.max_prompt_length, 1)

    @property
    def style(self) -> PromptFormat:
        return PromptFormat(begin_token=self.begin_token, chat_template_kwargs=self.chat_template_kwargs)

    def to_dict(self) -> dict:
        """The settings of scores.json, besides those that the tokenizer decides, too."""
        sampling = {key: value for key, value in self.sampling.to_dict().items() if value is not None}
        return {**sampling, "max_prompt_length": self.max_prompt_length, "rouge_tokens": self.rouge_tokens}


@dataclasses.dataclass(frozen=True)
class TestSet:
    """Prompts in tokens, and for each the texts that responses are compared with."""

    name: str
    source: str
    prompts: list[list[int]]
    references: list[list[str]]
    cut: int  # how many prompts were longer than the protocol's max_prompt_length
    note: str  # for people: how many rows of which source, how they become prompts, and which columns are not read

    def identity(self) -> dict:
        content = json.dumps([self.prompts, self.references]).encode()
        return {"rows": len(self.prompts), "cut_prompts": self.cut, "content": hashlib.sha256(content).hexdigest()}


def read_sets(
    sets: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    hf_config: PretrainedConfig,
    protocol: Protocol,
    rows: int | None = None,
    read: Callable[..., Rows] = read_rows,
) -> list[TestSet]:
    """Reads and tokenizes test sets; their names are the papers'.

    Args:
        sets: by name, JSONL files or folders of the papers' .bin and .idx files.
        hf_config: the configuration of the model that is to answer.
        rows: use only the first ones of each set.
        read: reads rows; it may remember those that recipes' stages share.

    Raises ConfigError for a set, a name, or a row that can't be used.
    """
    found: dict[str, TestSet] = {}
    for key, source in sets.items():
        name = NAMES.get(key.lower(), key)
        if not name.strip(". ") or "/" in name or not name.isprintable() or len(name.encode()) > 200:
            raise ConfigError(f"\"{key[:60]}\" can't be a set's name: its files are called by it")
        if name in found:
            raise ConfigError(f"{key}: there are two sets called {name}")
        try:
            _check_source(source)
            chosen = read(source, rows, DEV, "ignored")
            prompts, cut = _encode(chosen, tokenizer, hf_config, protocol)
            outputs = [references(row, tokenizer) for row in chosen]
            found[name] = TestSet(name, source, prompts, outputs, cut, _describe(chosen, tokenizer))
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None
    return [*found.values()]


def _check_source(source: str) -> None:
    """Raises ConfigError for a source that is not one split (training also takes whole folders, and Hub names)."""
    check_path_length("data", source)
    path = pathlib.Path(source)
    if source.startswith("quickstart:") or path.is_file() or indexed_dataset.find(source, DEV):
        return
    if path.is_dir():
        raise ConfigError(f"{source} is a folder, and expected is a file of it, for example {path / 'valid.jsonl'}")
    raise ConfigError(f"{source}: no such file")


def _encode(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, hf_config: PretrainedConfig, protocol: Protocol
) -> tuple[list[list[int]], int]:
    """Returns the prompts in tokens, and how many of them are cut.

    Messages stay whole: a prompt without its end and the beginning of an answer asks for nothing.
    """
    whole = encode_prompts(rows, tokenizer, protocol.style)
    limits = [None if "messages" in row.values else protocol.max_prompt_length for row in rows]
    prompts = [prompt[:limit] for prompt, limit in zip(whole, limits, strict=True)]
    loading.check_prompts(hf_config, zip((row.where for row in rows), prompts, strict=True))
    return prompts, sum(len(prompt) < len(uncut) for prompt, uncut in zip(prompts, whole, strict=True))


def _describe(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> str:
    """What was read, and for a chat model how many rows its template renders: the rows decide, not the model."""
    if tokenizer.chat_template is None:
        return rows.notes[-1]
    chats = sum("messages" in row.values and "prompt_ids" not in row.values for row in rows)
    count = {0: "none", len(rows): "all"}.get(chats, chats)
    return f"{rows.notes[-1]}; the chat template renders {count} of them"
