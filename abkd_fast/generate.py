"""Generates: `python -m abkd_fast.generate --model DIR --data FILE --out FILE.jsonl`, a model's answers as data."""

from __future__ import annotations

import argparse
import pathlib
import shlex
import sys

from .config import ConfigError
from .train import INTERRUPTED


def main(arguments: list[str] | None = None) -> int:
    """Answers the prompts of a data set; returns the exit status.

    0; 2: a mistake in the input; 75 (temporary failure): interrupted, or no room for the answers: the same command
    continues.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    try:
        from .answers import Generation  # after the options are known to be good: this loads PyTorch
        from .checkpoint import Interrupted

        try:
            Generation(options).run()
        except Interrupted as interruption:
            command = shlex.join([sys.executable, "-m", "abkd_fast.generate", *arguments])
            print(f"{interruption}; continue with:\n{command}", file=sys.stderr)
            return INTERRUPTED
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m abkd_fast.generate",
        description="Answer the prompts of a data set with a model. The result is data to train on, one row a line: "
        "prompt and output (or messages), the number of its row, and whether the answer ended by itself. An "
        "interrupted command goes on where it was when it is given again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="folder or Hub name")
    parser.add_argument("--data", required=True, help="JSONL file, folder, or Hub name; outputs are not read")
    parser.add_argument("--out", required=True, metavar="FILE.jsonl", type=pathlib.Path, help="where answers go")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder or Hub name (None: the model's)")
    parser.add_argument("--rows", type=int, help="use only the first rows (None: all)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longer answers are cut")
    parser.add_argument("--min-new-tokens", type=int, default=0, help="no end before so many")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the most likely token")
    parser.add_argument("--top-k", type=int, default=0, help="only the K most likely tokens (0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="only the most likely tokens of this mass in all")
    parser.add_argument("--no-repeat-ngram-size", type=int, default=0, help="no N tokens occur twice (0: they may)")
    parser.add_argument("--seed", type=int, default=10, help="an answer depends on it, its row's number and its prompt")
    parser.add_argument("--batch-size", type=int, default=64, help="answers in progress at a time")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if any")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float64"),
        default="auto",
        help="auto: bfloat16 on a GPU, else float32",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
