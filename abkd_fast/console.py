"""The terminal."""

import os
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from .errors import printable, shortened

FIRST_PAUSE, LONGEST_PAUSE = 10.0, 600.0  # seconds between lines where the output is no terminal


class PlainConsole(Console):
    """A console that takes texts as they are: no markup, no emoji, and control characters are escaped.

    A text may be a user's, or a model's. A style is given by `styled`.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """What rich makes of every text that it prints, in tables too."""
        return super().render_str(shown(text), **(options | {"markup": False}))


def shown(text: str) -> str:
    """A text of anybody as people see it: in lines, without control characters, and not endless."""
    return "\n".join(map(shortened, printable(text, "\n\t").split("\n")))


def styled(text: str, style: str, rest: str = "") -> Text:
    """A line that begins with a text in a style: `styled("no log", "bold red", " of step 5")`."""
    return Text.assemble((shown(text), style), shown(rest))


console = PlainConsole(soft_wrap=True, highlight=False, emoji=False, quiet=os.environ.get("RANK", "0") != "0")


def format_seconds(number: float) -> str:
    """Seconds as minutes and seconds, for people."""
    minutes, seconds = divmod(round(number), 60)
    return f"{minutes}m{seconds:02d}s"


def format_bytes(number: float) -> str:
    """A number of bytes as text for people."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


class ProgressBar(Progress):
    """A progress bar with counts, the remaining time, and `text` after it.

    Where the output is no terminal, a line takes its place: after 10 seconds without one, then after 20, 40, and so on.
    """

    def __init__(self, name: str, text: str | None = None, bar_width: int = 40) -> None:
        """name: what is counted, for the lines. text: for the bar (None: the name); fields of a task in braces."""
        is_shown = console.is_terminal
        text_column = TextColumn(text or shown(name).replace("{", "{{").replace("}", "}}"), markup=False)
        columns = BarColumn(bar_width), MofNCompleteColumn(), TimeRemainingColumn(compact=True), text_column
        super().__init__(*columns, console=console, auto_refresh=is_shown, disable=not is_shown)
        self.name, self.pause = name, FIRST_PAUSE
        self.restart_pause()

    def restart_pause(self) -> None:
        """Another line was printed."""
        self.silent_since = time.monotonic()

    def update(self, task_id: TaskID, **values: object) -> None:
        super().update(task_id, **values)
        self._print_line(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._print_line(task_id)

    def _print_line(self, task_id: TaskID) -> None:
        if console.is_terminal or time.monotonic() - self.silent_since < self.pause:
            return
        self.pause = min(2 * self.pause, LONGEST_PAUSE)
        self.restart_pause()
        task = next(task for task in self.tasks if task.id == task_id)
        left = "" if task.time_remaining is None else f"  left {format_seconds(task.time_remaining)}"
        console.print(f"{self.name} {task.completed:.0f}/{task.total:.0f}{left}")
