"""The end of a run: which step's weights become the result, and the summary."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from .. import distributed, manifest
from ..console import console, styled
from ..device import peak_memory
from ..errors import disk_errors
from ..files import write_json
from . import checkpoint

if TYPE_CHECKING:
    from .trainer import Trainer


def write_result(trainer: Trainer) -> dict:
    """Writes summary.json, then final/, and returns the summary. A run with a folder final/ is finished. Collective.

    Raises Interrupted where there is no room for it.
    """
    state, folder = trainer.state, trainer.config.run.folder
    seconds = trainer.teachers.seconds_saved(state.samples - trainer.resumed_samples)
    if seconds is not None:
        console.print(f"the teacher's cache saved about {seconds:.1f} s")
    step, dev_loss, dev_rouge_l, saved = _select(trainer)
    summary = {
        "method": trainer.config.method,
        "steps": trainer.data.steps,
        "selected_step": step,
        "skipped_steps": state.skipped_steps,
        "dev_loss_before": state.first_dev_loss,
        "dev_loss": dev_loss,
        "dev_rouge_l_before": state.first_dev_rouge_l,
        "dev_rouge_l": dev_rouge_l,
        "seconds_per_sample": state.seconds / state.samples,
        "peak_memory_bytes": peak_memory(trainer.device),
    }
    final = folder / "final"

    def finish(result: pathlib.Path) -> None:
        trainer.conversion.apply(result)
        manifest.write(result, folder / manifest.NAME)

    with disk_errors(final):
        distributed.run_on_rank0(write_json, folder / "summary.json", summary)
        if saved:
            distributed.run_on_rank0(checkpoint.copy_model, saved, final, finish)
        else:
            trainer.checkpoint_writer.save_model(final, finish)
    console.print(f"saved {final}")
    return summary


def _select(trainer: Trainer) -> tuple[int, float | None, float | None, pathlib.Path | None]:
    """The step whose weights final/ gets, its dev loss, its ROUGE-L, and its checkpoint (None: the weights in memory).

    That is the last step, unless eval.select asks for the best and its checkpoint is whole.
    """
    state, select, steps = trainer.state, trainer.config.eval.select, trainer.data.steps
    last = steps, state.dev_loss, state.dev_rouge_l, None
    if select == "last" or state.best is None or state.best[1] == steps:
        return last
    _, step, loss, rouge_l = state.best
    by_rouge = select == "rouge_l"
    virtue, value = ("highest dev ROUGE-L", f"{rouge_l:.2f}") if by_rouge else ("lowest dev loss", f"{loss:.4f}")
    saved = trainer.checkpoints.folder_of(step)
    if reason := distributed.run_on_rank0(checkpoint.damage, saved):
        rest = f" {saved} ({reason}), of the {virtue}: the last step is taken"
        console.print(styled("damaged", "bold red", rest))
        return last
    console.print(f"step {step} is taken, of the {virtue}, {value}")
    return step, loss, rouge_l, saved
