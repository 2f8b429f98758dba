"""A run in words: the report of `--dry-run`, and the first lines of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.text import Text

from .. import distributed
from ..console import format_bytes, styled
from ..data.batches import StepBatch, make_step_batch, prompt_of
from ..device import device_name, free_memory
from ..losses import row_ops
from ..methods.rollouts import answered
from ..models import attention, experts, forms, loading, padded
from ..teacher.cache import describe_folder
from ..teacher.store import label_counts, lengths_of, table_of
from . import costs
from .optim import untrained

if TYPE_CHECKING:
    from .trainer import Trainer


def describe(trainer: Trainer) -> Iterator[str]:
    """The data in numbers, steps, memory, and the teacher's cache."""
    steps, steps_per_epoch = trainer.data.steps, trainer.data.steps_per_epoch
    yield from _data(trainer)
    yield f"{_steps(trainer)}, {steps / steps_per_epoch:.1f} epochs"
    yield from _forms(trainer)
    yield from _quantized(trainer)
    yield from without_kernels(trainer.device)
    choices = trainer.teachers.choose(free_memory(trainer.device))
    # An on-policy method keeps the teacher's body, which reads what is generated.
    cached = {key: (disk or memory) and not trainer.teachers.is_on_policy for key, (disk, memory, _) in choices.items()}
    yield from _memory(trainer, cached)
    yield from _served(trainer)
    for key, (on_disk, in_memory, reason) in choices.items():
        cache, of = trainer.teachers.caches[key], f"{key}: " if trainer.teachers.are_several else ""
        if not on_disk and not in_memory:
            yield f"  cache      {of}none: {reason}"
            continue
        place = f"memory, not kept ({reason})"
        if on_disk:
            place = f"{describe_folder(cache.file.folder)}, found"
            if not cache.file.is_recorded:
                size = format_bytes(cache.file.largest_bytes)
                place = f"{cache.file.folder}, to be computed; with the output projection at most {size} on the disk"
        yield f"  cache      {of}{format_bytes(cache.bytes)} of teacher's states in {place}"


def first_lines(trainer: Trainer) -> Iterator[str | Text]:
    """What a run trains, on which data: all that is known before the models load."""
    config, data = trainer.config, trainer.data
    lengths = torch.tensor(data.train_set["row_length"][:]).clamp(max=config.data.max_length)
    loss = f"  loss {config.loss}" if trainer.teachers or trainer.method.top_k else ""
    yield styled(f"{config.run.folder}", "bold", f"  method {config.method}{loss}")
    yield (
        f"  data       {_size(trainer)}, {lengths.float().mean():.0f} tokens each on average, "
        f"the first {data.where[data.train_set['row'][0]]}"
    )
    yield from _notes(trainer)
    yield _steps(trainer)


def header(trainer: Trainer) -> Iterator[str | Text]:
    """What was built and chosen, so that nobody trains on a slow path unknowingly."""
    yield f"  models     {_models(trainer)}"
    yield f"  device     {device_name(trainer.device)}, {str(trainer.dtype).removeprefix('torch.')}"
    yield f"  kernels    {_kernels(trainer)}; attention {attention.describe(trainer.device)}"
    yield from _forms(trainer)
    yield from _quantized(trainer)
    if trainer.student.experts:
        meta = trainer.student_meta
        lines = experts.describe(meta.model, meta.router_loss_weight, meta.spec.router_aux_loss)
        yield from (f"  router     {line}" for line in lines)
    if count := untrained(trainer.student, trainer.optimizer):
        yield f"  optimizer  {count} of the student's weights are not given to it: they stay as they are"
    for line in without_kernels(trainer.device):
        yield styled(line, "bold red")
    for key, teacher in trainer.teachers.built.items():
        yield f"  teacher    {f'{key}: ' if trainer.teachers.are_several else ''}{teacher.note}"
    yield from _served(trainer)
    if distributed.world_size() > 1:
        held = "a part of all weights" if trainer.is_sharded else "all weights"
        yield f"  processes  {distributed.world_size()}, each with {held}; gradients are summed over them"
    if trainer.device.type == "cuda":
        yield f"  compile    {'the layers of the models' if trainer.config.train.compile == 'auto' else 'off'}"
    if trainer.data.dev is not None:
        every = trainer.config.eval.every_steps or trainer.data.steps_per_epoch
        samples = f"{len(trainer.data.dev.dev_set)} samples of data.dev"
        yield f"  evaluation {samples}, before the first step and after every {every}"
    if trainer.resume:
        start = f"from {trainer.resumed_from}" if trainer.resumed_from else "from the start: there is no checkpoint"
        yield f"  resumed    {start}"


def _steps(trainer: Trainer) -> str:
    samples = trainer.config.train.batch_size
    return f"  steps      {trainer.data.steps} of {samples} samples, {trainer.data.steps_per_epoch} an epoch"


def _models(trainer: Trainer) -> str:
    sizes = f"student {loading.describe(trainer.student_meta, trainer.student.adapter_rank)}"
    for key, meta in trainer.teachers.metas.items():
        sizes += f", {key} {loading.describe(meta)}"  # a cached teacher's body is not in memory
        if adapter := trainer.config.all_teachers[key].adapter:
            sizes += f" with {adapter} {'merged' if meta.quantization is None else 'attached'}"
    return sizes


def _served(trainer: Trainer) -> Iterator[str]:
    """A line about a teacher of whom only the likeliest tokens are known."""
    if trainer.method.top_k:
        yield f"  teacher    {trainer.method.top_k.note}"


def _quantized(trainer: Trainer) -> Iterator[str]:
    """Lines about the models whose weights are quantized."""
    for role, meta in {"student": trainer.student_meta, **trainer.teachers.metas}.items():
        if meta.quantization:
            yield f"  quantized  {role}: {meta.quantization.note}"


def _forms(trainer: Trainer) -> Iterator[str]:
    """How the models compute, and what that costs where it is not the fast way."""
    running = {key: meta for key, meta in trainer.teachers.metas.items() if not meta.spec.hidden_states}
    metas = {"student": trainer.student_meta, **running}
    chosen = {role: forms.choose(meta.config, role, trainer.device) for role, meta in metas.items()}
    packed = [role for role, form in chosen.items() if form.problem is None]
    if packed:
        own = "their own passes" if packed[1:] else "its own pass"
        yield f"  packed     {' and '.join(packed)}: checked against {own}"
    parts = next(trainer.batches()).micro_batches
    read = sum(padded.padded_tokens(part.lengths) for part in parts)
    padding = read / sum(part.tokens for part in parts) - 1
    for role, form in chosen.items():
        if form.problem is not None:
            kind = metas[role].config.model_type
            yield f"  padded     {role}, a {kind} model: {form.problem}; padding adds {padding:.0%} (docs/models.md)"
    if trainer.student_meta.whole is not trainer.student_meta.config:
        kind = trainer.student_meta.whole.model_type
        yield f"  multimodal student, a {kind} model: its language model alone is trained; final/ keeps the other parts"


def _kernels(trainer: Trainer) -> str:
    info = row_ops.build_info()
    if trainer.device.type == "cuda" and info["cuda"]:
        return f"CUDA {info['cuda']}"
    return "PyTorch reference" if "missing" in info or trainer.device.type == "cuda" else f"CPU {info['simd']}"


def without_kernels(device: torch.device) -> Iterator[str]:
    """A line about the cost, if the losses have no kernels on this device. `benchmarks/predict.py` derives it."""
    info, on_gpu = row_ops.build_info(), device.type == "cuda"
    if "missing" in info:
        reason = f"the extension can't be imported ({info['missing']})"
    elif on_gpu and not info["cuda"]:
        reason = "the package was built without CUDA kernels"
    else:
        return
    cost = ", and GPT-2's steps with cached states take an estimated 4 (fkl) to 12 (ab) times as long" if on_gpu else ""
    yield (
        f"  slow       {reason}: PyTorch computes the losses in float64{cost}; "
        "pip install -v . builds the kernels, or says what is missing (docs/gpu-build.md)"
    )


def _size(trainer: Trainer) -> str:
    samples, rows = len(trainer.data.train_set), len({*trainer.data.train_set["row"][:]})
    return f"{rows} rows" if rows == samples else f"{samples} samples of {rows} rows"


def _data(trainer: Trainer) -> Iterator[str]:
    ids, spans = table_of(trainer.data.train_set)
    lengths, labels = lengths_of(ids), label_counts(spans)
    yield f"  data       {_size(trainer)}, {lengths.sum()} tokens an epoch"
    groups = {"prompts": lengths - labels, "responses": labels, "together": lengths}
    if not labels.any():
        yield "    responses  none: the run writes them"
        groups = {"prompts": lengths}
    for name, counts in groups.items():
        median, most = np.percentile(counts, [50, 95])
        yield (
            f"    {name:10} mean {counts.mean():.1f}, median {median:.0f}, 95 % up to {most:.0f}, "
            f"longest {counts.max()} tokens"
        )
    yield from _notes(trainer)


def _notes(trainer: Trainer) -> Iterator[str]:
    """Lines about long rows, plain text, and generation, where there are any."""
    yield from (f"  rows       {note}" for note in trainer.data.notes)
    yield from (f"  tokens     {note}" for note in trainer.teachers.notes())
    if trainer.teachers.are_several:
        yield f"  teachers   samples of each: {trainer.teachers.counts()}"
    if trainer.data.pretrain_set is not None:
        data = trainer.config.data
        yield (
            f"  plain text {len(trainer.data.pretrain_set)} blocks of {data.max_length} tokens, one a sample; "
            f"weight {data.pretrain.weight:g}"
        )
    if trainer.teachers.is_on_policy:
        sampling = trainer.config.sampling
        yield (
            f"  generation up to {sampling.max_new_tokens} tokens a response at temperature "
            f"{sampling.temperature:g}, {sampling.batch_size} at a time"
        )


def _memory(trainer: Trainer, cached: dict[str, bool]) -> Iterator[str]:
    """An estimate of what training needs, for the largest micro-batch of the first step."""
    train = trainer.config.train
    step = _first_step(trainer)
    batch = max(step.micro_batches, key=lambda part: part.tokens)
    by_key = {key: trainer.step_cost(is_cached, key) for key, is_cached in cached.items()}
    cost, *_ = [*by_key.values(), trainer.step_cost(cached=False)]
    student = trainer.student_meta.config
    parts = dict(costs.memory(cost, student, batch, train, trainer.dtype, trainer.device, trainer.config.optim))
    if trainer.teachers.are_several:
        parts["teacher"] = sum(costs.teacher_bytes(cost, trainer.dtype) for cost in by_key.values())
    details, total = _list(parts), sum(parts.values())
    if trainer.teachers.is_on_policy:
        generation = dict(_generation_memory(trainer, cost))
        *_, activations, logits = parts.values()
        total += max(0, sum(generation.values()) - activations - logits)
        details += f"; while it generates, instead of the last two, {_list(generation)}"
    yield f"  memory     about {format_bytes(total)} with micro-batches of {batch.tokens} tokens: {details}"
    work = cost.flops(step.pretrain_blocks, taught=False)
    for key, samples in trainer.teachers.grouped(step.samples):
        work += by_key.get(key, cost).flops(samples)
    work /= train.batch_size
    yield f"  work       {work / 1e9:.3g} GFLOP a sample"


def _first_step(trainer: Trainer) -> StepBatch:
    """The first step. Where the run writes all responses, each one is as long as it may be."""
    step, config = next(trainer.batches()), trainer.config
    if trainer.method.off_policy_fraction:
        return step
    samples = []
    for sample in step.samples:
        start = len(prompt_of(sample))
        stop = min(start + config.sampling.max_new_tokens, config.data.max_length)
        samples.append(answered(sample, [0] * (stop - start)))
    return make_step_batch(samples, step.pretrain_blocks, config.train.max_tokens)


def _generation_memory(trainer: Trainer, cost: costs.StepCost) -> Iterator[tuple[str, int]]:
    """The same for generation: the longest prompts with the longest responses."""
    data, sampling, method = trainer.config.data, trainer.config.sampling, trainer.method
    models = {"student": (cost.student, cost.adapter), "teacher": (cost.teacher, None)}
    longest = max(spans[-2] for spans in trainer.data.train_set["spans"][:])
    length = min(longest + sampling.max_new_tokens, data.max_length)
    sequences = min(sampling.batch_size, method.max_concurrent_responses)
    generators = [models[role] for role in method.generators]
    return costs.generation_memory(generators, sequences, length, trainer.dtype, trainer.device)


def _list(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {format_bytes(number)}" for name, number in parts.items())
