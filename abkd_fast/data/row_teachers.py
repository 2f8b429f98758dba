"""Which of several teachers a row has: its own column says it, or else its file."""

import pathlib
from typing import NamedTuple

from ..errors import ConfigError
from .strict_json import show


class TeacherNames(NamedTuple):
    """The names that rows may give, and those of all rows of a file."""

    names: tuple[str, ...] = ()  # none: rows are handed on, with any name or without one
    by_file: tuple[tuple[str, str], ...] = ()  # by its path, its path within the source, or its name


class RowTeachers:
    """Finds the teacher of each row of a source."""

    def __init__(self, known: TeacherNames, source: str) -> None:
        self.names, self.by_file, self.source = known.names, dict(known.by_file), source
        self.entries: dict[str, str | None] = {}  # by file, the entry of by_file that decides
        self.files: dict[str, str] = {}  # by entry

    def see(self, where: str) -> str:
        """Takes note of a row's place, also of one that is left out. Returns its file.

        Raises ConfigError where an entry means several files.
        """
        file = where.rsplit(" ", 2)[0]  # a place is "PATH line 3"
        if file not in self.entries:
            self.entries[file] = entry = self._entry(file)
            if self.files.setdefault(entry, file) != file and entry is not None:
                problem = f'data.teachers: "{entry}" is the name of {self.files[entry]} and of {file}'
                raise ConfigError(f"{problem}: give their paths", "data.teachers")
        return file

    def _entry(self, file: str) -> str | None:
        """The entry that says most exactly which file it means."""
        path = pathlib.Path(file)
        within = str(path.relative_to(self.source)) if path.is_relative_to(self.source) else file
        same = (entry for entry in self.by_file if pathlib.Path(entry).resolve() == path.resolve())
        return next(same, next((entry for entry in (within, path.name) if entry in self.by_file), None))

    def of(self, where: str, values: dict, is_hidden: bool = False) -> str | None:
        """The name of a row's teacher. is_hidden: `data.columns` names no such column.

        Raises ConfigError where there is none, or an unknown one.
        """
        name, entry = values.get("teacher"), self.entries[self.see(where)]
        if not self.names:
            return name if isinstance(name, str) and name else None
        name = self.by_file.get(entry) if name in (None, "") else name
        expected = f"expected one of {', '.join(self.names)}"
        if name is None:
            column = '"teacher"' + (", which data.columns must name, too" if is_hidden else "")
            files = f"it has {', '.join(self.by_file)}" if self.by_file else "it gives whole files one"
            raise ConfigError(f"{where}: has no teacher, {expected}, by the column {column}, or data.teachers: {files}")
        if name not in self.names:
            raise ConfigError(f'{where}: "teacher" is {show(name)}, {expected}')
        return name

    def check_entries(self) -> None:
        """Raises ConfigError for an entry of data.teachers that means no file, once all rows are seen."""
        used = {*self.entries.values()}
        if unused := [entry for entry in self.by_file if entry not in used]:
            problem = f"data.teachers names {unused[0]}, but no row is of that file"
            raise ConfigError(f"{self.source}: {problem}; the files are {', '.join(self.entries)}", "data.teachers")
