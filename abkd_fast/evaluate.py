"""`python -m abkd_fast.evaluate --model DIR --data dolly=FILE …`: a model's scores by the papers' protocol."""

import argparse
import pathlib

from .cli import given_path, leave, run
from .errors import ConfigError


def main(arguments: list[str] | None = None) -> int:
    """Answers and scores test sets; returns the exit status (see `cli.run`)."""
    return run("evaluate", _parser, _evaluate, arguments)


def _evaluate(options: argparse.Namespace) -> None:
    from .config.options import prompt_options
    from .config.sampling import SamplingParams

    sets, seeds = _sets(options.data), [_seed(text) for text in options.seeds]
    out = options.out or _run_folder(options.model) / "eval"
    sampling, prompts = SamplingParams.from_options(options), prompt_options(options)
    from . import processes  # not before the options are checked: this loads PyTorch
    from .console import console
    from .evaluation.evaluator import Evaluation
    from .evaluation.test_sets import Protocol

    kept = {name: getattr(options, name) for name in ("max_prompt_length", "rouge_tokens")}
    protocol = Protocol(sampling=sampling, **kept, **prompts)
    names = ("rows", "tokenizer", "chat_template", "batch_size", "device", "dtype")
    others = {name: getattr(options, name) for name in names}
    with processes.process_group(values=vars(options)):
        evaluation = Evaluation(options.model, sets, out, seeds, protocol, **others)
        evaluation.run()
    console.print(evaluation.table())
    console.print(f"scores and answers are in {out}")


def _sets(texts: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for text, (name, equals, path) in zip(texts, pairs, strict=True):
        if not (name and equals and path):
            raise ConfigError(f"data: {text}: expected NAME=FILE, for example dolly=data/dolly/valid.jsonl")
    sets = {name: path for name, _, path in pairs}
    if len(sets) < len(pairs):
        raise ConfigError(f"data: {' '.join(texts)}: a name is given twice, expected one for each set")
    return sets


def _seed(text: str) -> int:
    if not text.isdecimal() or len(text) > 10 or int(text) >= 2**32:
        raise ConfigError(f"seeds: {text}: expected a whole number from 0 to {2**32 - 1}")
    return int(text)


def _run_folder(model: str) -> pathlib.Path:
    folder = pathlib.Path(model)
    if folder.name != "final" or not (folder.parent / "config.json").exists():
        raise ConfigError(f"out: missing, and {model} is no run's folder final/, whose eval/ it would be; give --out")
    return folder.parent


def _parser() -> argparse.ArgumentParser:
    from .config.options import add_model_options, add_options
    from .config.sampling import OPTIONS, SamplingParams
    from .config.training import SEEDS, EvalConfig

    parser = argparse.ArgumentParser(
        description="Answer test sets with a model and score the answers: ROUGE-L (F1 with stemming, x 100, the best "
        "of several references) and exact match, mean and standard deviation over seeds. The defaults are the papers' "
        "protocol. After an interruption the same command continues.",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="folder or Hub name, or a LoRA adapter's folder")
    text = "test sets; dolly, self-inst, vicuna, sinst and uinst get the papers' names"
    add("--data", required=True, nargs="+", metavar="NAME=FILE", help=text)
    add("--out", metavar="DIR", type=given_path, help="where scores go (default: RUN/eval of RUN/final)")
    seeds = list(map(str, SEEDS))
    add("--seeds", nargs="+", default=seeds, metavar="N", help=f"seeds of sampling [{' '.join(seeds)}]")
    add("--rows", metavar="N", type=int, help="use only the first rows of each set")
    bos = {"action": "store_const", "const": "true", "dest": "begin_token", "default": "auto"}
    add("--bos", **bos, help="the same as --begin-token true: the papers' Llama prompts had one, here alone")
    text = "longer prompts are cut to their first tokens [256]"
    add("--max-prompt-length", metavar="N", type=int, default=256, help=text)
    names = [name for name in OPTIONS if name not in ("max_length", "min_new_tokens")]
    add_options(parser, EvalConfig, "rouge_tokens")
    add_options(parser, SamplingParams, *names, no_repeat_ngram_size=EvalConfig.no_repeat_ngram_size)
    add_model_options(parser)
    return parser


if __name__ == "__main__":
    leave(main())
