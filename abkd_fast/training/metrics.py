"""The log of a run: sums over the steps of a window, points and samples in files, TensorBoard and the terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import threading
import time
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TextIO

import torch
from torch import Tensor

from .. import distributed
from ..config.schema import Config
from ..console import ProgressBar, console, format_seconds, styled
from ..data.batches import StepBatch
from ..device import BusyMachine, peak_memory
from ..errors import printable
from ..evaluation import points
from ..evaluation import samples as answers
from ..evaluation.rouge import named
from ..files import open_own
from .costs import peak_flops
from .finite import is_finite
from .trackers import Trackers

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """A context manager that writes points to the run folder and shows them, on rank 0 alone."""

    def __init__(
        self,
        config: Config,
        steps: int,
        device: torch.device,
        done: int,
        elapsed: float,
        reports: dict[str, Callable],
    ) -> None:
        """done: steps of a resumed run, whose later points are dropped. -1: not even the evaluation before the first.
        elapsed: seconds that the resumed run had trained since its last point.
        reports: what `Given.reports` has. A function that returns true makes `is_stopped` true.
        """
        self.config, self.folder, self.steps, self.device = config, config.run.folder, steps, device
        self.done, self.elapsed, self.reports = done, elapsed, reports
        self.is_stopped, self.hook = False, threading.excepthook
        self.has_reports = distributed.all_reduce_max(len(reports)) > 0  # of some rank
        self.peak_flops = distributed.world_size() * (peak_flops(device) or 0)
        self.trackers = self.file = self.sample_file = self.board = None
        self.bar = ProgressBar("step", "{task.fields[numbers]}", bar_width=6)  # everything then fits into 84 columns
        self.task = self.bar.add_task("training", total=steps, numbers="")

    def __enter__(self) -> RunLog:
        distributed.run_on_rank0(self._open)
        self.started = time.perf_counter()
        self.last = self.started - self.elapsed
        self.machine = BusyMachine(self.device)
        return self

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path, sample_path = self.folder / points.FILE, self.folder / answers.FILE
        self.kept, dropped = _drop_points(path, self.done) if path.exists() else (set(), set())
        if sample_path.exists():
            _drop_points(sample_path, self.done)
        self.trackers = Trackers(self.config, dropped)
        self.file = open_own(path, "a", encoding="utf-8", buffering=1)
        if self.config.log.samples:
            self.sample_file = open_own(sample_path, "a", encoding="utf-8", buffering=1)
        threading.excepthook = self._on_thread_error
        try:
            self.board = SummaryWriter(self.folder / "tensorboard", purge_step=self.done + 1)
        except OSError as error:
            self._give_up_board(error)
        self.bar.start()

    def __exit__(self, *error: types.TracebackType | None) -> None:
        threading.excepthook = self.hook
        self.bar.stop()
        if self.trackers:
            self.trackers.finish()
        for log in filter(None, (self.board, self.file, self.sample_file)):
            _close(log)

    def pause(self) -> None:
        """Stops the clock until `resume`, for an evaluation or a checkpoint."""
        self.paused = time.perf_counter()

    def resume(self) -> None:
        away = time.perf_counter() - self.paused
        self.last += away
        self.started += away

    @property
    def window_seconds(self) -> float:
        """Seconds of training since the last point; valid while paused."""
        return self.paused - self.last

    def flush(self) -> None:
        """Flushes all points to the disk."""
        for file in filter(None, (self.file, self.sample_file)):
            file.flush()
            os.fsync(file.fileno())
        self._show("flush")

    def advance(self, step: int, **fields: str) -> None:
        """Shows the number of steps, with fields of the bar."""
        self.bar.update(self.task, completed=step, **fields)
        if hint := self.machine.hint():
            console.print(hint)

    def train(self, step: int, values: dict[str, float | None], counts: dict[str, int]) -> None:
        """Writes one point over the steps since the last one. Synchronize the device before.

        counts: samples, tokens computed, tokens of samples ("real_tokens") and operations ("flops") of these steps.
        """
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        taken = max(1, step - max(self.done, 0))  # a resumed run that ends at once has taken none
        left = (now - self.started) / taken * (self.steps - step)
        samples, tokens, real_tokens, flops = (counts[n] for n in ("samples", "tokens", "real_tokens", "flops"))
        values = values | {
            "samples_per_second": samples / seconds,
            "seconds_per_sample": seconds / samples,
            "tokens_per_second": real_tokens / seconds,
            "real_token_share": real_tokens / tokens,
            "tflops_per_second": flops / seconds / 1e12,
            "mfu": flops / seconds / self.peak_flops if self.peak_flops else None,
            "peak_memory_bytes": peak_memory(self.device),
        }
        self._write("train", step, values)
        mean = "-" if values["loss"] is None else f"{values['loss']:.4f}"
        text = (
            f"loss {mean} {samples / seconds:.1f} samples/s {seconds / samples:.4f} s/sample "
            f"{real_tokens / seconds:.0f} tokens/s {values['peak_memory_bytes'] / 2**30:.1f} GiB"
        ) + (f" mfu {values['mfu']:.0%}" if self.peak_flops else "")
        self.bar.restart_pause()  # the line below says more
        self.advance(step, numbers=text)
        if not console.is_terminal:
            names = [*values][1 : [*values].index("lr")]  # parts of the loss, and the method's own values
            named = "".join(f"  {name} {values[name]:.5g}" for name in names if values[name] is not None)
            console.print(
                f"step {step}/{self.steps}  {text}{named}  lr {values['lr']:.1e}  left {format_seconds(left)}"
            )

    def evaluation(self, step: int, dev_loss: float, rouge_l: float | None, samples: list[dict]) -> None:
        """Writes a measurement on the development rows. samples: what `DevAnswers.measure` gives."""
        self._write_samples(step, samples)
        told = {"samples": samples} if samples else {}
        self._write("dev", step, {"loss": dev_loss} | ({} if rouge_l is None else {"rouge_l": rouge_l}), **told)
        rouge = "" if rouge_l is None else f"  {named('ROUGE-L', self.config.eval.rouge_tokens)} {rouge_l:.2f}"
        console.print(f"step {step}/{self.steps}  dev loss {dev_loss:.4f}{rouge}")
        if samples:
            text = printable(samples[0]["response"])
            text = text if len(text) <= 100 else f"{text[:99]}…"
            console.print(f"step {step}/{self.steps}  sample 1 of {len(samples)}: {text}")

    def _write_samples(self, step: int, samples: list[dict]) -> None:
        """Writes answers to dev prompts. On a full disk they are lost, not the run."""
        if not self.sample_file:
            return
        try:
            for sample in samples:
                self.sample_file.write(json.dumps({"step": step, **sample}) + "\n")
        except OSError as error:
            console.print(styled("no samples", "bold red", f" of step {step} ({error}); training goes on"))
        for number, sample in enumerate(samples, 1):
            texts = sample["prompt"], *sample["output"], sample["response"]
            names = "Prompt", *("Reference" for _ in sample["output"]), "Answer"
            parts = (f"{name}:\n\n{answers.fenced(text)}" for name, text in zip(names, texts, strict=True))
            self._show("add_text", f"samples/{number}", "\n\n".join(parts), step)

    def _write(self, kind: str, step: int, values: dict[str, float | None], **told: object) -> None:
        """Writes a point. On a full disk the point is lost, not the run. told: what a function gets besides."""
        if not self.file or (kind, step) in self.kept:  # as the last point of a run that ends early may be
            return
        try:
            self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        except OSError as error:
            console.print(styled("no log", "bold red", f" of step {step} ({error}); training goes on"))
        for name, value in values.items():
            if value is not None:
                self._show("add_scalar", f"{kind}/{name}", value, step)
        self.trackers.log(kind, step, values)
        self.report(kind, {"step": step, **values, **told})

    def _show(self, method: str, *arguments: object) -> None:
        """Calls a method of TensorBoard's writer. One that fails is closed: it would repeat its first error forever."""
        if not self.board:
            return
        try:
            getattr(self.board, method)(*arguments)
        except OSError as error:
            self._give_up_board(error)

    def _give_up_board(self, error: OSError) -> None:
        console.print(styled("no TensorBoard", "bold red", f" from here on ({error}); training goes on"))
        if self.board:
            _close(self.board)
        self.board = None

    def _on_thread_error(self, error: threading.ExceptHookArgs) -> None:
        """Prints no traceback of a disk error in TensorBoard's thread, which its writer raises, too."""
        if not isinstance(error.exc_value, OSError):
            self.hook(error)

    def ends_run(self) -> bool:
        """Whether a function has ended the run. Collective."""
        return self.has_reports and distributed.all_reduce_max(self.is_stopped) > 0

    def report(self, kind: str, value: object) -> None:
        """Tells the function for this kind, on rank 0."""
        if self.file and kind in self.reports and self.reports[kind](value):
            self.is_stopped = True


def _close(log: SummaryWriter | TextIO) -> None:
    with contextlib.suppress(OSError):  # a full disk was reported before
        log.close()


def _drop_points(path: pathlib.Path, done: int) -> tuple[set[tuple[str, int]], set[tuple[str, int]]]:
    """Cuts off the points after step `done`, and what a crash left unfinished. A damaged line between others stays.

    Returns kinds and steps: of the points of step `done`, and of those that were cut off.
    """
    length, end, kept, dropped = 0, 0, set(), set()
    with open_own(path, "r+b") as file:
        for line in file:
            end += len(line)
            point = points.parse_line(line)
            if point is None or not line.endswith(b"\n"):
                continue
            name = point.get("kind"), point["step"]
            if dropped or name[1] > done:
                dropped.add(name)
                continue
            length = end
            if name[1] == done:
                kept.add(name)
        file.truncate(length)
    return kept, dropped


class MetricsWindow:
    """Sums since the last logged point. They stay on the device, because reading them would wait for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.loss = torch.zeros((), device=device, dtype=torch.float64)  # sum over the finite steps
        self.norm = torch.zeros((), device=device, dtype=torch.float64)  # gradient norm of the last finite step
        self.skipped = torch.zeros((), device=device, dtype=torch.int64)
        self.first_nonfinite = torch.zeros(3, device=device, dtype=torch.float64)  # step, loss and norm
        self.parts: dict[str, Tensor] = {}  # parts of the loss: their sum over finite steps, and how many had them
        self.expert_tokens: Tensor | None = None  # of each expert of a mixture, this rank's alone
        self.rows: list[list[int]] = []  # for each step the data rows behind its samples
        self.steps = self.samples = self.real_tokens = self.max_rank_tokens = 0
        self.tokens = self.flops = 0  # this rank's alone

    def add(
        self, step: int, loss: Tensor, norm: Tensor, parts: dict[str, Tensor], batch: StepBatch, flops: int
    ) -> None:
        finite = is_finite(loss, norm)
        self.loss += torch.where(finite, loss, 0.0)
        for name, part in parts.items():
            added = torch.stack([torch.where(finite, part, 0.0).double(), finite.double()])
            self.parts[name] = self.parts.get(name, 0.0) + added
        self.norm = torch.where(finite, norm, self.norm)
        account = torch.stack([torch.full_like(self.loss, step), loss.double(), norm.double()])
        is_first = ~finite & (self.skipped == 0)
        self.first_nonfinite = torch.where(is_first, account, self.first_nonfinite)
        self.skipped += ~finite
        self.steps += 1
        self.rows.append([sample["row"] for sample in batch.samples])
        self.samples += len(self.rows[-1])
        self.real_tokens += sum(len(sample["input_ids"]) for sample in (*batch.samples, *batch.pretrain_blocks))
        self.max_rank_tokens += batch.max_rank_tokens
        self.tokens += sum(part.tokens for part in batch.micro_batches)
        self.flops += flops

    def describe_nonfinite(self, step: int, where: Sequence[str]) -> str:
        """The first step that was not finite, by its numbers and the rows behind its samples.

        step: the last step of the window. where: names of all rows.
        """
        first, loss, norm = self.first_nonfinite.tolist()
        numbers = {}
        for row in sorted({*self.rows[int(first) - step - 1]}):
            source, _, number = where[row].rpartition(" ")
            numbers.setdefault(source, []).append(number)
        samples = "; ".join(f"{source} {', '.join(numbers[source])}" for source in numbers)
        return f"step {int(first)}: loss {loss:.4g}, gradient norm {norm:.4g}, samples {samples}"

    def add_expert_tokens(self, tokens: Tensor) -> None:
        """Adds a step's tokens of each expert, and sets them to 0."""
        self.expert_tokens = tokens.clone() if self.expert_tokens is None else self.expert_tokens + tokens
        tokens.zero_()

    def all_expert_tokens(self) -> Tensor:
        """The tokens of each expert, summed over all ranks. Collective."""
        return distributed.all_reduce_sum(self.expert_tokens.clone())

    def write(self, log: RunLog, step: int, lr: float, numbers: dict[str, float]) -> int:
        """Logs a point, with the method's own `numbers`. Returns how many steps were skipped. Collective."""
        skipped = int(self.skipped)
        finite = self.steps - skipped
        means = {"loss": self.loss.item() / finite if finite else None}
        for name, (total, steps) in ((name, part.tolist()) for name, part in self.parts.items()):
            means[name] = total / steps if steps else None
        norm = self.norm.item() if finite else None
        if distributed.world_size() > 1:  # how much more than the mean the busiest rank had
            numbers = numbers | {"imbalance": self.max_rank_tokens * distributed.world_size() / self.real_tokens - 1}
        log.train(step, {**means, **numbers, "lr": lr, "grad_norm": norm, "skipped_steps": skipped}, self.counts())
        return skipped

    def counts(self) -> dict[str, int]:
        """The counters, summed over all ranks. Collective."""
        own = {name: distributed.all_reduce_count(getattr(self, name)) for name in ("tokens", "flops")}
        shared = ("steps", "samples", "real_tokens", "max_rank_tokens")
        return {name: getattr(self, name) for name in shared} | own

    def tensors(self) -> dict[str, Tensor]:
        """The window for a checkpoint, summed over all ranks. Collective."""
        counts, rows = torch.tensor([*self.counts().values()]), torch.tensor(self.rows, dtype=torch.int64)
        sums = {"loss": self.loss, "norm": self.norm, "skipped": self.skipped, "first_nonfinite": self.first_nonfinite}
        sums |= {f"parts.{name}": part for name, part in self.parts.items()}
        if self.expert_tokens is not None:
            sums["expert_tokens"] = self.all_expert_tokens()
        return {"counts": counts, "rows": rows} | {name: value.cpu() for name, value in sums.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.steps, self.samples, self.real_tokens, self.max_rank_tokens, *own = tensors["counts"].tolist()
        self.tokens, self.flops = own if distributed.is_rank0() else (0, 0)
        self.rows = tensors["rows"].tolist()
        own = {name: value.to(self.device, copy=True) for name, value in tensors.items()}
        if "expert_tokens" in own:
            self.expert_tokens = own["expert_tokens"] * distributed.is_rank0()
        for name in ("loss", "norm", "skipped", "first_nonfinite"):
            setattr(self, name, own[name])
        self.parts = {name.removeprefix("parts."): own[name] for name in own if name.startswith("parts.")}
        for name, part in self.parts.items():
            if not part.dim():  # of an earlier version, in which every step had every part
                self.parts[name] = torch.stack([part, self.steps - self.skipped])
