"""The data of the quickstart: short instruction tasks, generated from a seed, and a tokenizer trained on them.

Each answer has several wordings, chosen at random, as people do. A teacher knows the probability of each wording; a
single row doesn't.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .formats import PROMPT, PROMPT_WITH_INPUT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORDS = (
    *("apple", "bridge", "candle", "desert", "engine", "forest", "garden", "hammer", "island", "jacket", "kettle"),
    *("lantern", "market", "needle", "ocean", "pencil", "quartz", "river", "silver", "tunnel", "umbrella", "valley"),
    *("window", "yellow", "zebra", "anchor", "butter", "copper", "dragon", "eagle", "falcon", "guitar"),
)
COLORS = ("red", "green", "blue", "white", "black", "brown", "purple", "orange")
ANIMALS = {"dog": "barks", "cat": "meows", "cow": "moos", "duck": "quacks", "lion": "roars", "sheep": "bleats"}
SIZES = {"train": 6000, "small": 600, "dev": 200, "test": 400}
SEEDS = {"dev": 1, "test": 2}  # the other splits have seed 0


def rows(split: str) -> Iterator[dict[str, str | list[str]]]:
    """Rows with instruction, input and output. Splits: "train", "small" (the first rows of train), "dev", "test".

    The output is one wording of the answer. In "test" it is the list of all wordings: each of them is right. Raises
    ConfigError for another split.
    """
    if split not in SIZES:
        raise ConfigError(f"quickstart:{split}: no such split; valid are {', '.join(SIZES)}")
    generator = random.Random(SEEDS.get(split, 0))
    for _ in range(SIZES[split]):
        instruction, extra, wordings = generator.choice(TASKS)(generator)
        output = wordings if split == "test" else generator.choice(wordings)
        yield {"instruction": instruction, "input": extra, "output": output}


def _sentences(subject: str, answer: str) -> list[str]:
    return [f"{answer}.", f"The answer is {answer}.", f"It is {answer}.", f"{subject} is {answer}.", f"Sure: {answer}."]


def _add(generator: random.Random) -> tuple[str, str, list[str]]:
    a, b = generator.randint(0, 20), generator.randint(0, 20)
    question = generator.choice(("Add {a} and {b}.", "What is {a} plus {b}?", "Find the sum of {a} and {b}."))
    return question.format(a=a, b=b), "", _sentences("The sum", str(a + b))


def _compare(generator: random.Random) -> tuple[str, str, list[str]]:
    a, b = generator.sample(range(100), 2)
    return f"Which number is larger, {a} or {b}?", "", _sentences("The larger number", str(max(a, b)))


def _first(generator: random.Random) -> tuple[str, str, list[str]]:
    words = generator.sample(WORDS, 4)
    which = generator.choice(("first", "last"))
    answer = words[0] if which == "first" else words[-1]
    return f"Give the {which} word of the list.", ", ".join(words), _sentences(f"The {which} word", answer)


def _sort(generator: random.Random) -> tuple[str, str, list[str]]:
    words = generator.sample(WORDS, 3)
    question = generator.choice(("Sort the words alphabetically.", "Put these words into alphabetical order."))
    answer = ", ".join(sorted(words))
    return question, ", ".join(words), [answer, f"Sorted: {answer}", f"Here they are: {answer}"]


def _repeat(generator: random.Random) -> tuple[str, str, list[str]]:
    word, times = generator.choice(WORDS), generator.randint(2, 4)
    question = generator.choice(("Write the word {word} {times} times.", "Repeat {word} {times} times."))
    return question.format(word=word, times=times), "", [separator.join([word] * times) for separator in (" ", ", ")]


def _sound(generator: random.Random) -> tuple[str, str, list[str]]:
    animal, sound = generator.choice(list(ANIMALS.items()))
    wordings = [f"A {animal} {sound}.", f"It {sound}.", f"The {animal} {sound}, as every child knows."]
    return f"What sound does a {animal} make?", "", wordings


def _describe(generator: random.Random) -> tuple[str, str, list[str]]:
    word, color = generator.choice(WORDS), generator.choice(COLORS)
    wordings = [f"The {word} is {color}.", f"There is a {color} {word}.", f"I see a {color} {word}."]
    return "Write a sentence with the two words.", f"{word}, {color}", wordings


TASKS = (_add, _compare, _first, _sort, _repeat, _sound, _describe)


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer, trained on the tasks. Training takes a second."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = ((PROMPT_WITH_INPUT if row["input"] else PROMPT).format(**row) + row["output"] for row in rows("train"))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<end>")
