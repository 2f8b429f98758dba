"""Results of runs: tables of ROUGE-L as the papers' Tables 2 and 3, the gain of distillation, and reports."""

import collections
import csv
import dataclasses
import importlib.util
import io
import itertools
import json
import pathlib
import re
import statistics
from collections.abc import Iterator

from rich.table import Column, Table

from ..config.models import weights_in_words
from ..console import format_bytes, styled
from ..errors import ConfigError, disk_errors, printable
from ..files import atomic_write
from . import figures, rouge, samples
from .evaluator import spread, summarize
from .runs import Run, replicates
from .test_sets import NAMES

AVERAGE = "Average"


@dataclasses.dataclass(frozen=True)
class Row:
    """A run, or several that differ in their training seed alone; beside a published row, if it has one."""

    label: str
    runs: list[Run]  # none: there are only published scores
    cells: list[dict | None]  # for each column a mean and a std; None without a score
    paper: str | None = None  # the name of the published row
    published: list[dict | None] | None = None  # its cells; None: nothing is set beside ours

    @property
    def is_student(self) -> bool:
        return bool(self.runs) and not self.runs[0].is_teacher

    @property
    def differences(self) -> list[dict | None]:
        """For each column ours - published, and whether this is more than both standard deviations together."""
        return [_difference(*pair) for pair in zip(self.cells, self.published, strict=True)]


def _difference(ours: dict | None, published: dict | None) -> dict | None:
    if ours is None or published is None:
        return None
    change, spreads = ours["mean"] - published["mean"], (ours["std"], published["std"])
    return {"change": change, "is_beyond": None if None in spreads else abs(change) > sum(spreads)}


@dataclasses.dataclass(frozen=True)
class ScoreTable:
    """ROUGE-L: a column for each test set, and one for the average if there are several sets.

    Without published scores each row is one line. With them it is three: published, ours, and the difference.
    """

    columns: list[str]
    rows: list[Row]
    notes: list[str]  # how the sets were answered, and what makes runs not comparable
    has_published: bool = False

    def table(self) -> Table:
        """The table for the terminal."""
        header = [*([""] if self.has_published else []), *self.columns]
        columns = [Column("ROUGE-L", no_wrap=True), *(Column(name, overflow="fold") for name in header)]
        table = Table(*columns, caption=styled("\n".join(self.notes), ""))
        for names, texts in self._lines():
            if self.has_published and names[0]:
                table.add_section()
            table.add_row(*names, *texts)
        return table

    def markdown(self) -> str:
        """The best run of each column is bold. The teacher is none of them: it is the upper bound."""
        names = [""] * (2 if self.has_published else 1)
        lines = [[*names, *self.columns], ["---" for _ in names] + ["---:" for _ in self.columns]]
        lines += [[*names, *texts] for names, texts in self._lines(bold="**")]
        rows = [" | ".join(map(in_markdown, line)) for line in lines]
        return "".join([*(f"| {row} |\n" for row in rows), *(f"\n{in_markdown(note)}\n" for note in self.notes)])

    def _lines(self, bold: str = "") -> Iterator[tuple[list[str], list[str]]]:
        """The lines of text: their names, and a text for each column. `bold` is around the best."""
        columns = zip(*(row.cells for row in self.rows if row.is_student), strict=True)
        best = [max((cell["mean"] for cell in column if cell), default=None) for column in columns]
        digits, last = (2 if self.has_published else 1), None  # as many as are published
        for row in self.rows:
            if row.paper not in (None, last):
                yield [row.paper, "paper"], [spread(cell, digits) for cell in row.published]
            if row.runs:
                pairs = zip(row.cells, best if row.is_student else [None] * len(row.cells), strict=True)
                marks = [(spread(cell, digits), bold if cell and cell["mean"] == top else "") for cell, top in pairs]
                yield self._names(row), [f"{mark}{text}{mark}" for text, mark in marks]
            if row.runs and row.paper is not None:
                yield ["", "ours - paper"], [_signed(difference) for difference in row.differences]
            last = row.paper

    def _names(self, row: Row) -> list[str]:
        """What our line of a row begins with."""
        if not self.has_published:
            return [row.label]
        if row.paper is None:
            return [row.label, "ours"]
        return ["", "ours" if row.label == row.paper else f"ours: {row.label}"]

    def csv(self) -> str:
        """One line for each of our rows, and for each published one that has none of ours."""
        parts = ["mean", "std", *(["paper", "paper std", "difference", "beyond"] if self.has_published else [])]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        first = ["row", "run", *(["paper"] if self.has_published else [])]
        writer.writerow([*first, *(f"{name} {part}" for name in self.columns for part in parts)])
        for row in self.rows:
            first = [row.label, "; ".join(str(run.folder) for run in row.runs)]
            numbers = [_numbers(cell, ("mean", "std")) for cell in row.cells]
            if self.has_published:
                first.append(row.paper)
                numbers = [
                    [*own, *_numbers(cell, ("mean", "std")), *_numbers(change, ("change", "is_beyond"))]
                    for own, cell, change in zip(numbers, row.published, row.differences, strict=True)
                ]
            writer.writerow([*first, *itertools.chain(*numbers)])
        return text.getvalue()


def in_markdown(text: str) -> str:
    """A text that may have names of the user. They neither end a cell nor begin HTML."""
    return re.sub(r"[|<]", r"\\\g<0>", printable(text))


def _signed(difference: dict | None) -> str:
    return f"{difference['change']:+.2f}{'*' if difference['is_beyond'] else ''}" if difference else ""


def _numbers(values: dict | None, keys: tuple[str, ...]) -> list[float | None]:
    return [values[key] if values else None for key in keys]


def score_table(runs: list[Run]) -> ScoreTable | None:
    """The scores of the runs that have some; None if no run has. Sets are in the papers' order, then by name."""
    scored = [run for run in runs if run.sets]
    order = list(dict.fromkeys(NAMES.values()))
    sets = {column: name for run in scored for column, name in zip(run.columns, run.sets, strict=True)}
    places = {column: order.index(name) if name in order else len(order) for column, name in sets.items()}
    names = sorted(places, key=lambda column: (places[column], column))
    rows = []
    for group in _answered_alike(replicates(scored)):
        cells = [_over_seeds(group, column) for column in zip(*(_cells(run, names) for run in group), strict=True)]
        rows.append(Row(group[0].label, group, cells))
    units = {run.settings["rouge_tokens"] for run in scored}
    average = rouge.named(AVERAGE, *units) if len(units) == 1 else AVERAGE  # of different units there is none
    columns = [*names, *([average] if len(names) > 1 else [])]
    return ScoreTable(columns, rows, [*_notes(scored, names), *_note_seeds(rows, columns)]) if rows else None


def _answered_alike(groups: list[list[Run]]) -> Iterator[list[Run]]:
    """The groups; single runs of one whose runs answered in different ways or other rows, which have no mean."""
    for group in groups:
        settings = {json.dumps(run.settings, sort_keys=True) for run in group}
        contents = {(name, scores["content"]) for run in group for name, scores in run.columns.items()}
        is_alike = len(settings) == 1 and len({name for name, _ in contents}) == len(contents)
        yield from [group] if is_alike else [[run] for run in group]


def _cells(run: Run, names: list[str]) -> list[dict | None]:
    """A run's scores of these sets, and last their average if there are several."""
    cells = [run.columns[name]["rouge_l"] if name in run.columns else None for name in names]
    cells = [None if cell is None or cell["mean"] is None else cell for cell in cells]
    return [*cells, _average(cells)] if len(names) > 1 else cells


def _over_seeds(group: list[Run], cells: tuple[dict | None, ...]) -> dict | None:
    """One run's score as it is; of several runs the mean and the spread over their training seeds."""
    if len(group) == 1:
        return cells[0]
    means = {str(run.seed): cell["mean"] for run, cell in zip(group, cells, strict=True) if cell}
    return summarize(means) if means else None


def _note_seeds(rows: list[Row], columns: list[str]) -> Iterator[str]:
    """Says which rows are of several training seeds, and for which sets some of these have no score."""
    found = collections.defaultdict(list)
    for row in rows:
        if len(row.runs) > 1:
            counts = {name: len(cell["seeds"]) if cell else 0 for name, cell in zip(columns, row.cells, strict=True)}
            fewer = [f"{count} on {name}" for name, count in counts.items() if count < len(row.runs)]
            found[f"{len(row.runs)} training seeds" + (f" ({', '.join(fewer)})" if fewer else "")].append(row.label)
    for seeds, labels in found.items():
        yield f"{', '.join(labels)}: {seeds}; the spread is over them."
    if found and any(len(row.runs) == 1 for row in rows):
        yield "Every other row of ours: one training seed; the spread is over the seeds of the answers."


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
    scores = {run.folder: row.cells[-1] for row in table.rows for run in row.runs} if table else {}
    scored = [run for run in runs if scores.get(run.folder)]
    for student in scored:
        teacher = next((run for run in scored if student.learns_from(run)), None)
        if teacher and len(student.teachers) == 1:  # there is no way to several, of which to have a share
            rows = (student.label, teacher.label)  # no other seed of these is the one without teacher
            plain = [run for run in scored if run.config["method"] == "sft" and run.label not in rows]
            alone = next((run for run in plain if run.start == student.start and student.start[0] is not None), None)
            if alone:
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
    with disk_errors(f"{out}: the report"):
        out.mkdir(parents=True, exist_ok=True)
        paths = []
        if table := table or score_table(runs):
            sentence = gain(runs)
            atomic_write(out / "scores.md", table.markdown() + (f"\n{in_markdown(sentence)}\n" if sentence else ""))
            atomic_write(out / "scores.csv", table.csv())
            paths += [out / "scores.md", out / "scores.csv"]
        if importlib.util.find_spec("matplotlib") is None:
            raise ConfigError("matplotlib is not installed: pip install matplotlib")
        paths += figures.rouge_curves(runs, out / "rouge_l")
        for run in runs:
            figures.run_curves(run, run.folder / "curves")
            atomic_write(run.folder / "report.md", _report(run))
            paths.append(run.folder / "report.md")
    return paths


def _report(run: Run) -> str:
    """One run in Markdown: settings, results, curves and samples."""
    config, summary = run.config, run.summary
    models = {
        role: (model.get("hidden_states") or model.get("top_k") or weights_in_words(model))
        + (f" with {model['adapter']}" if model["adapter"] else "")
        for role, model in {"student": config["student"], **run.teachers}.items()
    }
    facts = {
        "method": config["method"] + (f", loss {config['loss']}" if run.teachers else ""),
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
    lines += ["![loss, speed and memory](curves.png)", ""]
    return "\n".join([*lines, *(f"{part}\n" for part in samples.report(samples.read_samples(run.folder)))])


def _change(before: float | None, after: float | None, digits: int) -> str:
    return "" if after is None else f"{before:.{digits}f} before, {after:.{digits}f} in the end"
