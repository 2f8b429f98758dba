"""What benchmarks work on: models of random weights and samples as long as Dolly's, or a real model and rows."""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import harness
from abkd_fast.data.batches import count_labels
from abkd_fast.data.rows import read_rows
from abkd_fast.data.tokenize import tokenize
from abkd_fast.models.tokenizers import read_tokenizer

LENGTH = 512  # most tokens of a sample; the published way pads every sample to it
NEW_TOKENS = 256  # most tokens of a generated response
# Tokens of prompt and response of Dolly's training rows, cut at LENGTH: quantiles 0, 1/32, … 1. A test measures them.
PROMPTS = (
    *(31, 35, 36, 36, 37, 38, 38, 39, 39, 39, 40, 40, 41, 41, 42, 43, 44),
    *(44, 45, 46, 48, 51, 55, 61, 68, 81, 105, 134, 160, 182, 203, 226, 256),
)
RESPONSES = (
    *(2, 4, 6, 9, 11, 13, 15, 17, 19, 22, 25, 27, 30, 33, 37, 41, 45),
    *(49, 54, 59, 65, 71, 78, 86, 95, 104, 116, 132, 151, 179, 224, 331, 512),
)
MEAN_PROMPT, MEAN_RESPONSE = 71.3, 74.3  # of rows cut at LENGTH


@dataclasses.dataclass(frozen=True)
class Scale:
    title: str
    student: dict  # what differs from GPT-2 (124M)
    teacher: dict
    batch_size: int
    vocab: int = 50257

    def model(self, shape: dict) -> dict:
        """The model's section of a recipe."""
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        return {"config": {"model_type": "gpt2", "vocab_size": self.vocab} | ends | shape}


TINY = {"n_layer": 2, "n_head": 2, "initializer_range": 0.2}
SCALES = {
    "paper": Scale("GPT-2 XL to GPT-2", {}, {"n_embd": 1600, "n_layer": 48, "n_head": 25}, 8),
    "small": Scale("GPT-2 medium to GPT-2", {}, {"n_embd": 1024, "n_layer": 24, "n_head": 16}, 4),
    "tiny": Scale("tiny models", {**TINY, "n_embd": 32}, {**TINY, "n_embd": 64}, 4, vocab=1009),
}


def scaled_parser(description: str, name: str) -> tuple[argparse.ArgumentParser, Callable]:
    """The command line of a benchmark at one of SCALES, and its function `add_argument`."""
    parser, add = harness.parser(description, name, repeats=3)
    add("--scale", choices=SCALES, help="default: paper on a GPU, small on the CPU")
    add("--batch-size", type=int, help="samples of a step (default: the scale's)")
    return parser, add


def draw_lengths(quantiles: Sequence[int], batches: int, batch_size: int, generator: np.random.Generator) -> np.ndarray:
    """Lengths [batches, batch_size], one from each of as many equal parts, so that every batch is like the whole."""
    count = batches * batch_size
    at = ((np.arange(count) + generator.random(count)) / count).reshape(batch_size, batches)
    at = generator.permuted(generator.permuted(at, axis=1), axis=0)
    return np.interp(at, np.linspace(0, 1, len(quantiles)), quantiles).round().astype(int).T


def draw_samples(batches: int, batch_size: int, generator: np.random.Generator) -> np.ndarray:
    """Tokens of prompts and responses [2, samples], batch after batch. In Dolly, too, they hardly correlate (-0.06)."""
    return np.stack([draw_lengths(each, batches, batch_size, generator).ravel() for each in (PROMPTS, RESPONSES)])


def random_text(generator: np.random.Generator, vocab: int, tokens: int, before: str = " ") -> str:
    """Words that are numbers of tokens, each with a string before it."""
    return "".join(f"{before}{token}" for token in generator.integers(1, vocab, size=tokens))


def write_rows(path: pathlib.Path, rows: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_recipe(folder: pathlib.Path, scale: Scale, batches: int, train: dict, sections: dict) -> pathlib.Path:
    """Writes a recipe with one micro-batch a step and no checkpoint, and its samples and plain text.

    `train` is a section with device, steps and batch_size, `sections` are more. "data" is added to what is said here.
    """
    rows, size, vocab = folder / "rows.jsonl", train["batch_size"], scale.vocab
    if not rows.exists():
        generator = np.random.default_rng(0)
        lengths = draw_samples(batches, size, generator) - [[0], [1]]  # the end token is added
        texts = [[random_text(generator, vocab, length) for length in pair] for pair in lengths.T]
        write_rows(rows, [{"prompt": prompt, "output": output} for prompt, output in texts])
        generator = np.random.default_rng(1)
        blocks = [{"text": random_text(generator, vocab, LENGTH - 1)} for _ in range(batches * size)]
        write_rows(folder / "text.jsonl", blocks)
        write_tokenizer(folder / "tokenizer", vocab)
    recipe = {
        "tokenizer": str(folder / "tokenizer"),
        "student": scale.model(scale.student),
        "train": {"max_tokens": size * LENGTH, **train},
        "checkpoint": {"every_steps": train["steps"]},
        **sections,
        "data": {"train": str(rows), "max_length": LENGTH, "max_prompt_length": None, **sections.get("data", {})},
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


def write_tokenizer(folder: pathlib.Path, vocab: int, before: str = "", end: str = "<end>") -> None:
    """A tokenizer whose words are the numbers of its tokens, with a string before each; the end token is 0."""
    words = Tokenizer(WordLevel({end: 0} | {f"{before}{token}": token for token in range(1, vocab)}, unk_token=end))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end, unk_token=end).save_pretrained(folder)


def response_lengths(samples: list[dict]) -> list[int]:
    """Lengths of the responses to generate: those of the data. Random weights would hardly ever end one."""
    return [min(NEW_TOKENS, count_labels(sample)) for sample in samples]


def random_gpt2(sizes: argparse.Namespace, end: int | None) -> GPT2LMHeadModel:
    """A GPT-2 of random weights with `sizes.width`, `.layers` and `.vocab`, and an end token."""
    shape = {"n_embd": sizes.width, "n_layer": sizes.layers, "n_head": max(1, sizes.width // 64)}
    return GPT2LMHeadModel(GPT2Config(**shape, vocab_size=sizes.vocab, bos_token_id=end, eos_token_id=end))


def rows_parser(description: str, name: str, count: int = 8) -> tuple[argparse.ArgumentParser, Callable]:
    """The command line of a benchmark that reads rows with a model, and its function `add_argument`."""
    parser, add = harness.parser(description, name, repeats=0)
    add("model")
    add("rows")
    add("--count", type=int, default=count, help="rows that are read (default: %(default)s)")
    add("--max-length", type=int, default=256, help="tokens of a row (default: %(default)s)")
    return parser, add


def read_samples(options: dict[str, Any]) -> list[dict]:
    """The samples of the rows that such a command line names, in tokens. Rows that can't be used are left out."""
    tokenizer = read_tokenizer(options["model"], "model")
    rows = read_rows(options["rows"], options["count"])
    return list(tokenize(rows, tokenizer, options["max_length"], on_bad_row="skip").dataset)
