"""Published scores beside ours: the ABKD paper's Tables 2 and 3, or a CSV file."""

import contextlib
import csv
import dataclasses
import math
import pathlib
from collections.abc import Iterator

from ..errors import ConfigError, nearest
from .tables import AVERAGE, Row, ScoreTable

PAPER = pathlib.Path(__file__).with_name("paper")
TABLES = ("table2", "table3")
OURS = {"jensen's kl": "jsd"}  # names that differ in more than case


@dataclasses.dataclass(frozen=True)
class Published:
    """Published scores: the columns, and for each named row their mean and std (None: no score)."""

    name: str
    columns: list[str]
    rows: dict[str, dict[str, dict | None]]


def find(name: str) -> pathlib.Path:
    """The CSV file of one of the paper's tables, or of this path. Raises ConfigError if there is none."""
    if name in TABLES:
        return PAPER / f"{name}.csv"
    if name == "table1":
        problem = "table1 has seconds a sample, not ROUGE-L"
        raise ConfigError(f"paper: {problem}: benchmarks/timing.py sets it beside ours; here take table2 or table3")
    if not pathlib.Path(name).exists():
        raise ConfigError(f"paper: {name}: no such file, and no table of the paper{nearest(name, TABLES)}")
    return pathlib.Path(name)


def read(path: pathlib.Path, expected: list[str]) -> Published:
    """Reads a CSV file like `scores.csv`: a column "row", and for each set "SET mean" and perhaps "SET std".

    expected: names of sets, for the message. Raises ConfigError for a bad file.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            fields = table.fieldnames = [name.strip() for name in table.fieldnames or ()]
            columns = [name.removesuffix(" mean") for name in fields if name.endswith(" mean")]
            if "row" not in fields or not columns:
                means = ", ".join(f'"{name} mean"' for name in expected)
                found = f"separated by commas; got {', '.join(fields) or 'nothing'}"
                raise ValueError(f'expected a first line with "row" and some of {means}, {found}')
            if len({*fields}) < len(fields):
                raise ValueError("its first line names a column twice")
            rows, seen = {}, set()
            for row in table:
                label = (row["row"] or "").strip()
                if not label or (ours := _ours(label)) in seen:
                    raise ValueError(f"line {table.line_num}: " + (f"a second {label}" if label else "has no name"))
                seen.add(ours)
                try:
                    rows[label] = {name: _cell(row, name) for name in columns}
                except ValueError as error:
                    raise ValueError(f"line {table.line_num}: {error}") from None
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"paper: {path} can't be read ({error})") from None
    name = f"Table {path.stem[-1]} of the ABKD paper" if path.parent == PAPER else path.name
    # The table of another report may have rows and columns that only its paper had: they have no score here.
    scored = [column for column in columns if any(cells[column] for cells in rows.values())]
    return Published(name, scored, {label: cells for label, cells in rows.items() if any(cells.values())})


def _cell(row: dict[str, str], name: str) -> dict | None:
    mean, std = (_number(row.get(f"{name} {part}"), f"{name} {part}") for part in ("mean", "std"))
    if std is not None and std < 0:
        raise ValueError(f"{name} std is {std:g}, expected 0 or more")
    return None if mean is None else {"mean": mean, "std": std}


def _number(text: str | None, column: str) -> float | None:
    """The number of a cell; None for an empty one, or a dash. Raises ValueError."""
    text = (text or "").strip()
    if text in ("", "-"):
        return None
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(text)):
            return number
    raise ValueError(f'{column} is "{text}", expected a number, or nothing')


def beside(table: ScoreTable, published: Published) -> ScoreTable:
    """Our table in the order of the published one: its rows and sets first, then ours that it lacks.

    Raises ConfigError if no set is in both.
    """
    average = [name for name in table.columns if _is_average(name)]
    ours = [name for name in table.columns if name not in average]
    sets = [name for name in published.columns if not _is_average(name)]
    if not {*sets} & {*ours}:
        names = f"{', '.join(sets) or 'no scores'}, and these runs answered {', '.join(ours)}"
        raise ConfigError(f"paper: no set is in both: {published.name} has {names}; answer one, or leave --paper out")
    columns = [*sets, *(name for name in ours if name not in sets), *average]
    kept = {*columns} if {*sets} == {*ours} else {*sets}  # averages over other sets are not comparable

    def place(cells: dict[str, dict | None]) -> list[dict | None]:
        return [cells.get(name) for name in columns]

    named = [(row, dict(zip(table.columns, row.cells, strict=True))) for row in table.rows]
    rows = [dataclasses.replace(row, cells=place(cells), published=place({})) for row, cells in named]
    paired = []
    for name, cells in published.rows.items():
        theirs = place({column: cell for column, cell in cells.items() if column in kept})
        matching = [row for row in rows if is_named(name, row.label, row.runs[0].title)] or [Row(name, [], place({}))]
        paired += [dataclasses.replace(row, paper=name, published=theirs) for row in matching]
    alone = [row for row in rows if row.runs not in [other.runs for other in paired]]
    notes = [*table.notes, *_notes(published, paired, [name for name in sets if name not in ours])]
    if any(_is_average(name) and name not in kept for name in published.columns):
        notes.append(f"The average of {published.name} is over other sets, and is left out.")
    return ScoreTable(columns, [*paired, *alone], notes, has_published=True)


def _is_average(name: str) -> bool:
    return name == AVERAGE or name.startswith(f"{AVERAGE} (")


def is_named(name: str, *ours: str) -> bool:
    """Whether a published name means one of ours: a label, or a method or loss alone."""
    return _ours(name) in map(str.casefold, ours)


def _ours(name: str) -> str:
    """Our name for a published one, without capitals."""
    name = name.strip().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").casefold()
    return OURS.get(name, name)


def _notes(published: Published, rows: list[Row], missing: list[str]) -> Iterator[str]:
    yield (
        f"paper: {published.name}; its models and data may be others. A difference with * is beyond both spreads: it "
        "is larger than the two standard deviations together (of the paper's tables: over seeds of the answers)."
    )
    if missing:
        yield f"{', '.join(missing)}: none of these runs answered them."
    if lacking := [row.label for row in rows if not row.runs]:
        yield f"{', '.join(lacking)}: none of these runs is one."
