"""The terminal."""

from __future__ import annotations

import os

from rich.console import Console

console = Console(soft_wrap=True, highlight=False, quiet=os.environ.get("RANK", "0") != "0")


def format_bytes(number: float) -> str:
    """A number of bytes as text for people."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
