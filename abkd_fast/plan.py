"""What a run would do and need, before any weights load: `--dry-run`."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pyarrow.compute

from . import costs
from .cache import table_of
from .logs import size
from .teacher import free_memory
from .trainer import Trainer


def describe(trainer: Trainer) -> Iterator[str]:
    """The configuration in force, the data in numbers, steps, memory and the teacher's cache."""
    config = trainer.config
    yield json.dumps(config.to_dict(), indent=2)
    yield from _data(trainer)
    yield (
        f"  steps      {trainer.steps} of {config.train.batch_size} samples, {trainer.steps_per_epoch} an epoch, "
        f"{trainer.steps / trainer.steps_per_epoch:.1f} epochs"
    )
    on_disk, in_memory, reason = (
        trainer.cache.choose(free_memory(trainer.device)) if trainer.cache else (False, False, "")
    )
    # The teacher reads what is generated, so that its body stays.
    yield from _memory(trainer, (on_disk or in_memory) and not trainer.is_on_policy)
    if on_disk:
        state = "found" if trainer.cache.file.is_recorded else "to be computed"
        yield f"  cache      {size(trainer.cache.bytes)} of teacher's states in {trainer.cache.file.folder}, {state}"
    elif in_memory:
        yield f"  cache      {size(trainer.cache.bytes)} of teacher's states in memory, not kept ({reason})"
    elif trainer.cache:
        yield f"  cache      none: {reason}"


def _data(trainer: Trainer) -> Iterator[str]:
    ids, prompts = table_of(trainer.train_set)
    lengths = pyarrow.compute.list_value_length(ids).to_numpy(zero_copy_only=False)
    prompts = prompts.to_numpy(zero_copy_only=False)
    yield f"  data       {len(lengths)} rows, {lengths.sum()} tokens an epoch"
    for name, counts in (("prompts", prompts), ("responses", lengths - prompts), ("together", lengths)):
        median, most = np.percentile(counts, [50, 95])
        yield (
            f"    {name:10} mean {counts.mean():.1f}, median {median:.0f}, 95 % up to {most:.0f}, "
            f"longest {counts.max()} tokens"
        )
    yield from trainer.describe_data()


def _memory(trainer: Trainer, cached: bool) -> Iterator[str]:
    """About what training takes in its first step's largest micro-batch."""
    step = next(trainer._batches())
    batch = max(step, key=lambda part: part.tokens)
    cost = trainer.step_cost(cached)
    parts = dict(costs.memory(cost, trainer.student_config, batch, trainer.config.train, trainer.dtype, trainer.device))
    details, total = _list(parts), sum(parts.values())
    if trainer.is_on_policy:
        generation = dict(_generation_memory(trainer, cost))
        *_, activations, logits = parts.values()
        total += max(0, sum(generation.values()) - activations - logits)
        details += f"; while it generates, instead of the last two, {_list(generation)}"
    yield f"  memory     about {size(total)} with micro-batches of {batch.tokens} tokens: {details}"
    work = sum(cost.flops(part.samples, not part.is_text) for part in step) / trainer.config.train.batch_size
    yield f"  work       {work / 1e9:.3g} GFLOP a sample"


def _generation_memory(trainer: Trainer, cost: costs.StepCost) -> Iterator[tuple[str, int]]:
    """Of the longest prompts, answered as long as may be."""
    data, sampling, method = trainer.config.data, trainer.config.sampling, trainer.method
    models = {"student": (cost.student, cost.adapter), "teacher": (cost.teacher, None)}
    length = min(max(trainer.train_set["prompt_length"][:]) + sampling.max_new_tokens, data.max_length)
    sequences = min(sampling.batch_size, method.responses_at_once)
    writers = [models[role] for role in method.writers]
    return costs.generation_memory(writers, sequences, length, trainer.dtype, trainer.device)


def _list(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {size(number)}" for name, number in parts.items())
