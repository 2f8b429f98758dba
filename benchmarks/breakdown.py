"""Where a step's time goes, by kind of work, as PyTorch's profiler sees it: timing.py's --profile."""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from harness import Report, synchronize
from torch.profiler import ProfilerActivity, record_function

STEP, CLIPPING = "step", "clip_grad_norm_"  # ranges that the trace gets besides operators
BACKWARD = "autograd::engine::evaluate_function: "  # that and a node's name are one event
OPERATORS = 12  # as many are listed

# Kinds of work, each with a pattern of paths: the names of operators from the outermost to the innermost, where the
# time was spent. The first that is found counts. What runs in backward stands behind the operator that it derives.
LOSS = r"fused_linear|_PolicyGradient"
KINDS = {
    "output projections of the loss": rf"({LOSS}).*mm(_|\.dtype_out)?$",
    "divergences and their gradients": LOSS,
    "clipping and AdamW": rf"{re.escape(CLIPPING)}|Optimizer\.",
    "attention": r"scaled_dot_product|varlen|flash",
    "embedding, picking rows": r"embedding|index",
    "gradients added up": rf"AccumulateGrad|{BACKWARD}[^/]*/aten::add_?$",
    "matrix products": r"(mm_?|linear|_linear_pointwise)$",
    "copies and new memory": r"(copy_?|cat|clone|contiguous|empty\w*|zeros\w*|zero_|fill_|resize_|_to_copy|stack)$",
    "Python, waiting": rf"^/{STEP}$|{BACKWARD}[^/]*$|Backward\d*$",
    "activations, norms, dropout, and the rest": "",
}


def profile(run: Callable[[], object], device: torch.device) -> Any:
    """The events of one run, which a first one has warmed up."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    named = record_function(CLIPPING)(torch.nn.utils.clip_grad_norm_)
    with mock.patch.object(torch.nn.utils, CLIPPING, named), torch.profiler.profile(activities=activities) as trace:
        with record_function(STEP):
            run()
            synchronize()
    return trace.events()


def spent(events: list, on_gpu: bool) -> Iterator[tuple[str, str, float]]:
    """Path, name and microseconds of all that took time: operators on the CPU, on a GPU kernels.

    They add up to the step: what is left of it counts as its own.
    """
    path = paths(events)
    (step,) = (event for event in events if event.name == STEP and event.cpu_time_total)
    left = step.cpu_time_total
    for event in events:
        if on_gpu and not event.is_user_annotation:  # whose kernels are those of the operators within
            for kernel in event.kernels:
                # A compiled layer's kernels are named by what they do, and no operator of their own launches them.
                name = kernel.name if kernel.name.startswith("triton_") else event.name
                yield f"{path(event)}/{name}", name, kernel.duration
                left -= kernel.duration
        elif not on_gpu and event is not step:
            yield path(event), event.name, event.self_cpu_time_total
            left -= event.self_cpu_time_total
    yield f"/{STEP}", STEP, left


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
