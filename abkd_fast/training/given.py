"""What a Python program gives besides a recipe: objects in place of names, and functions that training calls."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from ..data.rows import Rows, read_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
    """All may be missing. Functions that report are called on rank 0 alone; one that returns true ends the training."""

    models: dict[str, PreTrainedModel] = dataclasses.field(default_factory=dict)  # by role: "student", "teacher"
    rows: dict[str, Iterable[dict]] = dataclasses.field(default_factory=dict)  # by the names that `data` has for them
    on_step: Callable[[dict], object] | None = None  # gets each point of the log
    on_eval: Callable[[dict], object] | None = None  # gets each measurement on the development rows
    on_checkpoint: Callable[[pathlib.Path], object] | None = None  # gets the folder of each whole checkpoint
    optimizer: Callable[[list[dict]], Optimizer] | None = None  # from groups of weights, those that decay first
    scheduler: Callable[[Optimizer, int], LRScheduler] | None = None  # from the optimizer and the number of steps

    @property
    def reports(self) -> dict[str, Callable]:
        """The functions that report, by what they get: "train" and "dev" points of the log, or a "checkpoint"."""
        functions = {"train": self.on_step, "dev": self.on_eval, "checkpoint": self.on_checkpoint}
        return {kind: function for kind, function in functions.items() if function is not None}

    def read_rows(self, source: str, *arguments: object) -> Rows:
        """The rows of a source, or those that were given under its name. Raises ConfigError."""
        return read_rows(source, *arguments, given=self.rows.get(source))


NOTHING = Given()
