"""When a run saves, and what a failed save means."""

import pathlib
from collections.abc import Callable

from torch import Tensor

from ..console import console, styled
from .checkpoint_writer import CheckpointWriter
from .state import TrainState


class CheckpointPolicy:
    """Saves one checkpoint at a time, in the background. If a save fails, the last one stays and training goes on."""

    def __init__(
        self,
        writer: CheckpointWriter,
        state: TrainState,
        every_steps: int,
        saved: pathlib.Path | None,
        on_saved: Callable[[pathlib.Path], None],
    ) -> None:
        """saved: the checkpoint that the run resumes from. on_saved: gets the folder of each new one."""
        self.writer, self.state, self.every_steps, self.saved = writer, state, every_steps, saved
        self.on_saved = on_saved
        self.pending: tuple[int, tuple | None] | None = None  # its step, and the best step before it

    def is_due(self) -> bool:
        return self.state.step > 0 and self.state.step % self.every_steps == 0

    @property
    def is_saved(self) -> bool:
        """Whether the checkpoint of the present step is on the disk."""
        return self.saved == self.writer.checkpoints.folder_of(self.state.step)

    def begin(
        self, tensors: dict[str, Tensor], values: dict, previous_best: tuple | None, flush: Callable[[], None]
    ) -> None:
        """Begins a checkpoint of the present step. Rank 0 calls `flush` before it is written. Collective.

        previous_best: `state.best` before this step, which counts again if the save fails.
        """
        step, best = self.state.step, self.state.best
        self.pending = step, previous_best
        try:
            self.writer.begin(step, best[1] if best else None, tensors, values, flush)
        except OSError as error:
            self._give_up(error)

    def conclude(self) -> None:
        """Waits for the checkpoint that is being written, if there is one. Collective."""
        if self.pending is None:
            return
        try:
            self.writer.conclude()
        except OSError as error:
            self._give_up(error)
        else:
            (step, _), self.pending = self.pending, None
            self.saved = self.writer.checkpoints.folder_of(step)
            self.on_saved(self.saved)

    def _give_up(self, error: Exception) -> None:
        (step, previous_best), self.pending = self.pending, None
        console.print(styled("no checkpoint", "bold red", f" at step {step} ({error}); training goes on"))
        if self.state.best and self.state.best[1] == step:
            # The best of those that could be written. eval.patience goes on from 0, because the step was better: on a
            # disk that stays full, a run whose evaluations get better and better must not end for that.
            self.state.best = previous_best
