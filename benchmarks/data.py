"""Reading and tokenizing a large data set, against `datasets.map` with the bare tokenizer: `python benchmarks/data.py`.

rows    rows of 200 tokens with prompt and output, from a JSONL file to stored samples; `map` has the texts in memory
long    one row of 10 MB, in the output and in the prompt

Memory is what a process that only does this holds at most, above what it holds after its imports. Linux alone tells it.
"""

import argparse
import json
import multiprocessing
import pathlib
import random
import tempfile
import time
from collections.abc import Callable
from typing import Any

import datasets
import torch
from transformers import AutoTokenizer

import harness
from abkd_fast.data import quickstart
from abkd_fast.data.rows import read_rows
from abkd_fast.data.tokenize import tokenize
from abkd_fast.errors import ConfigError
from harness import MIB, Report

TOKENS = 200
LONG = 10_000_000  # characters


def tokenizer_of(name: str):
    return quickstart.tokenizer() if name == "quickstart" else AutoTokenizer.from_pretrained(name)


def write_texts(path: pathlib.Path, count: int, name: str) -> None:
    """Writes rows of about TOKENS tokens, a third of them in the prompt: sentences of the quickstart's tasks."""
    tokenizer, generator = tokenizer_of(name), random.Random(0)
    sentences = [row["instruction"] + " " + row["output"] for row in quickstart.rows("train")]
    mean = sum(map(len, tokenizer(sentences)["input_ids"])) / len(sentences)
    number = round(TOKENS / mean)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            chosen = generator.choices(sentences, k=number)
            prompt, output = (" ".join(part) for part in (chosen[: number // 3], chosen[number // 3 :]))
            file.write(json.dumps({"prompt": prompt + "\n", "output": output}) + "\n")


def ours(path: str, name: str) -> tuple[float, int]:
    """Reads and tokenizes a file. Returns seconds and the number of samples."""
    started = time.perf_counter()
    try:
        samples = len(tokenize(read_rows(path), tokenizer_of(name), 512, 256).dataset)
    except ConfigError:  # a prompt that is too long
        samples = 0
    return time.perf_counter() - started, samples


def bare(path: str, name: str) -> tuple[float, int]:
    """The same texts by `datasets.map`, without checks, spans and reading."""
    tokenizer, texts = tokenizer_of(name), [row.values["prompt"] + row.values["output"] for row in read_rows(path)]
    started, dataset = time.perf_counter(), datasets.Dataset.from_dict({"text": texts})
    columns = {"batched": True, "remove_columns": ["text"], "cache_file_name": f"{path}.arrow"}
    done = dataset.map(lambda batch: {"input_ids": tokenizer(batch["text"])["input_ids"]}, **columns)
    return time.perf_counter() - started, len(done)


def _status(key: str) -> int:
    """Bytes of this process's memory, from /proc."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def _alone(work: Callable, path: str, name: str, cache: str) -> tuple[float, int, int]:
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = cache
    tokenizer_of(name)
    before = _status("VmRSS")
    seconds, samples = work(path, name)
    return seconds, samples, _status("VmHWM") - before


def in_own_process(work: Callable, *arguments: object) -> Any:
    """What `work` returns in a fork of this process, which has imported everything, and has used no tokenizer yet."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(work, arguments)


def measure(work: Callable, path: pathlib.Path, options: argparse.Namespace, cache: str) -> dict:
    """A row of the table, measured in a process of its own."""
    seconds, samples, held = in_own_process(_alone, work, str(path), options.tokenizer, cache)
    return {"seconds": seconds, "samples": samples, "mib": held / MIB}


def main() -> None:
    parser, add = harness.parser(__doc__, "data", repeats=0, quick=True)
    add("--rows", type=int, default=100_000, help="default: %(default)s")
    add("--tokenizer", default="quickstart", help="folder or Hub name (default: that of the quickstart's tasks)")
    options = parser.parse_args()
    count, characters = (500, 100_000) if options.quick else (options.rows, LONG)
    report = Report(torch.device("cpu"), vars(options), judge=not options.quick)
    with report.kept("data"), tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "rows.jsonl")
        in_own_process(write_texts, path, count, options.tokenizer)
        rows = [
            {"name": "datasets.map, bare tokenizer", **measure(bare, path, options, folder)},
            {"name": "abkd_fast, from the file", **measure(ours, path, options, folder)},
            {"name": "abkd_fast, found on the disk", **measure(ours, path, options, folder)},
        ]
        for row in rows:
            row["ratio"] = row["seconds"] / rows[0]["seconds"]
        rows[1]["target"] = {"at_most": 2}
        columns = {"seconds": "s|.1f", "ratio": "time, x the bare tokenizer's|.2f", "mib": "MiB|.0f"}
        report.table("rows", f"{count} rows of about {TOKENS} tokens", rows, columns)
        text = " ".join(row["output"] for row in quickstart.rows("train"))
        text, rows = (text * (characters // len(text) + 1))[:characters], []
        kinds = {
            "a long output": ("Q:\n", text),
            "a long prompt": (text, "Yes."),
            "no spaces": ("Q:\n", "a" * characters),
        }
        for name, (prompt, output) in kinds.items():
            path.write_text(json.dumps({"prompt": prompt, "output": output}) + "\n", encoding="utf-8")
            rows.append({"name": name, **measure(ours, path, options, folder)})
        report.table("long", f"one row of {characters / 1e6:g} MB", rows, {"seconds": "s|.2f", "mib": "MiB|.0f"})


if __name__ == "__main__":
    main()
