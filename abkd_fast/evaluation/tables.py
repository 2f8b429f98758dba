"""Results of runs: tables of ROUGE-L as the papers' Tables 2 and 3, the gain of distillation, and reports."""

import collections
import csv
import dataclasses
import importlib.util
import io
import pathlib
import statistics
from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..console import format_bytes
from ..errors import ConfigError
from ..files import atomic_write
from . import figures, rouge
from .evaluator import spread, summarize
from .runs import Run
from .test_sets import NAMES

# A label, its run (None: published scores), and cells with mean and std (None: a set without a score).
TableRow = tuple[str, Run | None, list[dict | None]]


@dataclasses.dataclass(frozen=True)
class ScoreTable:
    """ROUGE-L: one row a run, one column a test set, and an average column if there are several sets."""

    columns: list[str]
    rows: list[TableRow]
    notes: list[str]  # how the sets were answered, and what makes runs not comparable

    def beside(self, path: pathlib.Path) -> "ScoreTable":
        """Returns this table with published scores, from a CSV file, added. Raises ConfigError for a bad file."""
        return dataclasses.replace(self, rows=self.rows + _read_published(path, self.columns))

    def table(self) -> Table:
        """The table for the terminal."""
        table = Table("ROUGE-L", *map(escape, self.columns), caption=Text("\n".join(self.notes)))
        for label, _, cells in self.rows:
            table.add_row(escape(label), *map(spread, cells))
        return table

    def markdown(self) -> str:
        """The best run of each column is bold. The teacher is none of them: it is the upper bound."""
        students = [cells for _, run, cells in self.rows if run and not run.is_teacher]
        columns = [[cells[column] for cells in students] for column in range(len(self.columns))]
        best = [max((cell["mean"] for cell in column if cell), default=None) for column in columns]
        lines = [["", *self.columns], ["---", *["---:"] * len(self.columns)]]
        for label, run, cells in self.rows:
            pairs = zip(cells, best if run and not run.is_teacher else [None] * len(best), strict=True)
            texts = [f"**{spread(cell)}**" if cell and cell["mean"] == top else spread(cell) for cell, top in pairs]
            lines.append([label, *texts])
        return "".join([*(f"| {' | '.join(line)} |\n" for line in lines), *(f"\n{note}\n" for note in self.notes)])

    def csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["row", "run", *(f"{name} {what}" for name in self.columns for what in ("mean", "std"))])
        for label, run, cells in self.rows:
            numbers = [value for cell in cells for value in ((cell["mean"], cell["std"]) if cell else (None, None))]
            writer.writerow([label, run and run.folder, *numbers])
        return text.getvalue()


def _read_published(path: pathlib.Path, columns: list[str]) -> list[TableRow]:
    """The rows of a CSV file like `scores.csv`: "row", and for some of the columns "SET mean" and "SET std"."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            known = [name for name in columns if f"{name} mean" in (table.fieldnames or ())]
            if "row" not in (table.fieldnames or ()) or not known:
                expected = ", ".join(f'"{name} mean"' for name in columns)
                raise ValueError(f'expected a first line with "row" and some of {expected}')
            rows = {}
            for row in table:
                label = f"{row['row']} ({path.stem})"
                if label in rows:
                    raise ValueError(f"line {table.line_num}: a second {row['row']}")
                try:
                    rows[label] = label, None, [_read_cell(row, name) for name in columns]
                except ValueError as error:
                    raise ValueError(f"line {table.line_num}: {error}") from None
            return [*rows.values()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"paper: {path} can't be read ({error})") from None


def _read_cell(row: dict[str, str], column: str) -> dict | None:
    mean, std = (row.get(f"{column} {what}") or None for what in ("mean", "std"))
    return None if mean is None else {"mean": float(mean), "std": std and float(std)}


def score_table(runs: list[Run]) -> ScoreTable | None:
    """The scores of the runs that have some; None if no run has. Sets are in the papers' order, then by name."""
    scored = [run for run in runs if run.sets]
    order = list(dict.fromkeys(NAMES.values()))
    sets = {column: name for run in scored for column, name in zip(run.columns, run.sets, strict=True)}
    places = {column: order.index(name) if name in order else len(order) for column, name in sets.items()}
    names = sorted(places, key=lambda column: (places[column], column))
    rows = []
    for run in scored:
        cells = [run.columns[name]["rouge_l"] if name in run.columns else None for name in names]
        cells = [None if cell is None or cell["mean"] is None else cell for cell in cells]
        rows.append((run.label, run, [*cells, _average(cells)] if len(names) > 1 else cells))
    units = {run.settings["rouge_tokens"] for run in scored}
    average = rouge.named("Average", *units) if len(units) == 1 else "Average"  # of different units there is none
    columns = [*names, *([average] if len(names) > 1 else [])]
    return ScoreTable(columns, rows, [*_notes(scored, names)]) if rows else None


def _notes(runs: list[Run], names: list[str]) -> Iterator[str]:
    """Says how the sets were answered, and in which of these settings the runs differ."""
    found = collections.defaultdict(set)
    for run in runs:
        for key, value in run.settings.items():
            found[key].add(value)
        for name, scores in run.columns.items():
            found[f"rows of {name}"].add(scores["content"])
            found[f"seeds of {name}"].add(", ".join(scores["rouge_l"]["seeds"]))
    differing = [key for key, values in found.items() if len(values) > 1]
    hidden = {"rouge_tokens", *differing}  # the names of columns tell the former
    shared = {key: value for key, value in runs[0].settings.items() if key not in hidden and value is not None}
    settings = ", ".join(f"{key} {value}" for key, value in shared.items())
    first = {name: next(run.columns[name] for run in runs if name in run.columns) for name in names}
    seeds = {name: ", ".join(scores["rouge_l"]["seeds"]) for name, scores in first.items()}
    sets = "; ".join(f"{first[name]['rows']} rows of {name} with seeds {seeds[name]}" for name in names)
    yield f"Answers: {settings}; {sets}."
    if differing:
        yield f"Not comparable: the runs differ in {', '.join(differing)}."


def _average(cells: list[dict | None]) -> dict | None:
    """The average over sets, seed by seed. None unless all sets were scored with the same seeds."""
    seeds = [cell["seeds"] for cell in cells if cell is not None]
    if len(seeds) < len(cells) or any(other.keys() != seeds[0].keys() for other in seeds):
        return None
    return summarize({seed: statistics.fmean(values[seed] for values in seeds) for seed in seeds[0]})


def gain(runs: list[Run]) -> str | None:
    """One sentence on the gain of distillation: a distilled student against the same one fine-tuned without teacher.

    None unless two such runs and their teacher were scored on the same sets.
    """
    table = score_table(runs)
    scores = {run.folder: cells[-1] for _, run, cells in table.rows} if table else {}
    scored = [run for run in runs if scores.get(run.folder)]
    for student in scored:
        teacher = next((run for run in scored if student.learns_from(run)), None)
        plain = [run for run in scored if run.config["method"] == "sft" and run not in (student, teacher)]
        alone = next((run for run in plain if run.start == student.start and student.start[0] is not None), None)
        if teacher and alone:
            return _compare(student, alone, teacher, scores, table.columns[-1])
    return None


def _compare(student: Run, alone: Run, teacher: Run, scores: dict[pathlib.Path, dict], name: str) -> str:
    ours, theirs, highest = (scores[run.folder] for run in (student, alone, teacher))
    difference = ours["mean"] - theirs["mean"]
    spreads = [cell["std"] or 0.0 for cell in (ours, theirs)]
    reach = "more than" if abs(difference) > max(spreads) else "no more than"
    gap = highest["mean"] - theirs["mean"]
    share = f", {difference / gap:.0%} of the way to the teacher" if gap > 0 and difference > 0 else ""
    change = f"gains {difference:+.1f}" if difference >= 0 else f"loses {-difference:.1f}"
    return (
        f"{name}: {student.label} {spread(ours)} ROUGE-L, {alone.label} from the same start {spread(theirs)}, teacher "
        f"{spread(highest)}: distillation {change}{share}, {reach} the spread over seeds."
    )


def write_report(runs: list[Run], out: pathlib.Path, table: ScoreTable | None = None) -> list[pathlib.Path]:
    """Writes the table and Figure 1 into `out`, and `report.md` with curves into each run's folder. Returns the paths.

    table: the runs' table, if it is known already. Raises ConfigError if matplotlib is not installed (the table is
    written before), and if a folder can't be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        paths = []
        if table := table or score_table(runs):
            sentence = gain(runs)
            atomic_write(out / "scores.md", table.markdown() + (f"\n{sentence}\n" if sentence else ""))
            atomic_write(out / "scores.csv", table.csv())
            paths += [out / "scores.md", out / "scores.csv"]
        if importlib.util.find_spec("matplotlib") is None:
            raise ConfigError("matplotlib is not installed: pip install matplotlib")
        paths += figures.rouge_curves(runs, out / "rouge_l")
        for run in runs:
            figures.run_curves(run, run.folder / "curves")
            atomic_write(run.folder / "report.md", _report(run))
            paths.append(run.folder / "report.md")
    except OSError as error:
        raise ConfigError(f"the report can't be written ({error})") from None
    return paths


def _report(run: Run) -> str:
    """One run in Markdown: settings, results and curves."""
    config, summary = run.config, run.summary
    models = {role: config[role]["path"] or "random weights" for role in ("student", "teacher") if config[role]}
    facts = {
        "method": config["method"] + ("" if config["teacher"] is None else f", loss {config['loss']}"),
        **models,
        "steps": f"{summary['steps']} of {config['train']['batch_size']} samples; final/ is of step "
        f"{summary['selected_step']}",
        "dev loss": _change(summary["dev_loss_before"], summary["dev_loss"], 4),
        f"dev {run.dev_rouge}": _change(summary["dev_rouge_l_before"], summary["dev_rouge_l"], 2),
        "seconds a sample": f"{summary['seconds_per_sample']:.4f}",
        "peak memory": format_bytes(summary["peak_memory_bytes"]),
    }
    lines = [f"# {run.folder.name}", "", *(f"- {name}: {text}" for name, text in facts.items() if text), ""]
    if table := score_table([run]):
        lines += ["ROUGE-L on test sets, mean (standard deviation) over seeds:", "", table.markdown()]
    return "\n".join([*lines, "![loss, speed and memory](curves.png)", ""])


def _change(before: float | None, after: float | None, digits: int) -> str:
    return "" if after is None else f"{before:.{digits}f} before, {after:.{digits}f} in the end"
