"""The terminal."""

import os

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(soft_wrap=True, highlight=False, emoji=False, quiet=os.environ.get("RANK", "0") != "0")


def format_bytes(number: float) -> str:
    """A number of bytes as text for people."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def progress_bar(text: str, bar_width: int = 40) -> Progress:
    """A progress bar with counts, the remaining time, and `text` after it. Hidden where the output is no terminal."""
    columns = BarColumn(bar_width), MofNCompleteColumn(), TimeRemainingColumn(compact=True), TextColumn(text)
    return Progress(*columns, console=console, disable=not console.is_terminal)
