"""Rows of instruction data, read and checked."""

import collections
import dataclasses
import os
from collections.abc import Collection, Iterable, Iterator, Mapping

from ..errors import ConfigError
from . import formats, indexed_dataset, sources
from .row_teachers import RowTeachers, TeacherNames
from .text_files import RawRow

# Splits: words in the names of files, and of splits of a data set. The first one that is there is read.
TRAIN, DEV = ("train",), ("dev", "valid")


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One checked row. `values` is one of these:

    - {"prompt": text, "output": text}, and "ended": False if the output was cut;
    - {"messages": [{"role", "content", …}, …]}, with "tools": [object, …] if it has some, "trained": [index, …] if not
      all of the assistant's messages may be trained, "ended": False if the last one was cut, and "is_prompt": True if
      all of them come before the answer that is to be written, whoever wrote the last one;
    - {"prompt_ids": int array, "output_ids": int array}, and the text of these if there is some: "output", and "prompt"
      or "messages", those before the answer, with "is_prompt".

    A row of a prompt alone has no output or output_ids, or it has "is_prompt".

    Each may have the prompt of the teacher, if that is another one: "teacher_prompt" (text) or "teacher_messages".
    """

    where: str  # file and line, for messages
    values: dict
    outputs: object = None  # the reference text, or a list of several, unchecked; `values` has the first one
    teacher: str | None = None  # the name of its teacher, of several
    number: int = 0  # in its source, from 0; rows that are left out count


class Rows(list):
    """The rows of a source."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []  # for people: what was read, how it was understood, what was left out


def read_rows(
    source: str,
    limit: int | None = None,
    splits: tuple[str, ...] = TRAIN,
    outputs: str = "required",
    columns: Mapping[str, str] | tuple[tuple[str, str], ...] | None = None,
    on_bad_row: str = "stop",
    teachers: TeacherNames | None = None,
    given: Iterable[dict] | None = None,
) -> Rows:
    """Reads and checks rows. At most `limit` rows are returned.

    Args:
        source: a file, a folder, a data set of the Hub, or "quickstart:SPLIT". docs/data.md says which are read.
        splits: what is read of a folder, or of a data set with splits. Indexed binary files come first: the papers'
            tools leave the same rows, of all splits, as JSONL beside them.
        outputs: "required"; "optional": rows of a prompt alone are good; "ignored": outputs are taken away. They are
            then in `Row.outputs` alone (token ids stay in `values`). Of messages that end with the assistant's, the
            output is the last one; if that has weight 0, the last that is trained, and what follows it goes, too.
        columns: names of columns by ours, or the items of such a mapping; then no other column is read.
        on_bad_row: "stop", or "skip": bad rows are left out, and `notes` of the result names them.
        teachers: the names of several teachers, one of which every row must have.
        given: rows in memory; `source` is then their name.

    Raises ConfigError, one line with file and line, for a source that is missing or empty, a file that can't be read,
    and, unless they are skipped, rows that can't be used.
    """
    columns = None if columns is None else dict(columns)
    if columns is not None:
        formats.check_columns(columns)
    rows, bad, titles = Rows(), [], collections.Counter()
    seen, unread = {}, {}  # columns in the order in which they appear; those with a value that its row's format drops
    known = formats.COLUMNS if columns is None else columns.values()
    chosen = None if teachers is None else RowTeachers(teachers, source)
    is_hidden = columns is not None and "teacher" not in columns
    raw = _raw_rows(source, splits, known, rows.notes) if given is None else sources.rows_in_memory(source, given)
    for number, (where, values) in enumerate(raw):
        if chosen:
            chosen.see(where)
        try:
            if isinstance(values, ConfigError):
                raise values
            if isinstance(values, dict):
                seen.update(dict.fromkeys(values))
                if columns is not None:
                    values = {ours: values[theirs] for ours, theirs in columns.items() if theirs in values}
            checked = formats.check_row(values, where, outputs)
            teacher = chosen and chosen.of(where, values, is_hidden)
        except ConfigError as error:
            if on_bad_row == "stop":
                raise ConfigError(_explain(source, str(error), columns, seen)) from None
            bad.append(str(error))
            continue
        rows.append(Row(where, checked.values, checked.outputs, teacher, number))
        titles[checked.format.title] += 1
        if columns is None:
            used = checked.format.used - ({*formats.TEACHER} if outputs == "ignored" else set())
            used |= {"teacher"} if chosen else set()
            unread |= {key: None for key, value in values.items() if key not in used and value not in (None, "")}
        if len(rows) == limit:
            break
    if not rows:
        error = f"{source}: has no rows" + (f" that can be used: {bad[0]}" if bad else "")
        raise ConfigError(_explain(source, error, columns, seen))
    if unseen := _unseen(columns, seen):
        raise ConfigError(f"{source}: {unseen}")
    if chosen and len(rows) != limit:  # what comes after the limit is not known
        chosen.check_entries()
    rows.notes += _notes(source, titles, [key for key in seen if key in unread], bad)
    return rows


def _raw_rows(source: str, splits: tuple[str, ...], known: Collection[str], notes: list[str]) -> Iterator[RawRow]:
    if os.path.isdir(source) and not os.access(source, os.R_OK | os.X_OK):
        raise ConfigError(f"{source}: can't be read (Permission denied)")
    may_be_binary = os.path.isdir(source) or source.endswith((".bin", ".idx"))
    if not (parts := indexed_dataset.find(source, splits) if may_be_binary else []):
        yield from sources.read(source, splits, known, notes)
    for part in parts:
        for where, ids in indexed_dataset.read_items(part):
            try:
                prompt, output = indexed_dataset.split_item(where, ids)
                yield where, {"prompt_ids": prompt, "output_ids": output}
            except ConfigError as error:
                yield where, error


def _unseen(columns: dict | None, seen: dict) -> str:
    """What is wrong if `columns` names one that no row has."""
    missing = [theirs for theirs in (columns or {}).values() if theirs not in seen]
    return f'data.columns names "{missing[0]}", and the columns are {", ".join(seen)}' if missing and seen else ""


def _explain(source: str, error: str, columns: dict | None, seen: dict) -> str:
    """An error, with the name of a column that is missing. If all are, this alone explains it."""
    unseen = _unseen(columns, seen)
    if unseen and not seen.keys() & {*columns.values()}:
        return f"{source}: {unseen}"
    return f"{error}; {unseen}" if unseen else error


def _notes(source: str, titles: collections.Counter, unread: list[str], bad: list[str]) -> Iterator[str]:
    found = " and ".join(f"{count} rows of {title}" for title, count in titles.items())
    yield f"{source}: {found}" + (f"; not read: {', '.join(unread)}" if unread else "")
    if bad:
        yield f"{source}: {len(bad)} rows are left out: {'; '.join(bad[:3])}" + ("; …" if len(bad) > 3 else "")
