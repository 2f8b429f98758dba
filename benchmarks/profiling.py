"""Where a step's time goes, by kind of work: timing.py's --profile. What the loop itself takes: its --overhead."""

import collections
import contextlib
import cProfile
import functools
import inspect
import itertools
import pstats
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, record_function

from abkd_fast.config.schema import Config
from abkd_fast.models.packed import PackedCausalLM
from abkd_fast.teacher.teacher import CachedTeacher, Teacher
from abkd_fast.training.metrics import MetricsWindow, RunLog
from abkd_fast.training.trainer import Trainer
from harness import Report, synchronize

STEP, CLIPPING = "step", "clip_grad_norm_"  # ranges that the trace gets besides operators
BACKWARD = "autograd::engine::evaluate_function: "  # together with a node's name it is one event
OPERATORS = 12  # as many are listed
Spent = tuple[str, str, float]  # an operator's path, its name, and milliseconds without those of operators within

# Kinds of work, each with a pattern of paths: the names of operators from the outermost to the innermost, where the
# time was spent. The first match counts. What runs in backward stands behind the operator whose derivative it is.
LOSS = r"fused_linear|_PolicyGradient"
VIEWS = r"view|slice|as_strided|transpose|t|expand|select|(un)?squeeze|split\w*|unbind|permute|reshape|detach|alias|to"
KINDS = {
    "output projections of the loss": rf"({LOSS}).*mm_?$",
    "divergences and their gradients": LOSS,
    "clipping and AdamW": rf"{CLIPPING}|Optimizer\.",
    "attention": r"scaled_dot_product|varlen|flash",
    "embedding, picking rows": r"embedding|index",
    "gradients added up": rf"AccumulateGrad|{BACKWARD}[^/]*/aten::add_?$",
    "matrix products": r"(mm_?|linear|_linear_pointwise)$",
    "copies, new memory": r"::(copy_|_to_copy|cat|clone|contiguous|(new_)?(empty|zeros)\w*|zero_|fill_|resize_|stack)$",
    "Python, dispatch, waiting": rf"^/{STEP}$|{BACKWARD}[^/]*$|Backward\d*$|::({VIEWS})$",
    "activations, norms, dropout, and the rest": "",
}
# Functions of the loop: the model's and the loss's work, and the trainer's.
WORK = {
    "student and loss, forward": (PackedCausalLM.forward,),
    "backward": (torch.Tensor.backward,),
    "teacher's states": (Teacher.linear_head, CachedTeacher.linear_head),
    "clipping and AdamW": (torch.nn.utils.clip_grad_norm_, torch.optim.AdamW.step),
}
CHORES = {
    "reading and packing": (Trainer.batches,),
    "sums, log, progress": (MetricsWindow.add, MetricsWindow.write, RunLog.advance),
}


def breakdown(traces: list[list[Spent]], title: str, report: Report) -> None:
    """Two tables of the mean of some traces: time by kind of work, and the operators that take most of it."""
    times, calls, kinds = collections.Counter(), collections.Counter(), collections.Counter()
    for path, name, milliseconds in itertools.chain(*traces):
        kind = kind_of(path)
        times[kind, name] += milliseconds / len(traces)
        calls[kind, name] += 1 / len(traces)
        kinds[kind] += milliseconds / len(traces)
    columns, whole = {"ms": "ms a step|.2f", "ratio": "%|.2f"}, sum(times.values())
    rows = [{"name": kind, "ms": kinds[kind], "ratio": 100 * kinds[kind] / whole} for kind in KINDS]
    report.table("kinds", title, rows, columns)
    rows = []
    for (kind, name), spent in times.most_common(OPERATORS):
        rows.append({"name": name, "kind": kind, "ms": spent, "ratio": 100 * spent / whole, "calls": calls[kind, name]})
    title = f"{title}: the {OPERATORS} operators that take most"
    report.table("operators", title, rows, {"kind": "a part of", "calls": "calls|.0f"} | columns)


def kind_of(path: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, path))


def profile(run: Callable[[], object], device: torch.device) -> list[Spent]:
    """Everything that takes time in one run, after a first one that has warmed up. It adds up to the whole run.

    On the CPU these are operators, on a GPU kernels. What is left counts as Python, or as the GPU's waiting.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    patch = mock.patch.object(torch.nn.utils, CLIPPING, record_function(CLIPPING)(torch.nn.utils.clip_grad_norm_))
    with patch, torch.profiler.profile(activities=activities) as trace, record_function(STEP):
        run()
        synchronize()
    return list(spent(trace.events(), device.type == "cuda"))


def spent(events: list, on_gpu: bool) -> Iterator[Spent]:
    path = paths(events)
    (step,) = (event for event in events if event.name == STEP and event.cpu_time_total)
    left = step.cpu_time_total  # microseconds, as in all of the profiler's events
    for event in events:
        if on_gpu and not event.is_user_annotation:  # an annotation's kernels are those of the operators within
            for kernel in event.kernels:
                # A compiled layer's kernels are named by what they do, and no operator of their own launches them.
                name = kernel.name if kernel.name.startswith("triton_") else event.name
                yield f"{path(event)}/{name}", name, kernel.duration / 1e3
                left -= kernel.duration
        elif not on_gpu and event is not step:
            yield path(event), event.name, event.self_cpu_time_total / 1e3
            left -= event.self_cpu_time_total
    yield f"/{STEP}", STEP, left / 1e3


def paths(events: list) -> Callable[[Any], str]:
    """A function from an event to its path. A backward node has the sequence number of the operator that made it."""
    forward = {}
    for event in sorted(events, key=lambda event: event.time_range.start):  # the last one of a number made the node
        if event.sequence_nr >= 0 and not event.name.startswith(BACKWARD) and event.scope == 0:
            forward[event.sequence_nr] = event

    @functools.cache
    def path(event: Any) -> str:
        outer = event.cpu_parent
        if event.name.startswith(BACKWARD):
            outer = forward.get(event.sequence_nr, outer)
        return f"{path(outer) if outer else ''}/{event.name}"

    return path


def overhead(config: Config, title: str, report: Report) -> None:
    """A table of a run's loop, in milliseconds a step and percent: WORK, CHORES, the rest, and all that is not WORK.

    The times are those of cProfile, which charges Python a little more than it takes.
    """
    trainer, profile = Trainer(config), cProfile.Profile()
    trainer.build()
    trainer.config.run.folder.mkdir(parents=True)
    with contextlib.redirect_stdout(None):
        profile.runcall(trainer.train_loop)
    stats, steps = pstats.Stats(profile).stats, trainer.data.steps

    def seconds(*functions: Callable) -> float:
        """Time in these functions and in what they call."""
        codes = (inspect.unwrap(function).__code__ for function in functions)
        keys = ((code.co_filename, code.co_firstlineno, code.co_name) for code in codes)
        return sum(stats[key][3] for key in keys if key in stats)

    whole = seconds(Trainer.train_loop)
    times = {name: seconds(*functions) for name, functions in (WORK | CHORES).items()}
    times["the rest"] = whole - sum(times.values())
    times["the trainer itself"] = whole - sum(times[name] for name in WORK)
    rows = [{"name": name, "ms": 1e3 * value / steps, "ratio": 100 * value / whole} for name, value in times.items()]
    rows[-1]["target"] = {"at_most": 3}
    title = f"{title}: {steps} steps of {config.train.batch_size} samples"
    report.table("overhead", title, rows, {"ms": "ms a step|.2f", "ratio": "%|.2f"})
