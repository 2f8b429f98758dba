"""A model's responses to prompts, in files that grow response by response; and such files as data to train on."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator

import torch

from .. import distributed, manifest, processes
from ..config.models import ModelConfig
from ..config.sampling import SamplingParams
from ..config.schema import Config, RunConfig, SamplingConfig
from ..console import ProgressBar, console, styled
from ..data.chat import PromptFormat
from ..data.encode import begin_token
from ..data.row_teachers import TeacherNames
from ..data.rows import Row, read_rows
from ..data.tokenize import encode_prompts
from ..device import choose_device, choose_dtype
from ..errors import ConfigError, Interrupted, check_number, disk_errors
from ..files import atomic_folder, check_path_length, exclusive, file_checksum, read_json, write_json
from ..finished import locked_run
from ..models import identity, loading, tokenizers
from ..models.vocabularies import Vocabulary
from ..signals import StopSignals
from .growing_file import GrowingFile
from .sampling import response_seeds, sample


class Generator:
    """One model that answers prompts."""

    def __init__(
        self,
        spec: ModelConfig,
        tokenizer: tuple[str, str],
        sampling: SamplingParams,
        batch_size: int,
        device: str,
        dtype: str,
        style: PromptFormat = PromptFormat(),  # noqa: B008 - it is frozen
        chat_template: str | None = None,
    ) -> None:
        """Checks all that can be checked without weights. Raises ConfigError.

        Args:
            tokenizer: folder or Hub name, and what to call it in messages.
            chat_template: a file with one in place of the tokenizer's.
        """
        check_number("batch_size", batch_size, 1)
        self.spec, self.batch_size, self.style = spec, batch_size, style
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.dtype_name = str(self.dtype).removeprefix("torch.")
        meta = loading.read_meta_model(spec, "model")
        self.hf_config, self.whole_config = meta.config, meta.whole
        self.tokenizer = tokenizers.read_tokenizer(*tokenizer)
        tokenizers.use_chat_template(self.tokenizer, chat_template, "chat_template", style)
        self.ends = tokenizers.end_tokens(spec.path, self.tokenizer, style)
        Vocabulary(self.tokenizer, {"model": self.hf_config.vocab_size}).check(self.ends, "the end of responses")
        self.sampling = dataclasses.replace(sampling, eos_token_ids=self.ends)

    def token_settings(self) -> dict:
        """What the tokens of prompts and the ends of responses depend on, besides the tokenizer: for files, as text."""
        template = json.dumps(self.tokenizer.chat_template, sort_keys=True)
        kwargs = self.style.chat_template_kwargs
        return {
            "begin_token": bool(begin_token(self.tokenizer, self.style, is_chat=False)),  # before plain text
            "chat_template": self.tokenizer.chat_template and hashlib.sha256(template.encode()).hexdigest()[:12],
            "chat_template_kwargs": kwargs and json.dumps(kwargs, sort_keys=True),
            "end_tokens": " ".join(map(str, self.ends)),
        }

    def hash_weights(self) -> dict[str, str]:
        return identity.hash_weights(self.spec, self.whole_config, "model")

    @contextlib.contextmanager
    def loaded(self, out: pathlib.Path) -> Iterator[None]:
        """A context in which `generate` can be called. Raises Interrupted where `out` can't be written to."""
        self.model = loading.load(self.spec, self.whole_config, "model", self.dtype, self.device)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)
        try:
            with disk_errors(out), autocast:
                self.model.check()
                yield
        finally:
            del self.model  # the next stage needs the memory

    def generate(
        self, prompts: list[list[int]], seeds: list[int], keep: Callable[[int, list[int]], None], name: str
    ) -> None:
        """Samples a response to each prompt, with a progress bar called `name`. Ranks share the prompts.

        Calls `keep(number, response)`, with the prompt's number, when a response ends. Raises Interrupted after a
        signal, once the current response is kept.
        """
        numbers, prompts, seeds = map(distributed.local_shard, (range(len(prompts)), prompts, seeds))
        bar, signals, done = ProgressBar(name), StopSignals(), 0
        task = bar.add_task(name, total=len(numbers))

        def on_response(number: int, response: list[int]) -> None:
            nonlocal done
            keep(numbers[number], response)
            done += 1
            bar.advance(task)
            if signals.received:
                raise Interrupted(signals.received)

        with signals, bar:
            with contextlib.suppress(Interrupted):
                sample(self.model, prompts, self.sampling, seeds, self.batch_size, on_response)
            if stop := signals.of_any_rank():
                raise Interrupted(f"{stop} after {done} of {len(numbers)} {name}, which are kept")


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
        style: PromptFormat = PromptFormat(),  # noqa: B008 - it is frozen
        chat_template: str | None = None,
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
            style: how rows become prompts.
            chat_template: a file with one in place of the tokenizer's.

        Raises ConfigError.
        """
        check_path_length("out", out, is_written=True)
        for name, value in {"rows": rows, "max_prompt_length": max_prompt_length}.items():
            check_number(name, value, 1)
        self.out, self.seed, self.max_prompt_length = out, seed, max_prompt_length
        named = tokenizer or tokenizers.tokenizer_path(spec), "tokenizer"
        self.model = Generator(spec, named, sampling, batch_size, device, dtype, style, chat_template)
        self.tokenizer = self.model.tokenizer
        self.rows = (
            data if isinstance(data, list) else read_rows(data, rows, outputs="ignored", teachers=TeacherNames())
        )
        self.prompts = encode_prompts(self.rows, self.tokenizer, style)
        longest = math.inf if max_prompt_length is None else max_prompt_length
        self.used = [index for index, prompt in enumerate(self.prompts) if len(prompt) <= longest]
        loading.check_prompts(self.model.hf_config, ((self.rows[i].where, self.prompts[i]) for i in self.used))
        prompts = json.dumps([self.prompts, self.tokenizer.eos_token_id])
        self.identity = {
            "weights": self.model.hash_weights(),
            "prompts": hashlib.sha256(prompts.encode()).hexdigest(),
            "max_prompt_length": max_prompt_length,
            "seed": seed,
            "dtype": self.model.dtype_name,
            **self.model.token_settings(),
            **sampling.to_dict(),
        }
        processes.check_same(self.identity)
        self.answers = Answers(out, self.identity, self.prompts)
        self.todo, self.tokens, self.seconds = [], 0, 0.0

    def run(self) -> None:
        """Answers the prompts that have no response yet.

        Raises Interrupted after a signal, and if there is no room on the disk. Raises ConfigError if another process
        is writing the same file.
        """
        lock = self.out.with_name(self.out.name + ".lock")
        busy = f"out: another process is writing {self.out}: wait for it, or choose another"
        with contextlib.nullcontext() if self.answers.finished else distributed.rank0_context(exclusive(lock, busy)):
            # Again: another process may have added some meanwhile.
            self.answers = Answers(self.out, self.identity, self.prompts)
            if self.answers.finished:
                console.print(f"{self.out} is finished already")
            else:
                self._answer_all()
            if distributed.is_rank0():
                lock.unlink(missing_ok=True)  # nobody writes to a finished file

    def _answer_all(self) -> None:
        answers, model = self.answers, self.model
        self.todo = [index for index in self.used if index not in answers.rows]
        counts = f"{len(self.todo)} of {len(self.rows)} prompts"
        console.print(f"{counts} to answer, on {model.device}, in {model.dtype_name}")
        with model.loaded(self.out):
            started = time.perf_counter()
            with answers:
                seeds = response_seeds((self.seed, index) for index in self.todo)
                model.generate([self.prompts[index] for index in self.todo], seeds, self._keep, "answers")
                answers.finish()
                self.tokens = distributed.all_reduce_count(self.tokens)
        self.seconds = time.perf_counter() - started
        left_out = f"{len(self.used) - len(answers.rows)} were empty and are left out"
        if long := len(self.rows) - len(self.used):
            left_out += f", and so are {long} prompts of more than {self.max_prompt_length} tokens"
        speed = f"{self.tokens} tokens in {self.seconds:.1f} s, {self.tokens / self.seconds:.0f} tokens/s"
        console.print(f"{len(answers.rows)} answers in {self.out}; {left_out}; {speed}")

    def _keep(self, number: int, response: list[int]) -> None:
        index = self.todo[number]
        ids = [token for token in response if token < len(self.tokenizer)]  # a model may have more, which say nothing
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        values = self.rows[index].values
        if "messages" in values:
            row = {"messages": [*values["messages"], {"role": "assistant", "content": text}]}
            row |= {"tools": values["tools"]} if "tools" in values else {}
        else:
            prompt = values["prompt"] if "prompt" in values else self.tokenizer.decode(self.prompts[index])
            row = {"prompt": prompt, "output": text}
        row |= {"prompt_ids": self.prompts[index], "output_ids": ids}  # a text may have lost tokens
        row |= {"teacher": self.rows[index].teacher} if self.rows[index].teacher else {}
        if text.strip():  # an empty response teaches nothing
            self.answers.add(index, {**row, "ended": response[-1] in self.model.ends})
        self.tokens += len(response)


def write_stage(config: Config, rows: list[Row], resume: bool) -> dict:
    """Runs a stage with method generate: its student answers `rows`, those of data.train. Returns the stage's summary.

    The folder `final`, with one file of all responses, is written last. Raises ConfigError and Interrupted.
    """
    folder = config.run.folder
    growing = folder / "answers.jsonl"
    with locked_run(config, resume) as summary:
        if summary is not None:
            return summary
        model = config.student.adapter or config.student.path
        console.print(styled(f"{folder}", "bold", f"  method {config.method}, by {model}"))
        generation = Generation(
            config.student,
            rows,
            growing,
            SamplingParams.from_options(config.sampling, max_length=config.data.max_length),
            max_prompt_length=config.data.max_prompt_length,
            seed=config.run.seed,
            batch_size=config.sampling.batch_size,
            tokenizer=config.tokenizer,
            style=PromptFormat.from_config(config.data),
            chat_template=config.data.chat_template,
            device=config.train.device,
            dtype=config.train.dtype,
        )
        with disk_errors(folder):
            distributed.run_on_rank0(write_json, folder / "config.json", config.to_dict())
        generation.run()
        summary = {
            "method": config.method,
            "rows": len(generation.answers.rows),
            "dev_loss_before": None,
            "dev_loss": None,
            "seconds_per_sample": generation.seconds / max(1, len(generation.todo)),
        }

        def write() -> None:
            write_json(folder / "summary.json", summary)
            with atomic_folder(folder / "final") as final:
                shutil.copy(growing, final)
                manifest.write(final, folder / manifest.NAME)

        with disk_errors(folder / "final"):
            distributed.run_on_rank0(write)
    console.print(f"saved {folder / 'final'}")
    return summary


def describe(config: Config, rows: list[Row]) -> Iterator[str]:
    """Lines that say what `write_stage` would do."""
    sampling = config.sampling
    prompts = f"{len(rows)} prompts, by {config.student.path}, each of at most {sampling.max_new_tokens} tokens"
    yield f"  answers    to {prompts} at temperature {sampling.temperature:g}, {sampling.batch_size} at a time"


class Answers(GrowingFile):
    """A file of responses and, beside it, NAME.settings.json: what they depend on."""

    def __init__(self, path: pathlib.Path, identity: dict, prompts: list[list[int]]) -> None:
        """Finds the rows that have responses already. Raises ConfigError for a path that can't be used.

        prompts: the tokens of all rows. A line belongs to the file if it answers one of them.
        """
        if not path.name:
            raise ConfigError(f"out: {path} is a folder: name a file in it")
        self.identity = identity
        self.record = path.with_name(path.name + ".settings.json")
        self.finished = distributed.run_on_rank0(self._check, path)  # for all: it may change at any moment
        super().__init__(path, lambda values: [values.get("prompt_ids")] == prompts[values["row"] :][:1])

    def _check(self, path: pathlib.Path) -> bool:
        """Whether all responses are there. Raises ConfigError where they are others, or can't be written."""
        finished = False
        if path.exists():
            if not self.record.exists():
                raise ConfigError(f"out: {path} exists, and not as the result of this command: choose another")
            then = read_json(self.record, "choose another --out", {"finished": bool, "checksum?": int})
            finished = then["finished"]
            changed = [key for key, value in self.identity.items() if then.get(key) != value]
            if changed:
                raise ConfigError(f"out: {path} was made with other {', '.join(changed)}: choose another, or delete it")
            if finished and then.get("checksum") not in (None, file_checksum(path)):  # earlier versions wrote none
                raise ConfigError(f"out: {path} has changed since it was finished: choose another, or delete it")
        if not finished and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise ConfigError(f"out: {path.parent} is not a folder that can be written to")
        return finished

    def _write_record(self, finished: bool) -> None:
        def write() -> None:
            checksum = {"checksum": file_checksum(self.path)} if finished else {}
            write_json(self.record, {**self.identity, "finished": finished, **checksum})

        distributed.run_on_rank0(write)

    def __enter__(self) -> GrowingFile:
        self._write_record(finished=False)
        return super().__enter__()

    def finish(self) -> None:
        """Sorts the responses by their rows, and records that none is missing."""
        self.sort()
        self._write_record(finished=True)
