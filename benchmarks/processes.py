"""Two processes of one thread against one of two, trained in turn on an idle CPU: `python benchmarks/processes.py`."""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

from abkd_fast.device import cpu_name
from workload import SCALES, write_recipe

WAYS = {"auto": "one process, two threads", "ddp": "two processes, ddp", "fsdp": "two processes, fsdp"}


def train(way: str, recipe: pathlib.Path, name: str) -> float:
    """Seconds/sample of a run, the median of its steps but the first. `way`: its train.parallel."""
    overrides = ["--set", f"run.name={name}", "--set", f"train.parallel={way}"]
    launcher, threads = ([], "2") if way == "auto" else (["-m", "torch.distributed.run", "--nproc-per-node=2"], "1")
    command = [sys.executable, *launcher, "-m", "abkd_fast.train", "--config", str(recipe), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    lines = map(json.loads, (recipe.parent / name / "metrics.jsonl").read_text().splitlines())
    return statistics.median([line["seconds_per_sample"] for line in lines if line["kind"] == "train"][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", choices=SCALES, default="paper", help="whose student is trained (default: paper)")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    options = parser.parse_args()
    settings = {"steps": 5, "batch_size": 16, "device": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        sections = {"run": {"name": "run", "dir": folder}, "method": "sft", "log": {"every_steps": 1}}
        recipe = write_recipe(pathlib.Path(folder), SCALES[options.scale], settings["steps"], settings, sections)
        rounds = [{way: train(way, recipe, f"{way}-{number}") for way in WAYS} for number in range(options.repeats)]
    print(cpu_name())
    for way, title in WAYS.items():
        values, ratios = zip(*((each[way], each[way] / each["auto"]) for each in rounds), strict=True)
        spread = f"({min(values):.4f} to {max(values):.4f}), x {statistics.median(ratios):.3f}"
        print(f"{title:26} {statistics.median(values):.4f} s/sample {spread}")


if __name__ == "__main__":
    main()
