"""Memory and hours on one GPU of the packaged recipes for today's models: `python benchmarks/predict.py --recipes`."""

import argparse
import functools
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoConfig, PretrainedConfig

from abkd_fast.config.recipe import load
from abkd_fast.config.schema import Config
from abkd_fast.data.batches import collate, count_labels, fill_micro_batches
from abkd_fast.losses.chunks import MOST_CHUNK_BYTES
from abkd_fast.models.loading import meta_model
from abkd_fast.training import costs
from abkd_fast.training.costs import PEAK_FLOPS, ModelCost, StepCost
from harness import Report
from public_models import SHAPES
from workload import draw_samples

PAIRS = ("qwen3", "llama3", "gemma3", "smollm")
METHODS = ("ab", "sft", "gkd", "distillm")
ROWS = 50_000
TIMES = 4  # how many times as long as Dolly's samples are
MOST_OWN = 0.5  # gkd's share of steps on the student's own answers, and about the most that distillm's grows to
LOGITS_PASSES = {"sft": 5, "ab": 7, "gkd": 7, "distillm": 7}  # over float32 logits, as in predict.py
OPTIMIZER_BYTES = 40  # a weight: clipping reads twice and writes the gradient; AdamW reads 4 numbers and writes 3
BANDWIDTH = {"B200": 8.0, "H200": 4.8, "H100": 3.35, "A100": 2.04}  # terabytes a second, as the maker states them


class Recipe(NamedTuple):
    """A packaged recipe of one method, and its models."""

    stages: list[Config]
    student_config: PretrainedConfig
    student: ModelCost
    teacher: ModelCost | None

    @property
    def generates(self) -> bool:
        return self.stages[-1].method in ("gkd", "distillm")

    @property
    def cost(self) -> StepCost:
        return StepCost(self.student, None, self.teacher, cached=not self.generates)


@functools.cache
def model_cost(name: str) -> ModelCost:
    return ModelCost(meta_model(AutoConfig.for_model(**SHAPES[name])))


def read(pair: str, method: str) -> Recipe:
    stages = load(f"{pair}/{method}.json")
    teacher = stages[-1].teacher and model_cost(stages[-1].teacher.path)
    student = stages[0].student.path
    return Recipe(stages, AutoConfig.for_model(**SHAPES[student]), model_cost(student), teacher)


def draw(config: Config, count: int = 1024) -> list[dict]:
    """Samples as long as chat rows may be."""
    prompts, responses = draw_samples(1, count, np.random.default_rng(0)) * TIMES
    lengths = np.minimum(prompts + responses, config.data.max_length)
    pairs = zip(prompts.tolist(), lengths.tolist(), strict=True)
    return [{"input_ids": [0] * length, "spans": [prompt, length]} for prompt, length in pairs]


def memory(recipe: Recipe) -> int:
    """Bytes on a GPU: of training, or of the two models while the cache is filled."""
    config, dtype = recipe.stages[-1], torch.bfloat16
    batch = collate(fill_micro_batches(draw(config), config.train.max_tokens)[0])
    *parts, logits = costs.memory(recipe.cost, recipe.student_config, batch, config.train, dtype, torch.device("cpu"))
    held = {name: size for name, size in parts if not name.startswith("copies")}  # a CPU's
    activations, logits = held.popitem()[1], MOST_CHUNK_BYTES + 4 * recipe.student.head
    generation = {}
    if recipe.generates:
        sequences, length = config.sampling.batch_size, config.data.max_length
        of_student, device = [(recipe.student, None)], torch.device("cuda")
        generation = dict(costs.generation_memory(of_student, sequences, length, dtype, device))
    total = sum(held.values()) + max(activations + logits, sum(generation.values()))
    filling = 4 * recipe.student.parameters + 2 * (recipe.teacher.parameters if recipe.teacher else 0)
    return max(total, filling)


def hours(recipe: Recipe, options: argparse.Namespace) -> float:
    """Of all stages and of the teacher's cache, with recomputed layers and generation."""
    rate = PEAK_FLOPS[options.gpu] * options.mfu
    samples = draw(recipe.stages[-1])
    seconds = 0.0
    for config in recipe.stages:
        is_taught = config.teacher is not None
        stage = recipe._replace(stages=[config], teacher=recipe.teacher if is_taught else None)
        seconds += ROWS * config.train.epochs * _sample_seconds(stage, samples, options)
    if recipe.teacher:
        seconds += ROWS * recipe.teacher.body_flops(_lengths(samples)) / len(samples) / rate
    return seconds / 3600


def _lengths(samples: list[dict]) -> list[int]:
    return [len(sample["input_ids"]) for sample in samples]


def _sample_seconds(recipe: Recipe, samples: list[dict], options: argparse.Namespace) -> float:
    (config,), student = recipe.stages, recipe.student
    bandwidth = BANDWIDTH[options.gpu] * 1e12 * options.bandwidth
    flops = StepCost(student, None, recipe.teacher, cached=True).flops(samples)
    if config.train.gradient_checkpointing:
        flops += student.body_flops(_lengths(samples))
    if recipe.generates:
        flops += MOST_OWN * recipe.teacher.body_flops(_lengths(samples))
    responses = sum(map(count_labels, samples)) / len(samples)
    moved = LOGITS_PASSES[config.method] * 4 * student.vocab * responses
    moved += OPTIMIZER_BYTES * student.parameters / config.train.batch_size
    if recipe.generates:  # every new token of `batch_size` sequences reads the weights, and its own keys and values
        length = sum(_lengths(samples)) / len(samples)
        of_token = 2 * (student.parameters / config.sampling.batch_size + student.keys_and_values * length)
        moved += MOST_OWN * min(responses, config.sampling.max_new_tokens) * of_token
    return flops / len(samples) / (PEAK_FLOPS[options.gpu] * options.mfu) + moved / bandwidth


def predict_recipes(options: argparse.Namespace, report: Report) -> None:
    rows = []
    for pair in PAIRS:
        for method in METHODS:
            recipe = read(pair, method)
            samples = draw(recipe.stages[-1])
            responses = sum(map(count_labels, samples)) / len(samples)
            row = {"name": f"{pair}/{method}.json", "memory": memory(recipe) / 2**30, "hours": hours(recipe, options)}
            cache = 2 * recipe.teacher.width * responses * ROWS / 1e9 if recipe.teacher else 0.0
            rows.append(row | {"cache": cache})
    columns = {"memory": "GiB|.0f", "cache": "GB of cache|.0f", "hours": "hours, all stages|.1f"}
    tokens = sum(_lengths(samples)) / len(samples)
    title = f"one {options.gpu}: {ROWS:,} rows of {tokens:.0f} tokens, {responses:.0f} of the answers, at most 2,048"
    report.table("recipes", title, rows, columns)
