"""Generates: `python -m abkd_fast.generate --model DIR --data FILE --out FILE.jsonl`, a model's answers as data."""

from __future__ import annotations

import argparse
import pathlib
import sys

from .cli import failed, interrupted, leave
from .errors import ConfigError


def main(arguments: list[str] | None = None) -> int:
    """Answers the prompts of a data set; returns the exit status.

    0; 2: a mistake in the input; 75 (temporary failure): interrupted, or no room for the answers: the same command
    continues.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    try:
        from . import distributed  # after the options are known to be good: this loads PyTorch
        from .errors import Interrupted
        from .generation.answers import Generation
        from .models.loading import model_spec

        try:
            with distributed.process_group():
                Generation(options, model_spec(options.model)).run()
        except Interrupted as interruption:
            return interrupted(str(interruption), "generate", arguments)
    except KeyboardInterrupt:  # outside of sampling, which handles signals itself: while models load, above all
        return interrupted("interrupted", "generate", arguments)
    except ConfigError as error:
        return failed(error, 2)
    except ConnectionError as error:
        return failed(error, 1)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m abkd_fast.generate",
        description="Answer the prompts of a data set with a model. The result is data to train on, one row a line: "
        "prompt and output (or messages), the number of its row, and whether the answer ended by itself. An "
        "interrupted command goes on where it was when it is given again.",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="folder or Hub name, or a LoRA adapter's folder")
    parser.add_argument("--data", required=True, help="JSONL file, folder, or Hub name; outputs are not read")
    parser.add_argument("--out", required=True, metavar="FILE.jsonl", type=pathlib.Path, help="where answers go")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder or Hub name (default: the model's)")
    parser.add_argument("--rows", metavar="N", type=int, help="use only the first rows")
    parser.add_argument("--max-length", metavar="N", type=int, help="tokens of prompt and answer together")
    parser.add_argument("--max-prompt-length", metavar="N", type=int, help="leave out rows with more tokens of prompt")
    numbers = (
        ("--max-new-tokens", 256, "longer answers are cut"),
        ("--min-new-tokens", 0, "no end before so many"),
        ("--temperature", 1.0, "0: always the most likely token"),
        ("--top-k", 0, "only the so many most likely tokens (0: all)"),
        ("--top-p", 1.0, "only the most likely tokens of this mass in all"),
        ("--no-repeat-ngram-size", 0, "no sequence of so many tokens occurs twice (0: it may)"),
        ("--seed", 10, "an answer depends on it, its row's number and its prompt"),
        ("--batch-size", 64, "answers in progress at a time"),
    )
    for name, default, text in numbers:
        parser.add_argument(name, type=type(default), metavar="N", default=default, help=f"{text} [{default}]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if any [auto]")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float64"),
        default="auto",
        help="auto: bfloat16 on a GPU, else float32 [auto]",
    )
    return parser


if __name__ == "__main__":
    leave(main())
