"""`python -m abkd_fast.report RUN [RUN …]`: the papers' tables and figures, of finished runs."""

import argparse
import os
import pathlib

from .cli import given_path, leave, run
from .errors import ConfigError


def main(arguments: list[str] | None = None) -> int:
    """Writes tables and figures; returns the exit status: 0, or 2 for a mistake in the input."""
    return run("report", _parser, _report, arguments)


def _report(options: argparse.Namespace) -> None:
    from .console import console  # not before the options are checked: this loads PyTorch
    from .evaluation import published
    from .evaluation.runs import read_runs
    from .evaluation.tables import gain, score_table, write_report
    from .files import check_path_length

    paper = options.paper and published.find(options.paper)
    if options.out:
        check_path_length("out", options.out, is_written=True)
    runs = read_runs(options.runs)
    out = options.out or pathlib.Path(os.path.commonpath([run.folder.absolute() for run in runs]))
    table = score_table(runs)
    if paper and not table:
        raise ConfigError("paper: none of these runs has scores on test sets that it could be set beside")
    if paper:
        table = published.beside(table, published.read(paper, table.columns))
    if table:
        console.print(table.table())
    if sentence := gain(runs):
        console.print(sentence)
    for path in write_report(runs, out, table):
        console.print(f"{path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Report finished runs. A table of ROUGE-L (a row for each loss or method, a column for each test "
        "set) in Markdown and CSV. A figure of ROUGE-L on dev rows over training, in PNG and SVG. In each run's "
        "folder: report.md with curves of loss, speed and memory. Needs matplotlib.",
    )
    add = parser.add_argument
    add("runs", nargs="+", type=given_path, metavar="RUN", help="folder of a run, or of a recipe's stages")
    add("--out", type=given_path, metavar="DIR", help="where tables go [the folder of all these runs]")
    text = "published scores to show beside ours: table2 or table3 of the ABKD paper, or a CSV file like scores.csv, "
    add("--paper", metavar="TABLE", help=text + "with columns row, SET mean, SET std")
    return parser


if __name__ == "__main__":
    leave(main())
