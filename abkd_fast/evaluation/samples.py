"""Answers to a few dev prompts over the training: the file in a run's folder, and the section of its report."""

import pathlib
import re
from collections.abc import Iterator

from ..errors import printable
from .points import parse_line

FILE = "samples.jsonl"
SAMPLE = {"row": str, "prompt": str, "response": str, "output": list}
SHOWN = 6  # evaluations in a report: the first, the last, and some between


def read_samples(folder: pathlib.Path) -> list[dict]:
    """The lines of a run's file; without those that a full disk cut off. Empty where there is no file.

    Each has step, row, prompt, output (references) and response. Raises OSError.
    """
    path, found = folder / FILE, []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        sample = parse_line(line, SAMPLE)
        if sample is not None and all(isinstance(text, str) for text in sample["output"]):
            found.append(sample)
    return found


def fenced(text: str) -> str:
    """A text of anybody as a block of Markdown, in which nothing is markup and no character is invisible."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    lines = "\n".join(map(printable, text.split("\n")))
    return f"{fence}text\n{lines}\n{fence}"


def report(samples: list[dict]) -> Iterator[str]:
    """The paragraphs of a report: each prompt, what it is compared with, and the answers over the training."""
    steps = sorted({sample["step"] for sample in samples})
    if not steps:
        return
    shown = {steps[round(place * (len(steps) - 1) / (SHOWN - 1))] for place in range(SHOWN)}
    some = f"{len(shown)} of {len(steps)} evaluations are here, all in `{FILE}`" if len(shown) < len(steps) else ""
    yield "## Answers over training"
    yield f"Sampled with the same random numbers at each evaluation; control characters are escaped. {some}".rstrip()
    rows = list(dict.fromkeys(sample["row"] for sample in samples))
    for number, row in enumerate(rows, 1):
        own = [sample for sample in samples if sample["row"] == row]
        yield f"### Prompt {number}"
        yield fenced(own[0]["prompt"])
        for reference in own[0]["output"]:
            yield f"Reference:\n\n{fenced(reference)}"
        for sample in own:
            if sample["step"] in shown:
                yield f"Step {sample['step']}:\n\n{fenced(sample['response'])}"
