"""Two processes of one thread each against one process of two threads: seconds/sample on the same samples, on a CPU.

`python benchmarks/processes.py` trains alternately, and prints medians and their ratio. Leave the machine alone.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import torch

from harness import describe_machine
from workload import LENGTH, SCALES, write_rows, write_tokenizer

WAYS = {
    "one process, two threads": (2, []),
    "two processes, ddp": (1, ["-m", "torch.distributed.run", "--nproc-per-node", "2"]),
    "two processes, fsdp": (1, ["-m", "torch.distributed.run", "--nproc-per-node", "2"]),
}


def write_recipe(folder: pathlib.Path, options: argparse.Namespace) -> pathlib.Path:
    scale = SCALES[options.scale]
    write_rows(folder / "rows.jsonl", options.steps, options.batch_size, scale.vocab)
    write_tokenizer(folder / "tokenizer", scale.vocab)
    recipe = {
        "run": {"name": "run", "dir": str(folder)},
        "method": "sft",
        "tokenizer": str(folder / "tokenizer"),
        "student": scale.model(scale.student),
        "data": {"train": str(folder / "rows.jsonl"), "max_length": LENGTH, "max_prompt_length": None},
        "train": {
            "steps": options.steps,
            "batch_size": options.batch_size,
            "max_tokens": options.batch_size * LENGTH,
            "device": "cpu",
        },
        "log": {"every_steps": 1},
        "checkpoint": {"every_steps": options.steps},
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


def measure(way: str, recipe: pathlib.Path, name: str) -> float:
    """Seconds/sample of a run, the median of its steps but the first."""
    threads, launcher = WAYS[way]
    mode = way.rpartition(" ")[2] if launcher else "auto"
    overrides = ["--set", f"run.name={name}", "--set", f"train.parallel={mode}"]
    command = [sys.executable, *launcher, "-m", "abkd_fast.train", "--config", str(recipe), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    lines = map(json.loads, (recipe.parent / name / "metrics.jsonl").read_text().splitlines())
    return statistics.median([line["seconds_per_sample"] for line in lines if line["kind"] == "train"][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="paper", help="whose student is trained [paper]")
    for name, default in (("--batch-size", 16), ("--steps", 5), ("--repeats", 3)):
        parser.add_argument(name, type=int, metavar="N", default=default, help=f"[{default}]")
    options = parser.parse_args()
    times = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        recipe = write_recipe(pathlib.Path(folder), options)
        for repeat in range(options.repeats):
            for way in WAYS:
                times[way].append(measure(way, recipe, f"{way.replace(' ', '-').replace(',', '')}-{repeat}"))
    print(describe_machine(torch.device("cpu"))["cpu"])
    alone = times["one process, two threads"]
    for way, values in times.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(values, alone, strict=True))
        print(
            f"{way:26} {statistics.median(values):.4f} s/sample ({min(values):.4f} to {max(values):.4f}), x {ratio:.3f}"
        )


if __name__ == "__main__":
    main()
