"""`python -m abkd_fast.generate --model DIR --data FILE --out FILE.jsonl`: a model's responses, as training data."""

import argparse
import sys

from .cli import given_path, leave, run
from .errors import ConfigError, printable
from .output import check_printed


def main(arguments: list[str] | None = None) -> int:
    """Answers the prompts of a data set; returns the exit status (see `cli.run`)."""
    return run("generate", _parser, _generate, arguments)


def _generate(options: argparse.Namespace) -> None:
    from .config.options import prompt_options
    from .config.sampling import SamplingParams

    _check_source(options)
    sampling, prompts = SamplingParams.from_options(options), prompt_options(options)
    from . import processes  # not before the options are checked: this loads PyTorch
    from .data.chat import PromptFormat
    from .generation.answers import Generation
    from .generation.prompts import answer
    from .models.loading import model_spec

    if options.prompt:
        names = ("seed", "batch_size", "tokenizer", "chat_template", "device", "dtype")
        others = {name: getattr(options, name) for name in names} | {"style": PromptFormat(**prompts)}
        for text in answer(model_spec(options.model), options.prompt, options.chat, sampling, **others):
            print(printable(text, "\n\t") if sys.stdout.isatty() else text)
        check_printed()
        return
    names = ("rows", "max_prompt_length", "seed", "batch_size", "tokenizer", "chat_template", "device", "dtype")
    others = {name: getattr(options, name) for name in names} | {"style": PromptFormat(**prompts)}
    with processes.process_group(values=vars(options)):
        Generation(model_spec(options.model), options.data, options.out, sampling, **others).run()


def _check_source(options: argparse.Namespace) -> None:
    """Raises ConfigError unless there is either a data set and a file for the answers, or prompts."""
    if options.prompt and (options.data or options.out or options.rows or options.max_prompt_length):
        raise ConfigError("--prompt prints its answer: leave out --data, --out, --rows and --max-prompt-length")
    if not options.prompt and not (options.data and options.out):
        raise ConfigError("give --data and --out, or --prompt")
    if options.chat and not options.prompt:
        raise ConfigError("--chat is for --prompt; rows of messages are always rendered by the chat template")


def _parser() -> argparse.ArgumentParser:
    from .config.options import add_model_options, add_options
    from .config.sampling import OPTIONS, SamplingParams
    from .config.schema import RunConfig

    parser = argparse.ArgumentParser(
        description="Answer the prompts of a data set with a model. The result is data to train on, one row a line: "
        "prompt and output (or messages), both also in token ids, the number of its row, and whether the response "
        "ended by itself. After an interruption the same command continues. With --prompt the answer is printed.",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="folder or Hub name, or a LoRA adapter's folder")
    parser.add_argument("--data", help="JSONL file, folder, or Hub name; outputs are not read")
    parser.add_argument("--out", metavar="FILE.jsonl", type=given_path, help="where answers go")
    parser.add_argument(
        "--prompt", metavar="TEXT", action="append", help="a prompt whose answer is printed; may repeat"
    )
    parser.add_argument("--chat", action="store_true", help="--prompt is a user's message, for the chat template")
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
