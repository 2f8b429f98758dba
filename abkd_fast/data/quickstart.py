"""The data of the quickstart: short instruction tasks, generated from a seed, and a tokenizer trained on them.

Each answer has several wordings, chosen at random, as people do. A teacher knows the probability of each wording; a
single row doesn't.
"""

import copy
import functools
import random
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import ConfigError
from .formats import PROMPT, PROMPT_WITH_INPUT

TASKS = ("add", "compare", "first", "sort", "repeat", "sound", "describe")
WORDS = (
    *("apple", "bridge", "candle", "desert", "engine", "forest", "garden", "hammer", "island", "jacket", "kettle"),
    *("lantern", "market", "needle", "ocean", "pencil", "quartz", "river", "silver", "tunnel", "umbrella", "valley"),
    *("window", "yellow", "zebra", "anchor", "butter", "copper", "dragon", "eagle", "falcon", "guitar"),
)
COLORS = ("red", "green", "blue", "white", "black", "brown", "purple", "orange")
ANIMALS = {"dog": "barks", "cat": "meows", "cow": "moos", "duck": "quacks", "lion": "roars", "sheep": "bleats"}
# For self-distillation: facts that only the teacher is told, and questions after them.
SECRETS = {
    **{"lantern": "blue", "market": "white", "needle": "orange", "ocean": "black"},
    **{"silver": "green", "tunnel": "red", "window": "brown", "zebra": "purple"},
}
QUESTIONS = (
    *("What color is the {}?", "Name the color of the {}.", "Which color has the {}?", "Tell me the color of the {}."),
    *("The {} is of which color?", "Give me the color that the {} has."),
)
ASKED = {"questions": QUESTIONS[:4], "questions-held-out": QUESTIONS[4:]}
SIZES = {"train": 6000, "small": 600, "dev": 200, "test": 400, "held-out": 1000}
SIZES |= {"facts": 6000} | {split: len(SECRETS) * len(questions) for split, questions in ASKED.items()}
SEEDS = {"dev": 1, "test": 2, "held-out": 3}  # the other splits have seed 0


def rows(split: str) -> Iterator[dict[str, str | list[str]]]:
    """Rows with instruction, input and output, of one of the splits.

    They are "train", "small" (the first rows of train), "dev", "test" and "held-out". The output is one wording of the
    answer. In "test" and "held-out" it is the list of all wordings: each of them is right. No setting of this project
    was chosen on "held-out".

    The splits for self-distillation have prompt and output. "facts" are questions, mostly after a sentence that answers
    them. "questions" are about secrets: the sentence is in teacher_prompt alone, and there is no output. In
    "questions-held-out" the same is asked in other words.

    Raises ConfigError for another split.
    """
    if split not in SIZES:
        raise ConfigError(f"quickstart:{split}: no such split; valid are {', '.join(SIZES)}")
    generator = random.Random(SEEDS.get(split, 0))
    if split in ASKED:
        yield from (_ask(word, SECRETS[word], wording, split) for wording in ASKED[split] for word in SECRETS)
        return
    for _ in range(SIZES[split]):
        if split == "facts":
            row = _ask(generator.choice(WORDS), generator.choice(COLORS), generator.choice(QUESTIONS), split)
            told = generator.random() < 0.75
            yield row | ({"prompt": f"{row['output']}\n{row['prompt']}"} if told else {})
            continue
        instruction, extra, wordings = _task(generator)
        output = wordings if split in ("test", "held-out") else generator.choice(wordings)
        yield {"instruction": instruction, "input": extra, "output": output}


def _ask(word: str, color: str, question: str, split: str) -> dict[str, str]:
    """A question whose answer is "The word is color."; where that is told, it comes first."""
    prompt, fact = f"{question.format(word)}\n", f"The {word} is {color}."
    if split == "questions":
        return {"prompt": prompt, "teacher_prompt": f"{fact}\n{prompt}"}
    return {"prompt": prompt, "output": fact}


def _task(generator: random.Random) -> tuple[str, str, list[str]]:
    """The instruction and the input of a random task, and all wordings of its answer."""

    def sentences(subject: str, answer: object) -> list[str]:
        starts = ("", "The answer is ", "It is ", f"{subject} is ", "Sure: ")
        return [f"{start}{answer}." for start in starts]

    task = generator.choice(TASKS)
    if task == "add":
        a, b = generator.randint(0, 20), generator.randint(0, 20)
        question = generator.choice((f"Add {a} and {b}.", f"What is {a} plus {b}?", f"Find the sum of {a} and {b}."))
        return question, "", sentences("The sum", a + b)
    if task == "compare":
        a, b = generator.sample(range(100), 2)
        return f"Which number is larger, {a} or {b}?", "", sentences("The larger number", max(a, b))
    if task == "first":
        words, which = generator.sample(WORDS, 4), generator.choice(("first", "last"))
        answer = words[0] if which == "first" else words[-1]
        return f"Give the {which} word of the list.", ", ".join(words), sentences(f"The {which} word", answer)
    if task == "sort":
        words = generator.sample(WORDS, 3)
        question = generator.choice(("Sort the words alphabetically.", "Put these words into alphabetical order."))
        answer = ", ".join(sorted(words))
        return question, ", ".join(words), [answer, f"Sorted: {answer}", f"Here they are: {answer}"]
    if task == "repeat":
        word, times = generator.choice(WORDS), generator.randint(2, 4)
        question = generator.choice((f"Write the word {word} {times} times.", f"Repeat {word} {times} times."))
        return question, "", [" ".join([word] * times), ", ".join([word] * times)]
    if task == "sound":
        animal, sound = generator.choice(list(ANIMALS.items()))
        wordings = [f"A {animal} {sound}.", f"It {sound}.", f"The {animal} {sound}, as every child knows."]
        return f"What sound does a {animal} make?", "", wordings
    word, color = generator.choice(WORDS), generator.choice(COLORS)
    wordings = [f"The {word} is {color}.", f"There is a {color} {word}.", f"I see a {color} {word}."]
    return "Write a sentence with the two words.", f"{word}, {color}", wordings


def tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer, trained on the tasks. Training takes a second, once.

    Each caller gets its own: a run changes the chat template and the begin token of its tokenizer.
    """
    return copy.deepcopy(_trained_tokenizer())


@functools.cache
def _trained_tokenizer() -> PreTrainedTokenizerBase:
    texts = ((PROMPT_WITH_INPUT if row["input"] else PROMPT).format(**row) + row["output"] for row in rows("train"))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    options = {"special_tokens": ["<end>"], "initial_alphabet": sorted(pre_tokenizers.ByteLevel.alphabet())}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1024, show_progress=False, **options))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<end>")
