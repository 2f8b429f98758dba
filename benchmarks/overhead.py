"""What a trainer's loop takes besides model and loss: timing.py's --overhead."""

from __future__ import annotations

import contextlib
import cProfile
import inspect
import pstats
from collections.abc import Callable, Iterable

import torch

from abkd_fast.config.schema import Config
from abkd_fast.models.packed import PackedCausalLM
from abkd_fast.teacher.teacher import CachedTeacher, Teacher
from abkd_fast.training.metrics import MetricsWindow, RunLog
from abkd_fast.training.trainer import Trainer
from harness import Report, at_most

LOOP = (
    Trainer.batches,
    Trainer.train_step,
    MetricsWindow.add,
    RunLog.advance,
    Trainer._log_window,
    Trainer._after_step,
)
WORK = {
    "student and loss, forward": (PackedCausalLM.forward,),
    "backward": (torch.Tensor.backward,),
    "teacher's states": (Teacher.linear_head, CachedTeacher.linear_head),
    "clipping and AdamW": (torch.nn.utils.clip_grad_norm_, torch.optim.AdamW.step),
}
CHORES = {
    "reading and packing": (Trainer.batches,),
    "sums, log, progress": (MetricsWindow.add, RunLog.advance, Trainer._log_window),
    "evaluation, checkpoints": (Trainer._after_step,),
}


def overhead(config: Config, title: str, report: Report) -> None:
    """A table of where the time of a run's loop goes, by cProfile, which charges Python a little more than it takes."""
    trainer, profile = Trainer(config), cProfile.Profile()
    trainer.build()
    trainer.config.run.folder.mkdir(parents=True)
    with contextlib.redirect_stdout(None):
        profile.runcall(trainer.train_loop)
    columns = {"name": ("", ""), "ms": ("ms a step", ".2f"), "ratio": ("%", ".2f")}
    title = f"{title}: {trainer.data.steps} steps of {config.train.batch_size} samples"
    report.table("overhead", title, _rows(profile, trainer.data.steps), columns)


def _rows(profile: cProfile.Profile, steps: int) -> list[dict]:
    """Milliseconds a step and percent of the loop: WORK, CHORES, what is in neither, and all that is not WORK."""
    stats = pstats.Stats(profile).stats

    def seconds(functions: Iterable[Callable], own: bool = False) -> float:
        """Spent in these functions and in what they call; `own`: in themselves alone."""
        codes = (inspect.unwrap(function).__code__ for function in functions)
        keys = ((code.co_filename, code.co_firstlineno, code.co_name) for code in codes)
        return sum(stats[key][2 if own else 3] for key in keys if key in stats)

    whole = seconds(LOOP) + seconds([Trainer.train_loop], own=True)
    spent = {name: seconds(functions) for name, functions in (WORK | CHORES).items()}
    spent["the rest"] = whole - sum(spent.values())
    spent["the trainer itself"] = whole - sum(spent[name] for name in WORK)
    rows = [{"name": name, "ms": 1e3 * value / steps, "ratio": 100 * value / whole} for name, value in spent.items()]
    rows[-1]["target"] = at_most(3)
    return rows
