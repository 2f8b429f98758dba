"""`python -m abkd_fast.push RUN NAME`: uploads a run's result, with a model card, to the Hugging Face Hub."""

import argparse
import pathlib

from .cli import given_path, leave, run


def main(arguments: list[str] | None = None) -> int:
    """Pushes a result; returns the exit status (see `cli.run`): 75 if an upload has failed, which may be repeated."""
    return run("push", _parser, _push, arguments)


def _push(options: argparse.Namespace) -> None:
    from .config.schema import check_repository

    check_repository("NAME", options.name)
    from . import hub  # not before the name is checked: this loads PyTorch
    from .console import console, format_bytes

    found = hub.find_run(options.run, options.stage)
    if not options.dry_run:
        hub.push(*found, options.name, options.private)
        return
    for name, content in hub.contents(*found, options.name).items():
        size = content.stat().st_size if isinstance(content, pathlib.Path) else len(content)
        console.print(f"{format_bytes(size):>10}  {name}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Upload the model in a run's folder final/ to the Hugging Face Hub, with a model card: models, "
        "method, data, scores, how to load it, and the recipe. What is there already is replaced file by file.",
    )
    add = parser.add_argument
    add("run", type=given_path, metavar="RUN", help="folder of a finished run, or of a recipe's stages")
    add("name", metavar="NAME", help="repository, USER/NAME; it is made if it is missing")
    add("--stage", metavar="STAGE", help="the stage whose result is meant, if RUN has several")
    add("--private", action="store_true", help="make a private repository; one that is public already is refused")
    add("--dry-run", action="store_true", help="write the card into final/, list the files, and upload nothing")
    return parser


if __name__ == "__main__":
    leave(main())
