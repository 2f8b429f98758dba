"""The training loop. It knows no method by name: a method says which loss a student's hidden states get."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import get_scheduler, set_seed

from . import attention, methods, models, ops
from .config import Config, ConfigError, ModelConfig
from .data import pack, read_rows, shuffled_batches, tokenise
from .fused_linear import fused_linear_cross_entropy
from .logs import RunLog, console, peak_memory
from .teacher import CachedTeacher, TeacherCache


class Trainer:
    """One run, from its configuration to its `final/` folder."""

    def __init__(self, config: Config) -> None:
        """Checks all that can be checked without weights. Raises ConfigError; writes nothing."""
        self.config = config
        self.device = choose_device(config.train.device)
        self.dtype = choose_dtype(config.train.dtype, self.device)
        self.method = methods.find(config.method)(config)
        check_folder(config.run.folder)
        self.student_config = models.read_config(config.student, "student")
        self.teacher_config = models.read_config(config.teacher, "teacher") if self.method.needs_teacher else None
        source = config.tokenizer or config.student.path
        self.tokenizer = models.read_tokenizer(source, "tokenizer" if config.tokenizer else "student.path")
        theirs = None
        if self.method.needs_teacher and config.teacher.path is not None:
            theirs = models.read_tokenizer(config.teacher.path, "teacher.path")
        models.check_vocabularies(self.tokenizer, self.student_config, self.teacher_config, theirs)
        models.check_length(self.student_config, "student", config.data.max_length)
        if self.method.needs_teacher:
            models.check_length(self.teacher_config, "teacher", config.data.max_length)
        self._read_data()
        self.cache = None
        if self.method.needs_teacher:
            samples = self.steps * config.train.batch_size
            self.cache = TeacherCache(config, self.teacher_config, self.train_set, samples, self.device, self.dtype)

    def _read_data(self) -> None:
        data, train = self.config.data, self.config.train
        rows = read_rows(data.train, data.train_rows)
        self.train_set = tokenise(rows, self.tokenizer, data.max_length)
        self.dev_set = None
        if data.dev is not None:
            self.dev_set = tokenise(read_rows(data.dev, data.dev_rows), self.tokenizer, data.max_length)
        self.steps_per_epoch = len(self.train_set) // train.batch_size
        if self.steps_per_epoch == 0:
            raise ConfigError(f"{data.train}: {len(rows)} rows are fewer than train.batch_size = {train.batch_size}")
        self.steps = train.steps or train.epochs * self.steps_per_epoch

    def _load(self) -> None:
        config = self.config
        set_seed(config.run.seed)
        self.student = self._model(config.student, self.student_config, "student").train()
        self.teacher = None
        if self.cache:
            load = functools.partial(self._model, config.teacher, self.teacher_config, "teacher")
            optimizer_bytes = 12 * sum(p.numel() for p in self.student.parameters())  # gradients and two moments
            with torch.random.fork_rng(devices=[]):  # dropout is the same whether the teacher's weights load or not
                self.teacher = self.cache.open(load, self._precision, optimizer_bytes)
        optim = config.optim
        decayed = [p for p in self.student.parameters() if p.requires_grad and p.dim() > 1]
        others = [p for p in self.student.parameters() if p.requires_grad and p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
        cosine = optim.schedule == "cosine"
        self.scheduler = get_scheduler(
            "cosine_with_min_lr" if cosine else "constant_with_warmup",
            self.optimizer,
            num_warmup_steps=optim.warmup_steps,
            num_training_steps=self.steps,
            scheduler_specific_kwargs={"min_lr": optim.min_lr} if cosine else None,
        )

    def _model(self, spec: ModelConfig, config: models.PretrainedConfig, key: str) -> models.PackedCausalLM:
        # Master weights stay in float32; bfloat16 is the type of the computation only.
        storage = torch.float64 if self.dtype == torch.float64 else torch.float32
        if key == "teacher" and self.dtype == torch.bfloat16:
            storage = torch.bfloat16
        model = models.load(spec, config, key, storage, self.device)
        with self._precision():
            model.check()
        return model

    def _precision(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def train(self) -> dict:
        """Trains, writes the run folder, and returns its summary."""
        config = self.config
        self._load()
        config.run.folder.mkdir(parents=True)
        (config.run.folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
        for line in self.describe():
            console.print(line)
        with RunLog(config.run.folder, self.steps, self.device) as log:
            first = self._evaluate(log, 0)
            last, samples, seconds = first, 0, 0.0
            window = Window(self.device)
            for step, batch in enumerate(self._batches(), 1):
                started, rate = time.perf_counter(), self.scheduler.get_last_lr()[0]
                window.add(*self._step(batch), len(batch), sum(len(sample["input_ids"]) for sample in batch))
                log.advance(step)
                evaluate = step == self.steps or (config.eval.every_steps and step % config.eval.every_steps == 0)
                if step % config.log.every_steps == 0 or step == self.steps:
                    window.write(log, step, rate)
                elif evaluate and self.device.type == "cuda":
                    torch.cuda.synchronize()  # the steps' time must not be counted as the evaluation's
                seconds += time.perf_counter() - started
                samples += len(batch)
                if evaluate:
                    last = self._evaluate(log, step)
        if isinstance(self.teacher, CachedTeacher):
            console.print(f"the teacher's cache saved about {self.teacher.saved(samples):.1f} s")
        summary = {
            "method": config.method,
            "steps": self.steps,
            "dev_loss_before": first,
            "dev_loss": last,
            "seconds_per_sample": seconds / samples,
            "peak_memory_bytes": peak_memory(self.device),
        }
        (config.run.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        self.student.save(config.run.folder / "final", self.tokenizer)
        return summary

    def _batches(self) -> Iterator[list[dict]]:
        """`steps` batches of samples, epoch after epoch."""
        for step in range(self.steps):
            epoch, index = divmod(step, self.steps_per_epoch)
            if index == 0:
                batches = shuffled_batches(self.train_set, self.config.train.batch_size, self.config.run.seed, epoch)
            yield next(batches)

    def _step(self, samples: list[dict]) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns its loss and gradient norm, still on the device."""
        batches = pack(samples, self.config.train.max_tokens)
        tokens = sum(len(batch.labels) for batch in batches)  # of all responses: the mean is over the whole step
        total = 0.0
        for batch in batches:
            batch = batch.to(self.device)
            with self._precision():
                states = self.teacher.states(batch) if self.teacher else None
                loss = self.student(batch, functools.partial(self.method.loss, batch=batch, teacher=states)) / tokens
            loss.backward()
            total = total + loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.config.optim.clip_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm

    def _evaluate(self, log: RunLog, step: int) -> float | None:
        if self.dev_set is None:
            return None
        log.pause()
        loss = self.dev_loss()
        log.evaluation(step, loss)
        log.resume()
        return loss

    @torch.no_grad()
    def dev_loss(self) -> float:
        """Cross-entropy of the development responses, mean over their tokens."""
        self.student.eval()
        total, tokens = torch.zeros((), device=self.device, dtype=torch.float64), 0
        for batch in pack(list(self.dev_set), self.config.train.max_tokens):
            with self._precision():
                total += self.student(batch.to(self.device), functools.partial(_cross_entropy, labels=batch.labels))
            tokens += len(batch.labels)
        self.student.train()
        return total.item() / tokens

    def describe(self) -> Iterator[str]:
        """What was built and chosen, so that nobody trains on a slow path unknowingly."""
        config, info = self.config, ops.build_info()
        kernels = "PyTorch reference (extension missing)" if "missing" in info else f"CPU {info['simd']}"
        if self.device.type == "cuda" and info["cuda"]:
            kernels = f"CUDA {info['cuda']}"
        counts = {"student": self.student.model}
        if self.teacher:  # whose body may be gone
            counts["teacher"] = models.outline(self.teacher_config)
        sizes = ", ".join(
            f"{role} {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M ({model.config.model_type})"
            for role, model in counts.items()
        )
        lengths = torch.tensor([len(ids) for ids in self.train_set["input_ids"]])
        cut = int((lengths == config.data.max_length).sum())
        loss = f"  loss {config.loss}" if self.teacher else ""
        yield f"[bold]{config.run.folder}[/bold]  method {config.method}{loss}"
        yield f"  models     {sizes}"
        yield (
            f"  data       {len(lengths)} rows, {lengths.float().mean():.0f} tokens each on average, "
            f"{cut} reach the limit of {config.data.max_length}"
        )
        yield f"  device     {_device_name(self.device)}, {str(self.dtype).removeprefix('torch.')}"
        yield f"  kernels    {kernels}; attention {attention.backend(self.device)}, packed and checked"
        if self.teacher:
            yield f"  teacher    {self.teacher.note}"
        yield f"  steps      {self.steps} of {config.train.batch_size} samples, {self.steps_per_epoch} an epoch"


class Window:
    """Sums since the last logged point. They stay on the device: reading them would wait for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._clear()

    def _clear(self) -> None:
        self.loss = torch.zeros((), device=self.device, dtype=torch.float64)
        self.steps = self.samples = self.tokens = 0

    def add(self, loss: Tensor, norm: Tensor, samples: int, tokens: int) -> None:
        self.loss += loss
        self.norm = norm
        self.steps += 1
        self.samples += samples
        self.tokens += tokens

    def write(self, log: RunLog, step: int, lr: float) -> None:
        loss = self.loss.item() / self.steps
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} within the {self.steps} steps up to step {step}")
        log.train(step, self.steps, self.samples, self.tokens, loss, lr, self.norm.item())
        self._clear()


def _cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    return fused_linear_cross_entropy(hidden, weight, labels, student_bias=bias, reduction="sum")


def check_folder(folder: pathlib.Path) -> None:
    """Raises ConfigError where a run's folder exists, or can't be made."""
    if folder.exists():
        raise ConfigError(f"{folder} exists already: choose another run.name, or move it aside")
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"run.dir: {folder} can't be made: {parent} is not a folder that can be written to")


def choose_device(wish: str) -> torch.device:
    if wish == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device is cuda, but PyTorch sees no GPU; use auto or cpu")
    return torch.device("cuda" if wish != "cpu" and torch.cuda.is_available() else "cpu")


def choose_dtype(wish: str, device: torch.device) -> torch.dtype:
    if wish == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if wish in ("float32", "float64") and device.type == "cuda":
        raise ConfigError(f"train.dtype is {wish}, but packed attention on a GPU computes in bfloat16")
    return getattr(torch, wish)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
