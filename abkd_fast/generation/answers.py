"""A model's answers to the prompts of a data set, as data to train on: a file that grows answer by answer."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import glob
import hashlib
import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PretrainedConfig

from .. import distributed
from ..config.schema import Config, ModelConfig
from ..console import console
from ..data.rows import read_rows
from ..data.tokenize import encode_prompts
from ..device import choose_device, choose_dtype
from ..errors import ConfigError, Interrupted
from ..files import WRITE_ERRORS, atomic_folder, atomic_write, cache_folder, exclusive, locked
from ..models import identity, loading, lora
from ..models.packed import PackedCausalLM
from ..signals import StopSignals
from . import sampling
from .sampling import SamplingParams

SETTINGS = ("max_new_tokens", "max_length", "min_new_tokens", "temperature", "top_k", "top_p", "no_repeat_ngram_size")


class Generation:
    """One command, from its options (those of `generate.py`) to its file."""

    def __init__(self, options: argparse.Namespace, spec: ModelConfig) -> None:
        """Checks all that can be checked without weights. Raises ConfigError; writes nothing."""
        self.options, self.spec = options, spec
        for name in ("rows", "batch_size", "max_prompt_length"):
            value = getattr(options, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, expected at least 1")
        chosen = {name: getattr(options, name) for name in SETTINGS}
        self.device = choose_device(options.device)
        self.dtype = choose_dtype(options.dtype, self.device)
        self.config = loading.read_hf_config(self.spec, "model")
        self.tokenizer = loading.read_tokenizer(options.tokenizer or spec.path, "tokenizer")
        loading.check_vocabularies(self.tokenizer, self.config, None, None)
        self.end = self.tokenizer.eos_token_id
        self.settings = SamplingParams(**chosen, eos_token_ids=(self.end,))
        self.rows = read_rows(options.data, options.rows, prompts_only=True)
        self.prompts = encode_prompts(self.rows, self.tokenizer)
        longest = options.max_prompt_length or math.inf
        self.short = [index for index, prompt in enumerate(self.prompts) if len(prompt) <= longest]
        positions = getattr(self.config, "max_position_embeddings", math.inf)
        for index in self.short:
            if (length := len(self.prompts[index])) >= positions:
                raise ConfigError(
                    f"{self.rows[index].where}: the prompt has {length} tokens, and the model {positions} positions: "
                    "no room for an answer; drop the row, or lower max_prompt_length"
                )
        self.identity = {
            "weights": hash_weights(self.spec, self.config),
            "prompts": hashlib.sha256(json.dumps([self.prompts, self.end]).encode()).hexdigest(),
            "max_prompt_length": options.max_prompt_length,
            "seed": options.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
            **chosen,
        }
        self.answers = Answers(options.out, self.identity)
        self.todo, self.tokens, self.seconds = [], 0, 0.0

    def run(self) -> None:
        """Answers what is not answered yet.

        Raises Interrupted after a signal, and where there is no room; ConfigError where another process is at work on
        the same file.
        """
        path = self.options.out
        lock = path.with_name(path.name + ".lock")
        busy = f"out: another process is writing {path}: wait for it, or choose another"
        with contextlib.nullcontext() if self.answers.finished else distributed.rank0_context(exclusive(lock, busy)):
            self.answers = Answers(path, self.identity)  # with what another process has added meanwhile
            self._answer_all()
            if distributed.is_rank0():
                lock.unlink(missing_ok=True)  # nobody writes to a finished file

    def _answer_all(self) -> None:
        path, answers = self.options.out, self.answers
        if answers.finished:
            console.print(f"{path} is finished already")
            return
        self.todo = [index for index in self.short if index not in answers.rows]
        dtype = str(self.dtype).removeprefix("torch.")
        console.print(f"{len(self.todo)} of {len(self.rows)} prompts to answer, on {self.device}, in {dtype}")
        model = loading.load(self.spec, self.config, "model", self.dtype, self.device)
        started = time.perf_counter()
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16), answers:
                model.check()
                self._answer(model)
                answers.finish()
                self.tokens = distributed.all_reduce_count(self.tokens)
        except WRITE_ERRORS as error:
            raise Interrupted(f"{path} can't be written ({error}): make room") from None
        self.seconds = time.perf_counter() - started
        left_out = f"{len(self.short) - len(answers.rows)} were empty and are left out"
        if long := len(self.rows) - len(self.short):
            left_out += f", and so are {long} prompts of more than {self.options.max_prompt_length} tokens"
        console.print(
            f"{len(answers.rows)} answers in {path}; {left_out}; {self.tokens} tokens in {self.seconds:.1f} s, "
            f"{self.tokens / self.seconds:.0f} tokens/s"
        )

    def _answer(self, model: PackedCausalLM) -> None:
        def keep(number: int, response: list[int]) -> None:
            index = self.todo[number]
            text = self.tokenizer.decode(response, skip_special_tokens=True)
            values = self.rows[index].values
            if "prompt_ids" in values:
                values = {"prompt": self.tokenizer.decode(self.prompts[index])}
            if text.strip():  # there is nothing to learn from an empty one
                self.answers.add(index, {**_as_row(values, text), "ended": response[-1] == self.end})
            self.tokens += len(response)

        seeds = [(self.options.seed << 32) + index for index in self.todo]
        prompts = [self.prompts[index] for index in self.todo]
        generate(model, prompts, self.settings, seeds, self.options.batch_size, keep, "answers")


def _as_row(values: dict, output: str) -> dict:
    """A checked row with this output."""
    if "messages" in values:
        return {"messages": [*values["messages"][:-1], {"role": "assistant", "content": output}]}
    return {"prompt": values["prompt"], "output": output}


def write_stage(config: Config) -> dict:
    """Answers data.train's prompts with a stage's student, and returns the stage's summary.

    The folder `final`, which has the answers in one file, is written last. Raises ConfigError, and Interrupted.
    """
    folder = config.run.folder
    growing = folder / "answers.jsonl"
    with distributed.rank0_context(locked(folder)):
        console.print(
            f"[bold]{folder}[/bold]  method {config.method}, by {config.student.adapter or config.student.path}"
        )
        generation = _of_stage(config, growing)
        text = json.dumps(config.to_dict(), indent=2) + "\n"
        distributed.run_on_rank0(functools.partial(atomic_write, folder / "config.json", text))
        generation.run()
        summary = {
            "method": config.method,
            "rows": len(generation.answers.rows),
            "dev_loss_before": None,
            "dev_loss": None,
            "seconds_per_sample": generation.seconds / max(1, len(generation.todo)),
        }

        def write() -> None:
            atomic_write(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
            with atomic_folder(folder / "final") as final:
                shutil.copy(growing, final)

        try:
            distributed.run_on_rank0(write)
        except WRITE_ERRORS as error:
            raise Interrupted(f"{folder / 'final'} can't be written ({error}): make room") from None
    return summary


def describe(config: Config) -> Iterator[str]:
    """What `write_stage` would do. Loads no weights; raises ConfigError."""
    rows, sampling = read_rows(config.data.train, config.data.train_rows, prompts_only=True), config.sampling
    yield json.dumps(config.to_dict(), indent=2)
    yield (
        f"  answers    to {len(rows)} prompts, by {config.student.path}, each of at most {sampling.max_new_tokens} "
        f"tokens at temperature {sampling.temperature:g}, {sampling.batch_size} at a time"
    )


def _of_stage(config: Config, out: pathlib.Path) -> Generation:
    """The command that a stage with method generate stands for. Raises ConfigError."""
    return Generation(
        argparse.Namespace(
            **dataclasses.asdict(config.sampling),
            min_new_tokens=0,
            no_repeat_ngram_size=0,
            data=config.data.train,
            rows=config.data.train_rows,
            max_length=config.data.max_length,
            max_prompt_length=config.data.max_prompt_length,
            out=out,
            tokenizer=config.tokenizer,
            seed=config.run.seed,
            device=config.train.device,
            dtype=config.train.dtype,
        ),
        config.student,
    )


def hash_weights(spec: ModelConfig, config: PretrainedConfig) -> dict[str, str]:
    """What identifies a model's weights, those of its adapter included."""
    adapter = lora.find_adapter(spec.adapter, "model") if spec.adapter else None
    hash_weights = functools.partial(identity.hash_weights, spec.path, config, cache_folder(), adapter)
    return distributed.run_on_rank0(hash_weights)


def generate(
    model: PackedCausalLM,
    prompts: list[list[int]],
    settings: SamplingParams,
    seeds: list[int],
    batch_size: int,
    keep: Callable[[int, list[int]], None],
    name: str,
) -> None:
    """Samples, with a progress bar of that name; each response goes to `keep` as it ends, after its prompt's number.

    Ranks share the prompts. Raises Interrupted after a signal, once the response at hand is kept.
    """
    numbers = distributed.local_shard(list(range(len(prompts))))
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True), TextColumn(name)
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    task = bar.add_task(name, total=len(numbers))
    signals = StopSignals()
    done = 0

    def on_response(number: int, response: list[int]) -> None:
        nonlocal done
        keep(numbers[number], response)
        done += 1
        bar.advance(task)
        if signals.received:
            raise Interrupted(signals.received)

    with signals, bar:
        with contextlib.suppress(Interrupted):
            sampling.sample(
                model,
                distributed.local_shard(prompts),
                settings,
                distributed.local_shard(seeds),
                batch_size,
                on_response,
            )
        if stop := signals.of_any_rank():
            raise Interrupted(f"{stop} after {done} of {len(numbers)} {name}, which are kept")


class GrowingFile:
    """JSON objects, a line each, that come in any order, and are sorted by their "row" in the end.

    A context manager: while it is entered the file is open for additions. A crash costs the last line at most. Other
    ranks than the main one add to files of their own, NAME.rank1, …, which it joins to the first.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.rows = {values["row"] for values in distributed.run_on_rank0(self.read)}

    def _others(self) -> list[pathlib.Path]:
        return list(self.path.parent.glob(f"{glob.escape(self.path.name)}.rank*"))

    def read(self) -> list[dict]:
        """Whole lines of all ranks; what is damaged, or what a crash left of the last one, does not count."""
        lines = []
        for path in filter(pathlib.Path.exists, (self.path, *self._others())):
            lines += path.read_bytes().splitlines(keepends=True)
        found = {}  # by row: a crash may have left some in two files
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                values = json.loads(line)
                found[int(values["row"])] = values
        return [*found.values()]

    def __enter__(self) -> GrowingFile:
        distributed.run_on_rank0(lambda: self._write(self.read()))
        own = self.path if distributed.is_rank0() else self.path.with_name(f"{self.path.name}.rank{distributed.rank()}")
        self.file = own.open("a", encoding="utf-8", buffering=1)
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def add(self, row: int, values: dict) -> None:
        self.file.write(json.dumps({**values, "row": row}, ensure_ascii=False) + "\n")
        self.rows.add(row)

    def sort(self) -> list[dict]:
        """Puts the lines of all ranks into the order of their rows, and returns them."""
        distributed.barrier()  # all have written theirs
        lines = distributed.run_on_rank0(lambda: sorted(self.read(), key=lambda values: values["row"]))
        distributed.run_on_rank0(lambda: self._write(lines))
        self.rows = {values["row"] for values in lines}
        return lines

    def _write(self, lines: list[dict]) -> None:
        atomic_write(self.path, "".join(json.dumps(values, ensure_ascii=False) + "\n" for values in lines))
        for path in self._others():
            path.unlink()


class Answers(GrowingFile):
    """A file of answers and, beside it, what they depend on."""

    def __init__(self, path: pathlib.Path, identity: dict) -> None:
        """Finds the numbers of the rows that are answered already. Raises ConfigError where the path can't be used."""
        self.identity, self.finished = identity, False
        self.record = path.with_name(path.name + ".settings.json")
        if path.exists():
            self._compare(path)
        if not self.finished and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise ConfigError(f"out: {path.parent} is not a folder that can be written to")
        super().__init__(path)

    def _compare(self, path: pathlib.Path) -> None:
        try:
            then = json.loads(self.record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise ConfigError(f"out: {path} exists, and not as the result of this command: choose another") from None
        self.finished = then.pop("finished")
        changed = [key for key, value in self.identity.items() if then.get(key) != value]
        if changed:
            raise ConfigError(f"out: {path} was made with other {', '.join(changed)}: choose another, or delete it")

    def _write_record(self, finished: bool) -> None:
        text = json.dumps({**self.identity, "finished": finished}, indent=2) + "\n"
        distributed.run_on_rank0(functools.partial(atomic_write, self.record, text))

    def __enter__(self) -> Answers:
        self._write_record(finished=False)
        super().__enter__()
        return self

    def finish(self) -> None:
        """Puts the answers into the order of their rows."""
        self.sort()
        self._write_record(finished=True)
