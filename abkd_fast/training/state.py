"""How far a run is: its totals, and the sums since the last logged point."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from .. import distributed
from ..data.rows import StepBatch
from .metrics import RunLog


@dataclasses.dataclass
class Progress:
    """How far a run is, and the totals of its summary."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    window_seconds: float = 0.0
    skipped_steps: int = 0
    evaluated_step: int = -1
    first_dev_loss: float | None = None
    first_dev_rouge_l: float | None = None
    dev_loss: float | None = None
    dev_rouge_l: float | None = None
    # What is lowest at the best step after any (its loss, or ROUGE-L times -1), that step, its loss and its ROUGE-L.
    best: tuple[float, int, float, float | None] | None = None

    def evaluated(self, loss: float, rouge_l: float | None, by_rouge: bool) -> bool:
        """Notes an evaluation; whether its loss is the lowest after any step, or its ROUGE-L the highest."""
        self.dev_loss, self.dev_rouge_l, self.evaluated_step = loss, rouge_l, self.step
        if self.step == 0:
            self.first_dev_loss, self.first_dev_rouge_l = loss, rouge_l
            return False
        value = -rouge_l if by_rouge else loss
        improved = value < (self.best[0] if self.best else math.inf)  # never a loss that is no number
        if improved:
            self.best = value, self.step, loss, rouge_l
        return improved


class Window:
    """Sums since the last logged point. They stay on the device: reading them would wait for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.loss = torch.zeros((), device=device, dtype=torch.float64)  # of the finite steps
        self.norm = torch.zeros((), device=device, dtype=torch.float64)  # of the last finite one
        self.skipped = torch.zeros((), device=device, dtype=torch.int64)
        self.first_nonfinite = torch.zeros(3, device=device, dtype=torch.float64)  # its step, loss and norm
        self.parts: dict[str, Tensor] = {}  # of the loss, likewise
        self.rows: list[list[int]] = []  # of the data, in each step: those that its samples, or their prompts, are
        self.steps = self.samples = self.real_tokens = self.most_tokens = 0
        self.tokens = self.flops = 0  # of this rank

    def add(
        self,
        step: int,
        loss: Tensor,
        norm: Tensor,
        parts: dict[str, Tensor],
        batch: StepBatch,
        flops: int,
    ) -> None:
        finite = is_finite(loss, norm)
        self.loss += torch.where(finite, loss, 0.0)
        for name, part in parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + torch.where(finite, part, 0.0).double()
        self.norm = torch.where(finite, norm, self.norm)
        account = torch.stack([torch.full_like(self.loss, step), loss.double(), norm.double()])
        is_first = ~finite & (self.skipped == 0)
        self.first_nonfinite = torch.where(is_first, account, self.first_nonfinite)
        self.skipped += ~finite
        self.steps += 1
        self.rows.append([sample["row"] for sample in batch.samples])
        self.samples += len(self.rows[-1])
        self.real_tokens += sum(len(sample["input_ids"]) for sample in (*batch.samples, *batch.text))
        self.most_tokens += batch.most_tokens
        self.tokens += sum(part.tokens for part in batch.parts)
        self.flops += flops

    def write(self, log: RunLog, step: int, lr: float, numbers: dict[str, float]) -> int:
        """Logs the point, with numbers of the method's own; returns how many steps were skipped."""
        skipped = int(self.skipped)
        finite = self.steps - skipped
        loss, norm = (self.loss.item() / finite, self.norm.item()) if finite else (None, None)
        parts = {name: part.item() / finite if finite else None for name, part in self.parts.items()}
        if distributed.world() > 1:  # how much longer than the mean the longest share of a step was
            numbers = numbers | {"imbalance": self.most_tokens * distributed.world() / self.real_tokens - 1}
        _, samples, real_tokens, _, tokens, flops = self.counts()
        log.train(step, samples, tokens, real_tokens, flops, loss, parts | numbers, lr, norm, skipped)
        return skipped

    def counts(self) -> list[int]:
        """Of all ranks, which have to call this together."""
        own = distributed.added(self.tokens), distributed.added(self.flops)
        return [self.steps, self.samples, self.real_tokens, self.most_tokens, *own]

    def tensors(self) -> dict[str, Tensor]:
        """Of all ranks, which have to call this together."""
        counts, rows = torch.tensor(self.counts()), torch.tensor(self.rows, dtype=torch.int64)
        sums = {"loss": self.loss, "norm": self.norm, "skipped": self.skipped, "first_nonfinite": self.first_nonfinite}
        sums |= {f"parts.{name}": part for name, part in self.parts.items()}
        return {"counts": counts, "rows": rows} | {name: value.cpu() for name, value in sums.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.steps, self.samples, self.real_tokens, self.most_tokens, *own = tensors["counts"].tolist()
        self.tokens, self.flops = own if distributed.is_main() else (0, 0)
        self.rows = tensors["rows"].tolist()
        own = {name: value.to(self.device, copy=True) for name, value in tensors.items()}
        for name in ("loss", "norm", "skipped", "first_nonfinite"):
            setattr(self, name, own[name])
        self.parts = {name.removeprefix("parts."): own[name] for name in own if name.startswith("parts.")}


def is_finite(loss: Tensor, norm: Tensor) -> Tensor:
    return torch.isfinite(loss) & torch.isfinite(norm)
