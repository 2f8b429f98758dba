"""A file of answers that grows line by line, and survives a crash."""

import glob
import json
import pathlib
from collections.abc import Callable

from .. import distributed, json_shape
from ..console import console
from ..errors import ConfigError
from ..files import atomic_write, open_own, remove_leftovers


class GrowingFile:
    """A file of JSON objects, one a line, that come in any order and are sorted by their "row" in the end.

    A context manager: additions are possible while it is entered. A crash costs the last line at most. Ranks other
    than 0 write files of their own, NAME.rank1, …; `sort` joins them to the first.
    """

    def __init__(self, path: pathlib.Path, is_own: Callable[[dict], bool]) -> None:
        """is_own: whether a line is one of those that are to be added. Raises ConfigError for a file with another."""
        self.path, self.is_own = path, is_own
        self.rows = {values["row"] for values in distributed.run_on_rank0(self.read)}

    def paths(self) -> list[pathlib.Path]:
        """The files of all ranks that are there."""
        others = self.path.parent.glob(f"{glob.escape(self.path.name)}.rank*")
        return [path for path in (self.path, *others) if path.exists()]

    def read(self) -> list[dict]:
        """The whole lines of all ranks, without damaged ones and what a crash left of the last one."""
        self.damaged, found = 0, {}  # keyed by row: after a crash one may be in two files
        for path in self.paths():
            for number, line in enumerate(path.read_bytes().splitlines(), 1):
                if (values := _parse(line)) is None:
                    self.damaged += 1
                elif not self.is_own(values):
                    problem = "is no answer to a prompt of this command: choose another file"
                    raise ConfigError(f"out: {path} line {number} {problem}")
                else:
                    found[values["row"]] = values
        return [*found.values()]

    def __enter__(self) -> "GrowingFile":
        distributed.run_on_rank0(self._clean)
        own = self.path if distributed.is_rank0() else self.path.with_name(f"{self.path.name}.rank{distributed.rank()}")
        self.file = open_own(own, "a", encoding="utf-8", buffering=1)
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def add(self, row: int, values: dict) -> None:
        self.file.write(json.dumps({**values, "row": row}, ensure_ascii=False) + "\n")
        self.rows.add(row)

    def sort(self) -> list[dict]:
        """Sorts the lines of all ranks by their rows, and returns them."""
        distributed.barrier()  # until all ranks have written theirs
        lines = distributed.run_on_rank0(lambda: sorted(self.read(), key=lambda values: values["row"]))
        distributed.run_on_rank0(self._write, lines)
        self.rows = {values["row"] for values in lines}
        return lines

    def _clean(self) -> None:
        lines = self.read()
        if self.damaged:
            console.print(f"{self.path}: {self.damaged} damaged lines are written again")
        self._write(lines)

    def _write(self, lines: list[dict]) -> None:
        remove_leftovers(self.path.parent, f"{self.path.name}.")
        atomic_write(self.path, "".join(json.dumps(values, ensure_ascii=False) + "\n" for values in lines))
        for path in self.paths():
            if path != self.path:
                path.unlink()


def _parse(line: bytes) -> dict | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return None if json_shape.problem(values, {"row": int}) or values["row"] < 0 else values
