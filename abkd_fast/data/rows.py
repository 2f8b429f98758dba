"""Rows of instruction data, read and checked."""

import collections
import dataclasses
import os
from collections.abc import Collection, Iterator, Mapping

from ..errors import ConfigError
from . import formats, indexed_dataset, sources
from .text_files import RawRow

# Splits: words in the names of files, and of splits of a data set. The first one that is there is read.
TRAIN, DEV = ("train",), ("dev", "valid")


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One checked row. `values` is one of these:

    - {"prompt": text, "output": text}, and "ended": False if the output was cut;
    - {"messages": [{"role", "content", …}, …]}, with "tools": [object, …] if it has some, "trained": [index, …] if not
      all of the assistant's messages may be trained, and "ended": False if the last one was cut;
    - {"prompt_ids": int array, "output_ids": int array}, and the text of these if there is some: "output", and "prompt"
      or "messages", those before the answer.

    A row of a prompt alone has no output or output_ids, or its last message is not the assistant's. If it is, though an
    answer is still to be written, "is_prompt" is True.
    """

    where: str  # file and line, for messages
    values: dict
    outputs: object = None  # the reference text, or a list of several, unchecked; `values` has the first one


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
) -> Rows:
    """Reads and checks rows. At most `limit` rows are returned.

    Args:
        source: a file, a folder, a data set of the Hub, or "quickstart:SPLIT". docs/data.md says which are read.
        splits: what is read of a folder, or of a data set with splits. Indexed binary files come first: the papers'
            tools leave the same rows, of all splits, as JSONL beside them.
        outputs: "required"; "optional": rows of a prompt alone are good; "ignored": outputs are taken away. They are
            then in `Row.outputs` alone (token ids stay in `values`).
        columns: names of columns by ours, or the items of such a mapping; then no other column is read.
        on_bad_row: "stop", or "skip": bad rows are left out, and `notes` of the result names them.

    Raises ConfigError, one line with file and line, for a source that is missing or empty, a file that can't be read,
    and, unless they are skipped, rows that can't be used.
    """
    columns = None if columns is None else dict(columns)
    if columns is not None:
        formats.check_columns(columns)
    rows, bad, titles = Rows(), [], collections.Counter()
    seen, used = {}, set()  # columns in the order in which they appear, and those that are read
    for where, values in _raw_rows(
        source, splits, formats.COLUMNS if columns is None else columns.values(), rows.notes
    ):
        try:
            if isinstance(values, ConfigError):
                raise values
            if isinstance(values, dict):
                seen.update(dict.fromkeys(values))
                if columns is not None:
                    values = {ours: values[theirs] for ours, theirs in columns.items() if theirs in values}
            checked = formats.check_row(values, where, outputs)
        except ConfigError as error:
            if on_bad_row == "stop":
                raise ConfigError(f"{error}{_unseen(columns, seen)}") from None
            bad.append(str(error))
            continue
        rows.append(Row(where, checked.values, checked.outputs))
        titles[checked.format.title] += 1
        used |= checked.format.used
        if len(rows) == limit:
            break
    unseen = _unseen(columns, seen)
    if not rows:
        raise ConfigError(f"{source}: has no rows" + (f" that can be used: {bad[0]}{unseen}" if bad else ""))
    if unseen:
        raise ConfigError(f"{source}{unseen}")
    rows.notes += _notes(source, titles, [] if columns else [key for key in seen if key not in used], bad)
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
    """What to add to a message if `columns` names one that no row has."""
    missing = [theirs for theirs in (columns or {}).values() if theirs not in seen]
    return f'; data.columns names "{missing[0]}", and the columns are {", ".join(seen)}' if missing and seen else ""


def _notes(source: str, titles: collections.Counter, unread: list[str], bad: list[str]) -> Iterator[str]:
    found = " and ".join(f"{count} rows of {title}" for title, count in titles.items())
    yield f"{source}: {found}" + (f"; not read: {', '.join(unread)}" if unread else "")
    if bad:
        yield f"{source}: {len(bad)} rows are left out: {'; '.join(bad[:3])}" + ("; …" if len(bad) > 3 else "")
