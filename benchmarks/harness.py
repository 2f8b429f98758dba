"""What every benchmark here shares: timing, memory, the machine's description, and a report (terminal, JSON)."""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read at import: the profiler would announce every start and stop

import torch
from rich.console import Console
from rich.table import Table

import abkd_fast

MIB = 1 << 20


def describe_machine(device: torch.device) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": _commit(),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "gpu": gpu,
        "device": gpu or f"{_cpu_name()}, {torch.get_num_threads()} threads",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "build": abkd_fast.build_info(),
    }


def _cpu_name() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(candidates: dict[str, Callable[[], None]], repeats: int, warm: bool = False) -> dict[str, list[float]]:
    """Milliseconds of every candidate, run in turn, so that a drift of the machine touches all alike.

    Unless they are `warm` already, one more round goes first and doesn't count.
    """
    times = {name: [] for name in candidates}
    for _ in range(repeats + (not warm)):
        for name, run in candidates.items():
            synchronize()
            started = time.perf_counter()
            run()
            synchronize()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: values[-repeats:] for name, values in times.items()}


def spread(name: str, values: list[float], **more: Any) -> dict[str, Any]:
    """A row of a table: median, minimum and maximum of milliseconds."""
    return {"name": name, "ms": statistics.median(values), "min_ms": min(values), "max_ms": max(values), **more}


def peak_memory(run: Callable[[], None], device: torch.device) -> int:
    """Bytes of the tensors alive at once during `run`, at most, besides those that were there before.

    On the CPU the profiler logs what PyTorch's allocator gives and takes back, also inside custom operators, where a
    dispatch mode sees nothing. The operating system's figure for the process would be noisier: it counts whole pages,
    libraries, and memory that the allocator keeps. Left out, as on a GPU, is what never was a tensor: the scratch of
    matrix products, and a few rows in each thread of the kernels.
    """
    if device.type == "cuda":
        synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = pathlib.Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    alive = peak = 0
    for event in events:
        if event["name"] == "[memory]":
            alive += event["args"]["Bytes"]
            peak = max(peak, alive)
    return peak


def available_memory(device: torch.device) -> int:
    """Bytes that a new tensor can take."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    info = pathlib.Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    return kilobytes[0] << 10 if kilobytes else 8 << 30


def at_least(bound: float) -> dict[str, float]:
    return {"at_least": bound}


def at_most(bound: float) -> dict[str, float]:
    return {"at_most": bound}


def _met(value: float, target: dict[str, float]) -> bool:
    return target.get("at_least", value) <= value <= target.get("at_most", value)


class Report:
    """Tables on the terminal as they come, and everything in one JSON file, and in Markdown, at the end.

    A row is a dictionary; where it has a `target`, that is a bound on its `ratio`.
    """

    def __init__(self, device: torch.device, options: dict[str, Any], judge: bool = True) -> None:
        """`judge=False`: sizes at which the targets mean nothing."""
        self.judge = judge
        # A file is not 80 columns wide, as rich would have it.
        self.console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
        self.content = {"machine": describe_machine(device), "options": options, "sections": {}, "notes": []}
        machine = self.content["machine"]
        self.markdown = []  # paragraphs
        self._say(f"{machine['device']}, torch {machine['torch']}, commit {machine['commit']}")
        self._say(str(machine["build"]))

    def _say(self, text: str) -> None:
        self.markdown.append(text)
        self.console.print(text, markup=False)

    def table(self, section: str, title: str, rows: list[dict[str, Any]], columns: dict[str, tuple[str, str]]) -> None:
        """`columns`: key of a row -> heading and format."""
        for row in rows:
            if not self.judge:
                row.pop("target", None)
            if "target" in row:
                row["met"] = _met(row["ratio"], row["target"])
        if any("target" in row for row in rows):
            columns = {**columns, "target": ("target", "")}
        table = Table(title=title, title_justify="left", title_style="bold")
        for key, (heading, _) in columns.items():
            left = key in ("name", "target")
            table.add_column(heading, justify="left" if left else "right", no_wrap=not left)
        cells = [[self._cell(row, key, form) for key, (_, form) in columns.items()] for row in rows]
        for row in cells:
            table.add_row(*row)
        self.console.print()
        self.console.print(table)
        headings = [heading.replace("\n", " ") for heading, _ in columns.values()]
        markdown = "\n".join(f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(columns), *cells))
        self.markdown.append(f"**{title}**\n\n{markdown}")
        self.content["sections"].setdefault(section, []).append({"title": title, "rows": rows, "markdown": markdown})

    @staticmethod
    def _cell(row: dict[str, Any], key: str, form: str) -> str:
        if key == "range":
            return f"{row['min_ms']:.2f}..{row['max_ms']:.2f}"
        value = row.get(key)
        if value is None:
            return ""
        if key == "target":
            (relation, bound), *_ = value.items()
            return f"{'>=' if relation == 'at_least' else '<='} {bound:.2f} {'met' if row['met'] else 'missed'}"
        return format(value, form)

    def note(self, text: str) -> None:
        self.content["notes"].append(text)
        self._say(text)

    def save(self, path: pathlib.Path) -> None:
        tables = [table for section in self.content["sections"].values() for table in section]
        met = [row["met"] for table in tables for row in table["rows"] if "met" in row]
        self.content["targets"] = {"met": sum(met), "of": len(met)}
        path.write_text(json.dumps(self.content, indent=2, default=str) + "\n")
        path.with_suffix(".md").write_text("\n\n".join(self.markdown) + "\n")
        judged = f"{sum(met)} of {len(met)} targets met" if self.judge else "no target is meant for these sizes"
        self.console.print(f"\n{judged}; everything is in {path}", markup=False)
