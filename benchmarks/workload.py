"""What whole training steps are measured on: models of random weights, and samples as long as Dolly's."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from abkd_fast.data.rows import read_rows
from abkd_fast.data.tokenize import tokenize
from abkd_fast.models.loading import read_tokenizer

LENGTH = 512  # tokens that a sample has at most, and that the published way pads it to
NEW_TOKENS = 256  # of a generated response at most
# Tokens of prompt and response of Dolly's training rows: the quantiles 0, 1/32, … 1, as --measure-lengths prints them.
PROMPTS = (
    *(31, 35, 36, 36, 37, 38, 38, 39, 39, 39, 40, 40, 41, 41, 42, 43, 44),
    *(44, 45, 46, 48, 51, 55, 61, 68, 81, 105, 134, 160, 182, 203, 226, 256),
)
RESPONSES = (
    *(2, 4, 6, 9, 11, 13, 15, 17, 19, 22, 25, 27, 30, 33, 37, 41, 45),
    *(49, 54, 59, 65, 71, 78, 86, 95, 104, 116, 132, 151, 179, 224, 331, 512),
)


@dataclasses.dataclass(frozen=True)
class Scale:
    """Models (what their shapes leave out is that of GPT-2, 124M) and samples of a step."""

    title: str
    student: dict
    teacher: dict
    batch_size: int
    vocab: int = 50257

    def model(self, shape: dict) -> dict:
        """As a configuration has it."""
        values = {"model_type": "gpt2", "vocab_size": self.vocab, "bos_token_id": 0, "eos_token_id": 0}
        return {"config": values | shape}


TINY = {"n_layer": 2, "n_head": 2, "initializer_range": 0.2}
SCALES = {
    "paper": Scale("GPT-2 XL to GPT-2", {}, {"n_embd": 1600, "n_layer": 48, "n_head": 25}, 8),
    "small": Scale("GPT-2 medium to GPT-2", {}, {"n_embd": 1024, "n_layer": 24, "n_head": 16}, 4),
    "tiny": Scale("tiny models", {**TINY, "n_embd": 32}, {**TINY, "n_embd": 64}, 4, vocab=1009),
}


def length_quantiles(data: str, tokenizer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """PROMPTS and RESPONSES of a data set; they are cut at LENGTH."""
    rows = tokenize(read_rows(data), read_tokenizer(tokenizer, "tokenizer"), max_length=1 << 20)
    prompts = np.array(rows["prompt_length"])
    responses = np.array([len(ids) for ids in rows["input_ids"]]) - prompts
    at = np.linspace(0, 1, len(PROMPTS))
    of_each = (np.quantile(lengths.clip(max=LENGTH), at).round().astype(int) for lengths in (prompts, responses))
    return tuple(tuple(lengths.tolist()) for lengths in of_each)


def draw_lengths(
    quantiles: tuple[int, ...], batches: int, batch_size: int, generator: np.random.Generator
) -> np.ndarray:
    """Lengths [batches, batch_size], one from each of so many equal parts of the distribution.

    All together are like the whole, and so is every batch, as far as its few samples can be.
    """
    count = batches * batch_size
    at = ((np.arange(count) + generator.random(count)) / count).reshape(batch_size, batches)
    at = generator.permuted(generator.permuted(at, axis=1), axis=0)
    return np.interp(at, np.linspace(0, 1, len(quantiles)), quantiles).round().astype(int).T


def write_rows(path: pathlib.Path, batches: int, batch_size: int, vocab: int) -> None:
    """Rows of random tokens, batch after batch, for the tokenizer below.

    Prompt and response lengths are independent: in Dolly their correlation is -0.06.
    """
    generator = np.random.default_rng(0)

    def text(tokens: int) -> str:
        return "".join(f" {token}" for token in generator.integers(1, vocab, size=tokens))

    prompts, responses = (draw_lengths(lengths, batches, batch_size, generator) for lengths in (PROMPTS, RESPONSES))
    with path.open("w") as file:
        for prompt, response in zip(prompts.flat, responses.flat, strict=True):
            file.write(json.dumps({"prompt": text(prompt), "output": text(response - 1)}) + "\n")


def write_text(path: pathlib.Path, blocks: int, vocab: int) -> None:
    """Documents of random tokens, each of which is a block of LENGTH, the end token included."""
    tokens = np.random.default_rng(1).integers(1, vocab, size=(blocks, LENGTH - 1))
    with path.open("w") as file:
        for document in tokens:
            file.write(json.dumps({"text": " ".join(map(str, document))}) + "\n")


def response_lengths(samples: list[dict]) -> list[int]:
    """What generated responses get: those of the data's own. Random weights would hardly ever end one."""
    return [min(NEW_TOKENS, len(sample["input_ids"]) - sample["prompt_length"]) for sample in samples]


def write_tokenizer(folder: pathlib.Path, vocab: int) -> None:
    """Its words are the numbers of its tokens, but for the end token, 0."""
    words = Tokenizer(WordLevel({"<end>": 0} | {str(token): token for token in range(1, vocab)}))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)
