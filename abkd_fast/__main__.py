"""All commands under one name: `abkd-fast COMMAND …`, or `python -m abkd_fast COMMAND …`."""

import importlib
import sys

from . import __version__
from .cli import leave
from .errors import nearest, printable
from .output import forgiving

COMMANDS = {
    "train": "distill or fine-tune a model, by a recipe",
    "cache": "compute a teacher's hidden states, here or on another machine",
    "generate": "answer prompts with a model",
    "evaluate": "score a model on test sets",
    "report": "tables and figures of runs",
    "push": "upload a run's result, with a model card, to the Hugging Face Hub",
    "info": "how the kernels were built, and for which devices",
}
USAGE = "\n".join(
    ["usage: abkd-fast COMMAND [arguments]   (abkd-fast COMMAND --help explains them)", ""]
    + [f"  {name:<10}{text}" for name, text in COMMANDS.items()]
    + ["", "abkd-fast --version prints the version."]
)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit status. 2 for an unknown one."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name in COMMANDS:
        return importlib.import_module(f"abkd_fast.{name}").main(rest)
    with forgiving():
        if name in ("--version", "--help", "-h"):
            print(__version__ if name == "--version" else USAGE)
            return 0
        problem = f"error: no command {printable(name)}{nearest(name, COMMANDS)}" if name else USAGE
        print(problem, file=sys.stderr)
        return 2


def script() -> None:
    """What the installed command does."""
    leave(main())


if __name__ == "__main__":
    script()
