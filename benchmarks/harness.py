"""Shared by all benchmarks: command line, timing, memory, the machine's description, and the report."""

import argparse
import contextlib
import datetime
import itertools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read at import: the profiler would announce every start and stop

import torch

import abkd_fast
from abkd_fast.device import cpu_name

FOLDER = pathlib.Path(__file__).parent
MIB = 1 << 20
TIME = {"ms": "ms|.2f", "range": "min..max"}  # columns of a row that `spread` or `compare` made


def parser(description: str, name: str, repeats: int, quick: bool = False) -> tuple[argparse.ArgumentParser, Callable]:
    """A command line with --out and, unless `repeats` is 0, --device and --repeats; and its `add_argument`."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = result.add_argument, "(default: %(default)s)"
    add("--out", type=pathlib.Path, default=FOLDER / "results" / name, help=f"folder of the results {default}")
    if repeats:
        add("--repeats", type=int, default=repeats, help=f"timed rounds {default}")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        add("--device", choices=("cpu", "cuda"), default=device, help="default: %(default)s")
    if quick:
        add("--quick", action="store_true", help="tiny sizes: shows whether it runs, not how fast")
    return result, add


def describe_machine(device: torch.device) -> dict[str, Any]:
    gpu, threads = torch.cuda.get_device_name(device) if device.type == "cuda" else None, torch.get_num_threads()
    commit = subprocess.run("git describe --always --dirty", shell=True, cwd=FOLDER, capture_output=True, text=True)
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    system = {"date": date, "commit": commit.stdout.strip() or None, "system": platform.platform(), "cpu": cpu_name()}
    system |= {"gpu": gpu, "device": gpu or f"{cpu_name()}, {threads} threads", "threads": threads}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    return system | versions | {"build": abkd_fast.build_info()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(candidates: dict[str, Callable[[], None]], repeats: int, warm: bool = False) -> dict[str, list[float]]:
    """Milliseconds of each candidate. They take turns, so a drift of the machine affects all alike.

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
    row = {"name": name, "ms": statistics.median(values), "min_ms": min(values), "max_ms": max(values), **more}
    return row | {"range": f"{row['min_ms']:.2f}..{row['max_ms']:.2f}"}


def compare(candidates: dict[str, Callable[[], None]], repeats: int, warm: bool = False) -> list[dict[str, Any]]:
    """A row for each candidate: `spread`, and the ratio of its median to the first candidate's."""
    rows = [spread(name, values) for name, values in measure(candidates, repeats, warm).items()]
    return [row | {"ratio": row["ms"] / rows[0]["ms"]} for row in rows]


def peak_memory(run: Callable[[], None], device: torch.device) -> int:
    """The most bytes of tensors alive at once during `run`, besides those that existed before.

    On the CPU the profiler logs what PyTorch's allocator gives and takes back, also inside custom operators.
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
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        profile.export_chrome_trace(trace.name)
        events = json.loads(pathlib.Path(trace.name).read_text())["traceEvents"]
    changes = (event["args"]["Bytes"] for event in events if event["name"] == "[memory]")
    return max(itertools.accumulate(changes, initial=0))


class Report:
    """Prints tables, in Markdown, as they come. `kept` writes all of them at the end, as Markdown and as JSON.

    A row is a dictionary. Its `target`, if there is one, is a bound on its `ratio`: {"at_least": 4}, or "at_most".
    """

    def __init__(self, device: torch.device, options: dict[str, Any], judge: bool = True) -> None:
        """Its folder is options["out"]. `judge=False` drops the targets, for sizes at which they mean nothing."""
        self.judge, self.folder = judge, options.get("out")
        machine, self.markdown = describe_machine(device), []  # paragraphs
        self.content = {"machine": machine, "options": options, "sections": {}, "notes": []}
        self._say(f"{machine['device']}, torch {machine['torch']}, commit {machine['commit']}")
        self._say(str(machine["build"]))

    def _say(self, text: str) -> None:
        self.markdown.append(text)
        print(f"{text}\n", flush=True)

    def note(self, text: str) -> None:
        self.content["notes"].append(text)
        self._say(text)

    def table(
        self, section: str, title: str, rows: list[dict[str, Any]], columns: dict[str, str], notes: Sequence[str] = ()
    ) -> None:
        """`columns` gives "heading|format" for keys of the rows. A row's name comes first, unless they place it.

        `notes` are paragraphs that belong to the table, below it.
        """
        columns = ({"name": ""} if "name" in rows[0] and "name" not in columns else {}) | columns
        for row in rows:
            if not self.judge:
                row.pop("target", None)
            for relation, bound in row.get("target", {}).items():
                row["met"] = row["ratio"] >= bound if relation == "at_least" else row["ratio"] <= bound
                sign, verdict = ">=" if relation == "at_least" else "<=", "met" if row["met"] else "missed"
                columns, row["verdict"] = columns | {"verdict": "target"}, f"{sign} {bound:.2f} {verdict}"
        headings, formats = zip(*(column.partition("|")[::2] for column in columns.values()), strict=True)
        cells = [[(row.get(key), form) for key, form in zip(columns, formats, strict=True)] for row in rows]
        lines = [[*headings], ["---"] * len(columns)]
        lines += [["" if value is None else format(value, form) for value, form in line] for line in cells]
        markdown = "\n\n".join(["\n".join(f"| {' | '.join(line)} |" for line in lines), *notes])
        self._say(f"**{title}**\n\n{markdown}")
        self.content["notes"] += notes
        self.content["sections"].setdefault(section, []).append({"title": title, "rows": rows, "markdown": markdown})

    @contextlib.contextmanager
    def kept(self, name: str) -> Iterator[None]:
        """Saves the report as NAME.json and NAME.md in the end, also what came before a failure."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            tables, path = itertools.chain(*self.content["sections"].values()), self.folder / f"{name}.json"
            met = [row["met"] for table in tables for row in table["rows"] if "met" in row]
            self.content["targets"] = {"met": sum(met), "of": len(met)}
            path.write_text(json.dumps(self.content, indent=2, default=str) + "\n")
            path.with_suffix(".md").write_text("\n\n".join(self.markdown) + "\n")
            judged = f"{sum(met)} of {len(met)} targets met" if self.judge else "no target is meant for these sizes"
            print(f"{judged}; everything is in {path}")
