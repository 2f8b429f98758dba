"""`python -m abkd_fast.generate --model DIR --data FILE --out FILE.jsonl`: a model's responses, as training data."""

import argparse
import pathlib

from .cli import leave, run
from .config.options import add_model_options, add_options, prompt_options
from .config.sampling import OPTIONS, SamplingParams
from .config.schema import RunConfig


def main(arguments: list[str] | None = None) -> int:
    """Answers the prompts of a data set; returns the exit status (see `cli.run`)."""
    return run("generate", _parser(), _generate, arguments)


def _generate(options: argparse.Namespace) -> None:
    sampling, prompts = SamplingParams.from_options(options), prompt_options(options)
    from . import distributed  # not before the options are checked: this loads PyTorch
    from .data.chat import PromptFormat
    from .generation.answers import Generation
    from .models.loading import model_spec

    names = ("rows", "max_prompt_length", "seed", "batch_size", "tokenizer", "chat_template", "device", "dtype")
    others = {name: getattr(options, name) for name in names} | {"style": PromptFormat(**prompts)}
    with distributed.process_group():
        Generation(model_spec(options.model), options.data, options.out, sampling, **others).run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m abkd_fast.generate",
        description="Answer the prompts of a data set with a model. The result is data to train on, one row a line: "
        "prompt and output (or messages), both also in token ids, the number of its row, and whether the response "
        "ended by itself. After an interruption the same command continues.",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="folder or Hub name, or a LoRA adapter's folder")
    parser.add_argument("--data", required=True, help="JSONL file, folder, or Hub name; outputs are not read")
    parser.add_argument("--out", required=True, metavar="FILE.jsonl", type=pathlib.Path, help="where answers go")
    parser.add_argument("--rows", metavar="N", type=int, help="use only the first rows")
    parser.add_argument("--max-prompt-length", metavar="N", type=int, help="leave out rows with more tokens of prompt")
    seed = RunConfig.seed
    text = f"a response depends on it, its row's number and its prompt [{seed}]"
    parser.add_argument("--seed", metavar="N", type=int, default=seed, help=text)
    add_options(parser, SamplingParams, *OPTIONS)
    add_model_options(parser)
    return parser


if __name__ == "__main__":
    leave(main())
