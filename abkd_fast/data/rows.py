"""Rows of instruction data: read from files, the Hub, or the quickstart, and checked."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator

import datasets

from ..errors import ConfigError
from ..files import is_local_path
from . import indexed_dataset, quickstart
from .formats import check_row, outputs_in, without_output

# Splits: names of the indexed binary files in a folder. The first one that has files is read.
TRAIN, DEV = ("train",), ("dev", "valid")


@dataclasses.dataclass(frozen=True)
class Row:
    """One checked row."""

    where: str  # file and line, for messages
    values: dict  # prompt and output, messages, or prompt_ids and output_ids
    outputs: object = None  # all outputs of a row of JSON, unchecked; `values` has the first one


def read_rows(
    source: str, limit: int | None = None, splits: tuple[str, ...] = TRAIN, outputs: str = "required"
) -> list[Row]:
    """Reads and checks rows. At most `limit` rows are read.

    Args:
        source: a JSONL or .bin file, a folder, a data set of the Hub (its train split), or "quickstart:SPLIT". In a
            folder, indexed binary files of `splits` are read, or else all JSONL files: the papers' tools leave the same
            rows, of all splits, as JSONL beside the binary files.
        outputs: "required"; "optional", where the method of a run writes responses itself; or "ignored": those of JSON
            rows are not read, and all are empty.

    Raises ConfigError, which names file and line, for a missing or empty source, broken JSON, and rows without a prompt
    or with an output that is missing, not text, or empty.
    """
    rows = list(itertools.islice(_rows(source, splits, outputs), limit))
    if not rows:
        raise ConfigError(f"{source}: has no rows")
    return rows


def _rows(source: str, splits: tuple[str, ...], outputs: str) -> Iterator[Row]:
    parts = indexed_dataset.find(source, splits)
    for part in parts:
        for where, ids in indexed_dataset.read_items(part):
            prompt, output = indexed_dataset.split_item(where, ids)
            yield Row(where, {"prompt_ids": prompt, "output_ids": output})
    if not parts:
        for where, values in _raw_rows(source):
            has_none = outputs == "optional" and not _is_answered(values)
            is_left_out = outputs == "ignored" or has_none
            checked = check_row(without_output(values) if is_left_out else values, where, is_left_out)
            yield Row(where, _prompt(checked) if has_none else checked, outputs_in(values))


def _is_answered(values: object) -> bool:
    messages = values.get("messages") if isinstance(values, dict) else None
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        return messages[-1].get("role") == "assistant"
    return not isinstance(values, dict) or "output" in values


def _prompt(values: dict) -> dict:
    if "messages" in values:
        return {"messages": values["messages"][:-1]}
    return {"prompt": values["prompt"]}


def _raw_rows(source: str) -> Iterator[tuple[str, object]]:
    path = pathlib.Path(source)
    files, numbered = [], []
    if source.startswith("quickstart:"):
        numbered = quickstart.rows(source.removeprefix("quickstart:"))
    elif path.is_dir():
        if not (files := sorted(path.glob("*.jsonl"))):
            raise ConfigError(f"{source}: a folder without .jsonl files")
    elif path.is_file():
        files = [path]
    elif path.suffix or is_local_path(source) or "/" not in source:
        raise ConfigError(f"{source}: no such file or folder")
    else:
        try:
            numbered = datasets.load_dataset(source, split="train")
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{source}: no such file, and no data set of that name on the Hub ({reason})") from None
    for file in files:
        yield from read_jsonl(file)
    for number, values in enumerate(numbered, 1):
        yield f"{source} row {number}", values


def read_jsonl(path: pathlib.Path) -> Iterator[tuple[str, object]]:
    """Yields file and line, for messages, and the JSON value of every line. Raises ConfigError for a broken line."""
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    values = json.loads(line)
                    if "\\u" in line:  # only an escape can make half of a surrogate pair
                        json.dumps(values, ensure_ascii=False).encode()
                    yield f"{path} line {number}", values
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} line {number}: broken JSON: {error.msg}") from None
    except UnicodeEncodeError:
        raise ConfigError(f"{path} line {number}: has half of a surrogate pair, which no text has") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text after line {number} ({error.reason})") from None
