"""Points of a run: the lines of its log, some of which a crash or a full disk may have damaged."""

import json
import pathlib

from ..json_shape import problem

FILE = "metrics.jsonl"
POINT = {"kind": str, "*": (float, None)}


def parse_line(line: bytes, shape: dict | None = None) -> dict | None:
    """The object of a line; None for a damaged one. shape: what it must be like, besides its "step"."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return None if problem(values, {"step": int, "kind?": str, **(shape or {})}) else values


def read_points(folder: pathlib.Path) -> tuple[list[dict], int]:
    """The points of a run, and the number of damaged lines, which are left out. Raises OSError."""
    lines = (folder / FILE).read_bytes().splitlines()
    points = [point for line in lines if (point := parse_line(line, POINT)) is not None]
    return points, len(lines) - len(points)
