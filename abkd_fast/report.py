"""Reports: `python -m abkd_fast.report RUN [RUN …]`, tables and figures of finished runs, as the papers have them."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

from .errors import ConfigError


def main(arguments: list[str] | None = None) -> int:
    """Writes tables and figures; returns the exit status: 0, or 2 for a mistake in the input."""
    parser = argparse.ArgumentParser(
        prog="python -m abkd_fast.report",
        description="A table of ROUGE-L (rows losses or methods, columns test sets) in Markdown and CSV; ROUGE-L on "
        "the dev rows over training, a line a run, as PNG and SVG; and in each run's folder report.md with curves of "
        "loss, speed and memory. Needs matplotlib.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", type=pathlib.Path, help="folder of a run, or of a recipe's stages"
    )
    parser.add_argument(
        "--out", metavar="DIR", type=pathlib.Path, help="where tables go [the folder of all these runs]"
    )
    parser.add_argument(
        "--paper",
        metavar="FILE",
        type=pathlib.Path,
        help="published figures to set beside ours: a CSV file as scores.csv, with the columns row, SET mean, SET std",
    )
    options = parser.parse_args(arguments)
    try:
        from .console import console  # after the options are known to be good: this loads PyTorch
        from .evaluation.runs import read_runs
        from .evaluation.tables import gain, score_table, write_report

        runs = read_runs(options.runs)
        out = options.out or pathlib.Path(os.path.commonpath([run.folder.absolute() for run in runs]))
        table = score_table(runs)
        if options.paper and not table:
            raise ConfigError("paper: none of these runs has scores on test sets that it could be set beside")
        if options.paper:
            table = table.beside(options.paper)
        if table:
            console.print(table.table())
        if sentence := gain(runs):
            console.print(sentence, markup=False)
        for path in write_report(runs, out, table):
            console.print(path, markup=False)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
