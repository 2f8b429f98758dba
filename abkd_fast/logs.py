"""What a run tells while it goes: metrics.jsonl, TensorBoard, and a progress bar or lines on the terminal."""

from __future__ import annotations

import json
import pathlib
import resource
import sys
import time
import types

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(soft_wrap=True, highlight=False)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most the GPU allocated, or the most the process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class RunLog:
    """A context manager: writes numbers to the run folder and shows them."""

    def __init__(self, folder: pathlib.Path, steps: int, device: torch.device) -> None:
        self.folder, self.steps, self.device = folder, steps, device
        self.bar = Progress(
            BarColumn(bar_width=6),  # so that everything fits into 84 columns
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=steps, numbers="")

    def __enter__(self) -> RunLog:
        from torch.utils.tensorboard import SummaryWriter

        self.file = (self.folder / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        self.board = SummaryWriter(self.folder / "tensorboard")
        self.bar.start()
        self.started = self.last = time.perf_counter()
        return self

    def __exit__(self, *error: types.TracebackType | None) -> None:
        self.bar.stop()
        self.board.close()
        self.file.close()

    def pause(self) -> None:
        """Time from here to `resume` (an evaluation) is not counted as training."""
        self.paused = time.perf_counter()

    def resume(self) -> None:
        away = time.perf_counter() - self.paused
        self.last += away
        self.started += away

    def advance(self, step: int) -> None:
        self.bar.update(self.task, completed=step)

    def train(self, step: int, steps: int, samples: int, tokens: int, loss: float, lr: float, grad_norm: float) -> None:
        """One point, over the last `steps` steps with their samples and (unpadded) tokens. Synchronise before."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        left = (now - self.started) / step * (self.steps - step)
        values = {
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "samples_per_second": samples / seconds,
            "seconds_per_sample": seconds / samples,
            "tokens_per_second": tokens / seconds,
            "peak_memory_bytes": peak_memory(self.device),
        }
        self._write("train", step, values)
        text = (
            f"loss {loss:.4f} {samples / seconds:.1f} samples/s {seconds / samples:.4f} s/sample "
            f"{tokens / seconds:.0f} tokens/s {values['peak_memory_bytes'] / 2**30:.1f} GiB"
        )
        self.bar.update(self.task, completed=step, numbers=text)
        if not console.is_terminal:
            minutes, rest = divmod(round(left), 60)
            console.print(f"step {step}/{self.steps}  {text}  lr {lr:.1e}  left {minutes}m{rest:02d}s")

    def evaluation(self, step: int, dev_loss: float) -> None:
        self._write("dev", step, {"loss": dev_loss})
        console.print(f"step {step}/{self.steps}  dev loss {dev_loss:.4f}")

    def _write(self, kind: str, step: int, values: dict[str, float]) -> None:
        self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(f"{kind}/{name}", value, step)
