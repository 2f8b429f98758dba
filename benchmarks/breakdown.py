"""Where a step's time goes, by kind of work, as PyTorch's profiler sees it: timing.py's --profile."""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, record_function

from harness import Report, synchronize

STEP, CLIPPING = "step", "clip_grad_norm_"  # ranges that the trace gets besides operators
BACKWARD = "autograd::engine::evaluate_function: "  # that and a node's name are one event
OPERATORS = 12  # as many are listed
Spent = tuple[str, str, float]  # an operator's path, its name, and milliseconds: of itself alone, without those within

# Kinds of work, each with a pattern of paths: the names of operators from the outermost to the innermost, where the
# time was spent. The first that is found counts. What runs in backward stands behind the operator that it derives.
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


def breakdown(traces: list[list[Spent]], title: str, report: Report) -> None:
    """Two tables of the mean of some traces: time by kind of work, and the operators that take most of it."""
    times, calls = collections.Counter(), collections.Counter()  # by kind and operator
    for trace in traces:
        for path, name, milliseconds in trace:
            key = kind_of(path), name
            times[key] += milliseconds / len(traces)
            calls[key] += 1 / len(traces)
    whole = sum(times.values())
    kinds = collections.Counter()
    for (kind, _), milliseconds in times.items():
        kinds[kind] += milliseconds
    rows = [{"name": kind, "ms": kinds[kind], "ratio": 100 * kinds[kind] / whole} for kind in KINDS]
    columns = {"ms": ("ms a step", ".2f"), "ratio": ("%", ".2f")}
    report.table("kinds", title, rows, {"name": ("", ""), **columns})
    rows = [
        {
            "name": name,
            "kind": kind,
            "ms": milliseconds,
            "ratio": 100 * milliseconds / whole,
            "calls": calls[kind, name],
        }
        for (kind, name), milliseconds in times.most_common(OPERATORS)
    ]
    columns = {"name": ("", ""), "kind": ("a part of", ""), "calls": ("calls", ".0f"), **columns}
    report.table("operators", f"{title}: the {OPERATORS} operators that take most", rows, columns)


def kind_of(path: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, path))


def profile(run: Callable[[], object], device: torch.device) -> list[Spent]:
    """Everything that one run takes time for; a first one, outside, has warmed up. They add up to the run.

    On the CPU these are operators, on a GPU kernels; Python, or the GPU's waiting, has what is left.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    named = record_function(CLIPPING)(torch.nn.utils.clip_grad_norm_)
    patch = mock.patch.object(torch.nn.utils, CLIPPING, named)
    with patch, torch.profiler.profile(activities=activities) as trace, record_function(STEP):
        run()
        synchronize()
    return list(spent(trace.events(), device.type == "cuda"))


def spent(events: list, on_gpu: bool) -> Iterator[Spent]:
    path = paths(events)
    (step,) = (event for event in events if event.name == STEP and event.cpu_time_total)
    left = step.cpu_time_total  # microseconds, as all of the profiler's
    for event in events:
        if on_gpu and not event.is_user_annotation:  # whose kernels are those of the operators within
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
    """Gives an event's path. A node of the backward pass has the sequence number of the operator that made it."""
    forward = {}
    for event in sorted(events, key=lambda event: event.time_range.start):  # of those of one number, the last made it
        if event.sequence_nr >= 0 and not event.name.startswith(BACKWARD) and event.scope == 0:
            forward[event.sequence_nr] = event

    @functools.cache
    def path(event: Any) -> str:
        outer = event.cpu_parent
        if event.name.startswith(BACKWARD):
            outer = forward.get(event.sequence_nr, outer)
        return f"{path(outer) if outer else ''}/{event.name}"

    return path
