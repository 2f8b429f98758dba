"""The training loop. It knows no method by name: a method gives the loss of a student's hidden states."""

import collections
import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import set_seed

from .. import distributed, processes
from ..config.models import ModelConfig
from ..config.schema import Config
from ..console import console
from ..data.batches import Batch, StepBatch, make_step_batch, prefetch, step_samples
from ..data.chat import PromptFormat
from ..device import choose_device, choose_dtype
from ..errors import Interrupted, disk_errors
from ..files import CHECKPOINTS, check_folder, write_json
from ..finished import locked_run
from ..losses.arguments import LinearHead
from ..methods import METHODS
from ..methods.rollouts import Rollouts
from ..models import loading, quantized, tokenizers
from ..models.causal_lm import CausalLM
from ..models.experts import Experts, is_mixture
from ..models.loading import MetaModel
from ..signals import StopSignals
from ..teacher.teacher import CachedTeacher
from . import checkpoint, costs, dry_run, finite, state
from .checkpoint_policy import CheckpointPolicy
from .checkpoint_writer import CheckpointWriter, load_optimizer
from .likelihoods import ResponseLikelihoods
from .metrics import MetricsWindow, RunLog
from .optim import build_optimizer, build_scheduler, reserved_bytes
from .prepare import Prepared, is_sharded, read_tokenizer, read_train_data
from .save_dtype import Conversion, choose
from .state import TrainState
from .summary import write_result
from .teachers import Lesson, Teachers


class Trainer:
    """One run, from its configuration to its folder final/."""

    def __init__(self, config: Config, resume: bool = False, prepared: Prepared | None = None) -> None:
        """Checks everything that can be checked without weights. Writes nothing. Raises ConfigError.

        Args:
            resume: the run continues from its newest checkpoint, or starts where it has none.
            prepared: what earlier checks have read already.
        """
        self.config, self.resume = config, resume
        self.device = choose_device(config.train.device, "train.")
        self.dtype = choose_dtype(config.train.dtype, self.device, "train.")
        self.method = METHODS[config.method](config)
        self.is_sharded = is_sharded(config)
        distributed.run_on_rank0(check_folder, config.run.folder, resume)
        prepared = prepared or Prepared()
        self.given = prepared.given
        self.student_meta = prepared.model("student", config.student)
        self.tokenizer = read_tokenizer(config)
        self.teachers = Teachers(config, self.method, self.student_meta, self.tokenizer, prepared)
        with distributed.rank0_first():  # the other ranks find the tokenized rows on the disk
            self.data = read_train_data(config, self.method, self.tokenizer, self.teachers.vocabulary, prepared)
        self.teachers.assign(self.data, self.device, self.dtype)
        processes.check_same(state.read_alike(self))

    def build(self) -> None:
        """Loads the models and builds all that a step needs. Restores the newest checkpoint of a resumed run."""
        config = self.config
        self.state, self.window, self.signals = TrainState(), MetricsWindow(self.device), StopSignals()
        self.checkpoints = checkpoint.Checkpoints(config.run.folder / CHECKPOINTS, config.checkpoint.keep)
        self.resumed_from = distributed.run_on_rank0(self.checkpoints.newest) if self.resume else None
        set_seed(config.run.seed)
        save_dtype = distributed.run_on_rank0(choose, config, self.given.models.get("student"))
        self.student = self._build_student()
        self.conversion = Conversion(save_dtype, self.student)
        self.replica = distributed.replicate(self.student, may_idle=self.student.experts is not None)
        self.build_teachers(reserved_bytes(self.student, config.optim))
        self.optimizer = build_optimizer(self.student, config.optim, self.given.optimizer)
        self.scheduler = build_scheduler(config.optim, self.optimizer, self.data.steps, self.given.scheduler)
        self.rollouts = None
        if self.teachers.is_on_policy:
            teacher = None if self.teachers.are_several else self.teachers["teacher"].live.model  # which may write, too
            models = self.student, teacher
            context = self.precision, self.teachers.written_tokens
            self.rollouts = Rollouts(config, self.tokenizer, self.data.train_set, *models, *context)
        self.checkpoint_writer = CheckpointWriter(self.checkpoints, self.student, self.optimizer, self.tokenizer)
        distributed.seed_per_rank(config.run.seed)
        if self.resumed_from:
            load_optimizer(self.optimizer, self.student, self.resumed_from)
            state.load_state_dict(self, *checkpoint.load(self.resumed_from))
        every_steps = config.checkpoint.every_steps or self.data.steps_per_epoch
        saved = self.resumed_from, lambda folder: self.log.report("checkpoint", folder)
        self.saves = CheckpointPolicy(self.checkpoint_writer, self.state, every_steps, *saved)
        self.resumed_samples = self.state.samples
        is_wanted = bool(self.teachers) and not self.resumed_from
        self.likelihoods = ResponseLikelihoods(self.device, self.teachers.count_labels, is_wanted)
        self.costs = {
            key: self.step_cost(isinstance(teacher, CachedTeacher), key) for key, teacher in self.teachers.built.items()
        } or {None: self.step_cost(cached=False)}

    def _build_student(self) -> CausalLM:
        train, spec = self.config.train, self.config.student
        spec = spec.saved_in(self.resumed_from) if self.resumed_from else spec
        student = self._load(spec, self.student_meta, "student").train()
        ends = tokenizers.end_tokens(
            self.config.student.path, self.tokenizer, PromptFormat.from_config(self.config.data)
        )
        tokenizers.set_end_tokens(student.causal_lm, ends)
        if train.gradient_checkpointing:
            student.checkpoint_layers()
        if is_mixture(student):
            student.experts = Experts(student.causal_lm, self.student_meta.router_loss_weight)
        return student

    def build_teachers(self, reserved: int) -> None:
        """Builds what the losses ask. reserved: bytes of device memory that training needs besides."""
        self.teachers.build(functools.partial(self._load, role="teacher"), self.precision, reserved)

    def _load(self, spec: ModelConfig, meta: MetaModel, role: str) -> CausalLM:
        # Trained weights stay in float32; bfloat16 is then the type of the computation only.
        storage = torch.float64 if self.dtype == torch.float64 else torch.float32
        if (role == "teacher" or spec.has_adapter) and self.dtype == torch.bfloat16:
            storage = torch.bfloat16
        models = self.given.models
        model = loading.load(spec, meta.whole, role, storage, self.device, self.is_sharded, models.get(role))
        if role == "teacher":
            model.requires_grad_(False)
        if self.is_sharded:
            distributed.shard(model, model.layers, self.device, storage, self.dtype)
        with self.precision(), distributed.unsharded(model):
            model.check()
            if role == "student" and meta.quantization is not None:
                quantized.check_gradients(model, meta.quantization.name)
        can_compile = model.can_compile and model.form == "packed"
        if self.device.type == "cuda" and self.config.train.compile == "auto" and can_compile:
            model.compile()
        return model

    def precision(self) -> contextlib.AbstractContextManager:
        """The context in which the models compute."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def step_cost(self, cached: bool, key: str | None = None) -> costs.StepCost:
        """The cost of a step under one of the teachers, or none, with or without its cache."""
        teacher = None if key is None else costs.ModelCost.of(self.teachers.metas[key], self.dtype)
        student = costs.ModelCost.of(self.student_meta, self.dtype)
        return costs.StepCost(student, self.student_meta.adapter_size, teacher, cached)

    def train(self) -> dict:
        """Trains, writes the run folder, and returns the summary. Another process may have finished the run meanwhile.

        Raises FloatingPointError for a loss or gradient that is not finite (unless train.on_nonfinite is skip).
        Raises Interrupted after a signal, and where the disk has no space for the result. Raises ConfigError where
        another process is at work on the run, or has begun it with other values.
        """
        folder = self.config.run.folder
        with locked_run(self.config, self.resume) as summary:
            if summary is not None:
                return summary
            for line in dry_run.first_lines(self):
                console.print(line)
            self.build()
            with disk_errors(folder):
                distributed.run_on_rank0(write_json, folder / "config.json", self.config.to_dict())
            for line in dry_run.header(self):
                console.print(line)
            self.train_loop()
            return write_result(self)

    def train_loop(self) -> None:
        """Takes every step that is left; logs, evaluates and saves where that is due."""
        done = self.state.step if self.resumed_from else -1
        elapsed, reports = self.state.window_seconds, self.given.reports
        self.log = RunLog(self.config, self.data.steps, self.device, done, elapsed, reports)
        self.log.is_stopped = self.state.is_stopped
        with self.signals, self.log, self.checkpoint_writer:
            self._after_step()
            batches = self.batches(self.state.step)
            for batch in prefetch(map(self._for_gpu, batches)) if self.device.type == "cuda" else batches:
                if self._ends_early():
                    break
                started, lr = time.perf_counter(), self.scheduler.get_last_lr()[0]
                batch = self.select_batch(batch)
                self.state.step += 1
                # Before the step, which gives samples their teacher's hidden states.
                flops = costs.step_flops(batch, self.costs, self.teachers, self.method)
                with self.likelihoods.measured(batch):
                    loss, norm, parts = self.train_step(batch)
                self.window.add(self.state.step, loss, norm, parts, batch, flops)
                self._log(lr)
                self.state.seconds += time.perf_counter() - started
                self.state.samples += self.config.train.batch_size
                self._after_step()
            if self.conversion.is_refused() and not self.saves.is_saved:
                self._save(self.state.best)  # final/ will be refused: the run resumes from here, with another type
            self.saves.conclude()

    def _ends_early(self) -> bool:
        """Whether a given function, or the dev rows, end the run; its last step is then the present one. Collective."""
        waited, patience, reason = self.state.evaluations_since_best, self.config.eval.patience, "as asked"
        if patience is not None and waited >= patience:
            reason = f"the last {waited} evaluations were no better than one before"
        elif not self.state.step or not self.log.ends_run():
            return False
        self.data = dataclasses.replace(self.data, steps=self.state.step)
        console.print(f"ended after step {self.state.step}: {reason}")
        if self.window.steps:
            self._log(self.scheduler.get_last_lr()[0])
        self._after_step()
        return True

    def batches(self, first: int = 0) -> Iterator[StepBatch]:
        """The batch of every step from `first`, counted from 0, as the data give it."""
        size, seed = self.config.train.batch_size, self.config.run.seed
        for step in range(first, self.data.steps):
            samples = self.teachers.arrange(step_samples(self.data.train_set, size, seed, step))
            blocks = [] if self.data.pretrain_set is None else step_samples(self.data.pretrain_set, size, seed, step)
            yield make_step_batch(samples, blocks, self.config.train.max_tokens)

    def _for_gpu(self, batch: StepBatch) -> StepBatch:
        """A batch of the data in page-locked memory, with the teacher's states if these lie on the disk."""
        parts = [*map(self.teachers.read_ahead, batch.micro_batches)]
        return dataclasses.replace(batch, micro_batches=parts).pin()

    def select_batch(self, batch: StepBatch) -> StepBatch:
        """The batch that the next step trains on: an on-policy method may replace the data's responses."""
        if not self.teachers.is_on_policy:
            return batch
        step = self.state.step
        chosen = self.method.select_batch(step, (step + 1) / self.data.steps, batch.samples, self.rollouts)
        if chosen is batch.samples:
            return batch
        chosen = self.teachers.arrange(chosen)
        batch = make_step_batch(chosen, batch.pretrain_blocks, self.config.train.max_tokens)
        return batch.pin() if self.device.type == "cuda" else batch

    def train_step(self, batch: StepBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """One optimizer step. Returns its loss, gradient norm, and the loss's parts, all still on the device."""
        self.shares: dict[str, list[Tensor]] = collections.defaultdict(list)
        for part in batch.micro_batches:
            with distributed.grad_sync(self.replica, part is batch.micro_batches[-1]):
                self._backward(part, batch)
        parts = self._loss_parts(batch)
        total = parts["loss_method"]
        if batch.pretrain_blocks:
            total = total + self.config.data.pretrain.weight * parts["loss_pretrain"]
        else:
            del parts["loss_method"]
        if self.student.experts:
            self.window.add_expert_tokens(self.student.experts.tokens)
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.config.optim.clip_norm)
        norm = distributed.full_tensor(norm)
        is_good = finite.is_finite(total, norm)
        if getattr(self.optimizer, "_step_supports_amp_scaling", False):
            # A fused optimizer reads this on the device: where it is 1, weights, moments and step counts stay.
            self.optimizer.found_inf = (~is_good).float()
            self.optimizer.step()
        elif is_good:
            self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm, parts

    def _backward(self, part: Batch, batch: StepBatch) -> None:
        """Adds a micro-batch's share of the gradient, and keeps its shares of the step's mean losses.

        The means are over the labels of the whole step on all ranks.
        """
        num_labels, weight = batch.num_labels, 1.0
        if part.is_pretrain:
            num_labels, weight = batch.num_pretrain_labels, self.config.data.pretrain.weight
        part = dataclasses.replace(part.to(self.device), loss_scale=weight / max(1, num_labels))
        with self.precision():
            asks = not part.is_pretrain or self.method.pretrain_needs_teacher
            lessons = self.teachers.lessons(part) if asks else [Lesson(part)]
            loss = self.replica(part, functools.partial(self._loss, lessons))
        objective = loss
        if isinstance(loss, tuple):
            loss, router_loss = loss
            objective = loss + self.student_meta.router_loss_weight * router_loss
            self.shares["loss_router"].append(router_loss.detach().to(loss.dtype))
        objective.backward()
        self.shares["loss_pretrain" if part.is_pretrain else "loss_method"].append(loss.detach() / weight)

    def _loss(self, lessons: list[Lesson], student: LinearHead) -> Tensor:
        """The loss of a micro-batch by the student's head: the sum over its teachers."""
        losses = []
        for lesson in lessons:
            loss_of = self.method.pretrain_loss if lesson.batch.is_pretrain else self.method.loss
            count, teacher, own = self.teachers.shared_tokens(lesson.key), lesson.head, lesson.of(student)
            self.likelihoods.add(lesson.key, lesson.batch, own, teacher)
            if teacher is not None and count is not None:  # the loss ends before tokens that differ
                own, teacher = own.prefix(count), teacher.prefix(count)
            losses.append(loss_of(own, batch=lesson.batch, teacher=teacher))
            if lesson.key is not None:
                self.shares[lesson.key].append(losses[-1].detach())
        return functools.reduce(torch.add, losses)

    def _loss_parts(self, batch: StepBatch) -> dict[str, Tensor]:
        """The parts of a step's loss, summed over its micro-batches and all ranks.

        That of one of several teachers is the mean over its own labels.
        """
        names = ["loss_method"] + ["loss_pretrain"] * bool(batch.pretrain_blocks)
        names += ["loss_router"] * bool(self.shares["loss_router"])
        labels = self.teachers.count_labels(batch.samples) if self.teachers.are_several else {}
        zero = self.shares["loss_method"][0].new_zeros(())
        sums = [sum(self.shares[name], zero) for name in (*names, *labels)]
        sums = distributed.all_reduce_sum(torch.stack(sums))
        parts = dict(zip(names, sums, strict=False))
        for (key, count), share in zip(labels.items(), sums[len(names) :], strict=True):
            parts[f"loss_of_{key.rpartition('.')[2]}"] = share * (batch.num_labels / count)
        return parts

    def _log(self, lr: float) -> None:
        """Writes a point where it is due, over the steps since the last one."""
        step = self.state.step
        if step % self.config.log.every_steps == 0 or step == self.data.steps:
            finite.check(self)
            own = self.method.metrics()
            if self.rollouts:
                own = own | self.rollouts.metrics(self.window.steps)
            if self.student.experts:
                own = own | self.student.experts.load(self.window.all_expert_tokens())
            if skipped := self.window.write(self.log, step, lr, own):
                self.state.skipped_steps += skipped
                account = self.window.describe_nonfinite(step, self.data.where)
                console.print(f"skipped {skipped} steps that were not finite, the first: {account}")
            self.window = MetricsWindow(self.device)
            return
        self.log.advance(step)
        if self._evaluation_is_due() and self.device.type == "cuda":
            torch.cuda.synchronize()  # else the steps' time would count as the evaluation's

    def _after_step(self) -> None:
        """Evaluates and saves where that is due. Raises Interrupted after a signal."""
        if evaluates := self._evaluation_is_due():
            self.saves.conclude()  # the best step so far is known then
        previous_best = self.state.best
        improved = evaluates and self._evaluate()
        stop = self.signals.of_any_rank()
        is_first = self.state.step == 0 and "student" in self.given.models  # nothing on the disk has its weights
        due = (is_first or self.saves.is_due() or improved) and self.state.step < self.data.steps
        if (stop or due) and not self.saves.is_saved:
            self._save(previous_best)
        if stop:
            self.saves.conclude()
            saved = self.saves.saved
            kept = f"{saved} is saved" if self.saves.is_saved else f"last checkpoint: {saved or 'none'}"
            raise Interrupted(f"{stop} after step {self.state.step} of {self.data.steps}; {kept}")

    def _evaluation_is_due(self) -> bool:
        dev, step = self.data.dev, self.state.step
        due = dev is not None and dev.is_due(step, self.data.steps, self.data.steps_per_epoch)
        return due and self.state.evaluated_step != step

    def dev_loss(self) -> float | None:
        """The loss on the development rows; None after a signal. Collective."""
        return self.data.dev.loss(self.student, self.device, self.signals)

    def _evaluate(self) -> bool:
        """Returns whether this is the best step so far. A signal ends it early; a resumed run repeats it."""
        self.log.pause()
        finite.check(self)
        with distributed.unsharded(self.student), self.precision():
            loss = self.dev_loss()
            answers = None if loss is None else self.data.dev.answers.measure(self.student, self.signals)
        if answers is not None:
            rouge_l, samples = answers
            self.log.evaluation(self.state.step, loss, rouge_l, samples)
            self.method.on_eval(loss)
        self.log.resume()
        by_rouge = self.config.eval.select == "rouge_l"
        return answers is not None and self.state.record_eval(loss, rouge_l, by_rouge)

    def _save(self, previous_best: tuple | None) -> None:
        """Begins a checkpoint. previous_best: `state.best` before this step."""
        self.log.pause()
        self.saves.conclude()
        finite.check(self)
        self.state.window_seconds, self.state.is_stopped = self.log.window_seconds, self.log.is_stopped
        self.saves.begin(*state.state_dict(self), previous_best, self.log.flush)
        self.log.resume()
