"""A model's responses to the prompts of a data set, as data to train on. Their file grows response by response."""

from __future__ import annotations

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

from .. import distributed
from ..config.sampling import SamplingParams
from ..config.schema import Config, ModelConfig, RunConfig, SamplingConfig
from ..console import console
from ..data.rows import Row, read_rows
from ..data.tokenize import encode_prompts
from ..device import choose_device, choose_dtype
from ..errors import ConfigError, Interrupted, check_number
from ..files import WRITE_ERRORS, atomic_folder, atomic_write, exclusive, locked
from ..models import identity, loading
from ..models.packed import PackedCausalLM
from ..signals import StopSignals
from .sampling import sample


class Generation:
    """Responses of one model to the prompts of one data set, in one file."""

    def __init__(
        self,
        spec: ModelConfig,
        data: str | list[Row],
        out: pathlib.Path,
        sampling: SamplingParams,
        *,
        rows: int | None = None,
        max_prompt_length: int | None = None,
        seed: int = RunConfig.seed,
        batch_size: int = SamplingConfig.batch_size,
        tokenizer: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ) -> None:
        """Checks all that can be checked without weights, and finds responses that are there already. Writes nothing.

        Args:
            data: JSONL file, folder or Hub name, whose outputs are not read; or the rows that `read_rows` returned.
            out: the JSONL file of responses.
            rows: use only the first ones of a file.
            max_prompt_length: rows with longer prompts, in tokens, are left out.
            seed: a response depends on it, its row's number and its prompt.
            tokenizer: folder or Hub name; the model's by default.

        Raises ConfigError.
        """
        for name, value in {"rows": rows, "batch_size": batch_size, "max_prompt_length": max_prompt_length}.items():
            check_number(name, value, 1)
        self.spec, self.out, self.seed, self.batch_size = spec, out, seed, batch_size
        self.max_prompt_length = max_prompt_length
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.hf_config = loading.read_hf_config(spec, "model")
        self.tokenizer = loading.read_tokenizer(tokenizer or spec.path, "tokenizer")
        loading.check_vocabularies(self.tokenizer, self.hf_config, None, None)
        self.end = self.tokenizer.eos_token_id
        self.sampling = dataclasses.replace(sampling, eos_token_ids=(self.end,))
        self.rows = data if isinstance(data, list) else read_rows(data, rows, prompts_only=True)
        self.prompts = encode_prompts(self.rows, self.tokenizer)
        longest = math.inf if max_prompt_length is None else max_prompt_length
        self.used = [index for index, prompt in enumerate(self.prompts) if len(prompt) <= longest]
        self._check_positions()
        self.identity = {
            "weights": identity.hash_weights(spec, self.hf_config, "model"),
            "prompts": hashlib.sha256(json.dumps([self.prompts, self.end]).encode()).hexdigest(),
            "max_prompt_length": max_prompt_length,
            "seed": seed,
            "dtype": str(self.dtype).removeprefix("torch."),
            **sampling.to_dict(),
        }
        self.answers = Answers(out, self.identity)
        self.todo, self.tokens, self.seconds = [], 0, 0.0

    def _check_positions(self) -> None:
        positions = getattr(self.hf_config, "max_position_embeddings", math.inf)
        for index in self.used:
            if (length := len(self.prompts[index])) >= positions:
                raise ConfigError(
                    f"{self.rows[index].where}: the prompt has {length} tokens, and the model {positions} positions: "
                    "no room for an answer; drop the row, or lower max_prompt_length"
                )

    def run(self) -> None:
        """Answers the prompts that have no response yet.

        Raises Interrupted after a signal, and if there is no room on the disk. Raises ConfigError if another process
        is writing the same file.
        """
        lock = self.out.with_name(self.out.name + ".lock")
        busy = f"out: another process is writing {self.out}: wait for it, or choose another"
        with contextlib.nullcontext() if self.answers.finished else distributed.rank0_context(exclusive(lock, busy)):
            self.answers = Answers(self.out, self.identity)  # another process may have added some meanwhile
            self._answer_all()
            if distributed.is_rank0():
                lock.unlink(missing_ok=True)  # nobody writes to a finished file

    def _answer_all(self) -> None:
        answers = self.answers
        if answers.finished:
            console.print(f"{self.out} is finished already")
            return
        self.todo = [index for index in self.used if index not in answers.rows]
        dtype = self.identity["dtype"]
        console.print(f"{len(self.todo)} of {len(self.rows)} prompts to answer, on {self.device}, in {dtype}")
        model = loading.load(self.spec, self.hf_config, "model", self.dtype, self.device)
        started = time.perf_counter()
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16), answers:
                model.check()
                self._answer(model)
                answers.finish()
                self.tokens = distributed.all_reduce_count(self.tokens)
        except WRITE_ERRORS as error:
            raise Interrupted(f"{self.out} can't be written ({error}): make room") from None
        self.seconds = time.perf_counter() - started
        left_out = f"{len(self.used) - len(answers.rows)} were empty and are left out"
        if long := len(self.rows) - len(self.used):
            left_out += f", and so are {long} prompts of more than {self.max_prompt_length} tokens"
        console.print(
            f"{len(answers.rows)} answers in {self.out}; {left_out}; {self.tokens} tokens in {self.seconds:.1f} s, "
            f"{self.tokens / self.seconds:.0f} tokens/s"
        )

    def _answer(self, model: PackedCausalLM) -> None:
        def keep(number: int, response: list[int]) -> None:
            index = self.todo[number]
            text = self.tokenizer.decode(response, skip_special_tokens=True)
            values = self.rows[index].values
            if "prompt_ids" in values:
                values = {"prompt": self.tokenizer.decode(self.prompts[index])}
            if text.strip():  # an empty response teaches nothing
                self.answers.add(index, {**_as_row(values, text), "ended": response[-1] == self.end})
            self.tokens += len(response)

        seeds = [(self.seed << 32) + index for index in self.todo]
        prompts = [self.prompts[index] for index in self.todo]
        generate(model, prompts, self.sampling, seeds, self.batch_size, keep, "answers")


def _as_row(values: dict, output: str) -> dict:
    """A checked row with this output."""
    if "messages" in values:
        return {"messages": [*values["messages"][:-1], {"role": "assistant", "content": output}]}
    return {"prompt": values["prompt"], "output": output}


def write_stage(config: Config, rows: list[Row]) -> dict:
    """Runs a stage with method generate: its student answers `rows`, those of data.train. Returns the stage's summary.

    The folder `final`, with one file of all responses, is written last. Raises ConfigError and Interrupted.
    """
    folder = config.run.folder
    growing = folder / "answers.jsonl"
    with distributed.rank0_context(locked(folder)):
        console.print(
            f"[bold]{folder}[/bold]  method {config.method}, by {config.student.adapter or config.student.path}"
        )
        generation = Generation(
            config.student,
            rows,
            growing,
            SamplingParams.from_options(config.sampling, max_length=config.data.max_length),
            max_prompt_length=config.data.max_prompt_length,
            seed=config.run.seed,
            batch_size=config.sampling.batch_size,
            tokenizer=config.tokenizer,
            device=config.train.device,
            dtype=config.train.dtype,
        )
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


def describe(config: Config, rows: list[Row]) -> Iterator[str]:
    """Lines that say what `write_stage` would do."""
    sampling = config.sampling
    yield json.dumps(config.to_dict(), indent=2)
    yield (
        f"  answers    to {len(rows)} prompts, by {config.student.path}, each of at most {sampling.max_new_tokens} "
        f"tokens at temperature {sampling.temperature:g}, {sampling.batch_size} at a time"
    )


def generate(
    model: PackedCausalLM,
    prompts: list[list[int]],
    sampling: SamplingParams,
    seeds: list[int],
    batch_size: int,
    keep: Callable[[int, list[int]], None],
    name: str,
) -> None:
    """Samples with a progress bar called `name`. Calls `keep(number, response)`, with the prompt's number, at each end.

    Ranks share the prompts. Raises Interrupted after a signal, once the current response is kept.
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
            sample(
                model,
                distributed.local_shard(prompts),
                sampling,
                distributed.local_shard(seeds),
                batch_size,
                on_response,
            )
        if stop := signals.of_any_rank():
            raise Interrupted(f"{stop} after {done} of {len(numbers)} {name}, which are kept")


class GrowingFile:
    """A file of JSON objects, one a line, that come in any order and are sorted by their "row" in the end.

    A context manager: additions are possible while it is entered. A crash costs the last line at most. Ranks other
    than 0 write files of their own, NAME.rank1, …; `sort` joins them to the first.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.rows = {values["row"] for values in distributed.run_on_rank0(self.read)}

    def _others(self) -> list[pathlib.Path]:
        return list(self.path.parent.glob(f"{glob.escape(self.path.name)}.rank*"))

    def read(self) -> list[dict]:
        """The whole lines of all ranks. Damaged lines, and what a crash left of the last one, are skipped."""
        lines = []
        for path in filter(pathlib.Path.exists, (self.path, *self._others())):
            lines += path.read_bytes().splitlines(keepends=True)
        found = {}  # keyed by row: after a crash one may be in two files
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
        """Sorts the lines of all ranks by their rows, and returns them."""
        distributed.barrier()  # until all ranks have written theirs
        lines = distributed.run_on_rank0(lambda: sorted(self.read(), key=lambda values: values["row"]))
        distributed.run_on_rank0(lambda: self._write(lines))
        self.rows = {values["row"] for values in lines}
        return lines

    def _write(self, lines: list[dict]) -> None:
        atomic_write(self.path, "".join(json.dumps(values, ensure_ascii=False) + "\n" for values in lines))
        for path in self._others():
            path.unlink()


class Answers(GrowingFile):
    """A file of responses and, beside it, NAME.settings.json: what they depend on."""

    def __init__(self, path: pathlib.Path, identity: dict) -> None:
        """Finds the rows that have responses already. Raises ConfigError for a path that can't be used."""
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
        """Sorts the responses by their rows, and records that none is missing."""
        self.sort()
        self._write_record(finished=True)
