"""The training loop. It knows no method by name: a method says which loss a student's hidden states get."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import get_scheduler, set_seed

from .. import distributed, methods
from ..config.schema import Config, ModelConfig
from ..console import console
from ..data import pretrain
from ..data.batches import Batch, StepBatch, make_step_batch, prefetch, step_samples
from ..data.rows import DEV, TRAIN, read_rows
from ..data.tokenize import describe_long_rows, tokenize
from ..device import choose_device, choose_dtype, device_name, peak_memory
from ..errors import ConfigError, Interrupted
from ..files import WRITE_ERRORS, atomic_write, check_folder, locked
from ..methods.rollouts import Rollouts
from ..methods.sft import cross_entropy
from ..models import loading
from ..models.packed import PackedCausalLM
from ..signals import StopSignals
from ..teacher.cache import TeacherCache
from ..teacher.teacher import CachedTeacher, OnPolicyTeacher, Teacher
from . import checkpoint, costs, dry_run
from .checkpoint_writer import CheckpointWriter, load_optimizer
from .metrics import MetricsWindow, RunLog, check_wandb, is_finite
from .state import TrainState


class Trainer:
    """One run, from its configuration to its `final/` folder."""

    def __init__(self, config: Config, resume: bool = False) -> None:
        """Checks all that can be checked without weights. Raises ConfigError; writes nothing.

        With `resume`, the run goes on from its newest checkpoint, or from the start where it has none.
        """
        self.config, self.resume = config, resume
        self.device = choose_device(config.train.device, "train.")
        self.dtype = choose_dtype(config.train.dtype, self.device, "train.")
        self.method = methods.find(config.method)(config)
        distributed.run_on_rank0(functools.partial(check_folder, config.run.folder, resume))
        check_wandb(config.log.wandb)
        self.student_config = loading.read_hf_config(config.student, "student")
        self.teacher_config = loading.read_hf_config(config.teacher, "teacher") if self.method.needs_teacher else None
        source = config.tokenizer or config.student.path
        self.tokenizer = loading.read_tokenizer(source, "tokenizer" if config.tokenizer else "student.path")
        theirs = None
        if self.method.needs_teacher and config.teacher.path is not None:
            theirs = loading.read_tokenizer(config.teacher.path, "teacher.path")
        loading.check_vocabularies(self.tokenizer, self.student_config, self.teacher_config, theirs)
        loading.check_length(self.student_config, "student", config.data.max_length)
        if self.method.needs_teacher:
            loading.check_length(self.teacher_config, "teacher", config.data.max_length)
        with distributed.rank0_first():  # the others find the tokenized rows
            self._read_data()
        self.cache = None
        if self.method.needs_teacher:
            samples = round(self.steps * config.train.batch_size * self.method.off_policy_fraction)
            self.cache = TeacherCache(config, self.teacher_config, self.train_set, samples, self.device, self.dtype)

    def _read_data(self) -> None:
        data, train = self.config.data, self.config.train
        limits = data.max_length, data.max_prompt_length
        rows = read_rows(data.train, data.train_rows, TRAIN)
        self.train_set = tokenize(rows, self.tokenizer, *limits)
        self.where = [row.where for row in rows]
        self.long_rows = {"train": describe_long_rows(rows, self.train_set, *limits)}
        self.dev_set = self.dev_rouge = self.pretrain_set = None
        if data.dev is not None:
            rows = read_rows(data.dev, data.dev_rows, DEV)
            self.dev_set = tokenize(rows, self.tokenizer, *limits)
            self.long_rows["dev"] = describe_long_rows(rows, self.dev_set, *limits)
            if self.config.eval.rouge_rows is not None:
                from .dev_eval import DevelopmentRouge  # takes half a second, and most runs need none

                self.dev_rouge = DevelopmentRouge(self.config, rows, self.dev_set, self.tokenizer)
        self.steps_per_epoch = len(self.train_set) // train.batch_size
        if train.batch_size < distributed.world_size():
            raise ConfigError(
                f"train.batch_size is {train.batch_size}, but there are {distributed.world_size()} processes, "
                "each of which needs a sample in every step: raise it, or start fewer"
            )
        if self.is_sharded and train.batch_size % distributed.world_size():
            raise ConfigError(
                f"train.batch_size is {train.batch_size}, but train.parallel=fsdp needs a multiple of the "
                f"{distributed.world_size()} processes, which compute in step"
            )
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"{data.train}: {len(self.train_set)} rows are fewer than train.batch_size = {train.batch_size}"
            )
        if hasattr(self.method, "check_rows"):
            self.method.check_rows(len(self.train_set))
        self.steps = train.steps or train.epochs * self.steps_per_epoch
        if data.adds_text:
            self.pretrain_set = pretrain.load_blocks(data.pretrain, self.tokenizer, data.max_length)
            if len(self.pretrain_set) < train.batch_size:
                raise ConfigError(
                    f"data.pretrain: {data.pretrain.path}: {len(self.pretrain_set)} blocks of {data.max_length} tokens "
                    f"are fewer than train.batch_size = {train.batch_size}"
                )

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the weights."""
        return self.config.train.parallel == "fsdp" and distributed.world_size() > 1

    @property
    def is_on_policy(self) -> bool:
        return hasattr(self.method, "select_batch")

    def step_cost(self, cached: bool) -> costs.StepCost:
        """Of a step, with or without the teacher's cache."""
        teacher = costs.ModelCost(self.teacher_config) if self.method.needs_teacher else None
        adapter = loading.adapter_size(self.config.student, self.student_config, "student")
        return costs.StepCost(costs.ModelCost(self.student_config), adapter, teacher, cached)

    def build(self) -> None:
        config = self.config
        self.progress, self.window, self.signals = TrainState(), MetricsWindow(self.device), StopSignals()
        self.checkpoints = checkpoint.Checkpoints(config.run.folder / "checkpoints", config.checkpoint.keep)
        self.saved = distributed.run_on_rank0(self.checkpoints.newest) if self.resume else None
        self.saving: tuple[int, tuple | None] | None = None  # its step, and the best one before it
        set_seed(config.run.seed)
        student = config.student.saved_in(self.saved) if self.saved else config.student
        self.student = self._model(student, self.student_config, "student").train()
        trained = [p for p in self.student.parameters() if p.requires_grad]
        if config.train.gradient_checkpointing:
            self.student.checkpoint_layers()
        if self.device.type == "cuda" and config.train.compile == "auto":
            self.student.compile()
        self.replica = distributed.replicate(self.student)
        self.teacher = None
        if self.cache:
            load = functools.partial(self._model, config.teacher, self.teacher_config, "teacher")
            optimizer_bytes = 12 * sum(map(distributed.local_numel, trained))  # gradients and two moments
            # Random weights are the same ones on resume, and dropout is whether the teacher's weights load or not.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.run.seed + 1)
                live = Teacher(load()) if self.is_on_policy else None
                of_data = self.cache.open((lambda: live.model) if live else load, self.precision, optimizer_bytes)
            self.teacher = OnPolicyTeacher(live, of_data) if live else of_data
        optim = config.optim
        decayed = [p for p in trained if p.dim() > 1 or self.student.has_adapter]
        others = [p for p in trained if p.dim() <= 1 and not self.student.has_adapter]
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
        self.saver = CheckpointWriter(self.checkpoints, self.student, self.optimizer, self.tokenizer)
        if self.is_on_policy:
            models_of_text = self.student, self.teacher.live.model
            self.rollouts = Rollouts(config, self.tokenizer, self.train_set, *models_of_text, self.precision)
        distributed.seed_per_rank(config.run.seed)
        if self.saved:
            load_optimizer(self.optimizer, self.student, self.saved)
            self._restore(*checkpoint.load(self.saved))
        self.resumed_samples = self.progress.samples
        self.cost = self.step_cost(isinstance(self.teacher, CachedTeacher))

    def _model(self, spec: ModelConfig, config: loading.PretrainedConfig, key: str) -> PackedCausalLM:
        # What is trained stays in float32; there bfloat16 is the type of the computation only.
        storage = torch.float64 if self.dtype == torch.float64 else torch.float32
        if (key == "teacher" or spec.has_adapter) and self.dtype == torch.bfloat16:
            storage = torch.bfloat16
        model = loading.load(spec, config, key, storage, self.device, self.is_sharded)
        if key == "teacher":
            model.requires_grad_(False)
        if self.is_sharded:
            distributed.shard(model, model.layers, self.device, storage, self.dtype)
        with self.precision(), distributed.unsharded(model):
            model.check()
        return model

    def precision(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def train(self) -> dict:
        """Trains, writes the run folder, and returns its summary.

        Raises FloatingPointError for a loss or gradient that is not finite (unless train.on_nonfinite is skip), and
        Interrupted where a signal, or a disk without space for the result, ended the run.
        """
        config = self.config
        with distributed.rank0_context(locked(config.run.folder)):
            self.build()
            text = json.dumps(config.to_dict(), indent=2) + "\n"
            write = functools.partial(atomic_write, config.run.folder / "config.json", text)
            try:
                distributed.run_on_rank0(write)
            except WRITE_ERRORS as error:
                raise Interrupted(f"{config.run.folder} can't be written to ({error}): make room") from None
            for line in dry_run.header(self):
                console.print(line)
            self.train_loop()
            return self._finish()

    def train_loop(self) -> None:
        config, progress = self.config, self.progress
        done = progress.step if self.saved else -1
        log = RunLog(config, self.steps, self.device, done, progress.window_seconds)
        with self.signals, log, self.saver:
            self._after_step(log)
            batches = self.batches(progress.step)
            for batch in prefetch(batches) if self.device.type == "cuda" else batches:
                started, rate = time.perf_counter(), self.scheduler.get_last_lr()[0]
                if self.is_on_policy:
                    batch = self.select_batch(batch)
                progress.step += 1
                flops = self._flops(batch)  # before the step, which gives samples their teacher's states
                self.window.add(progress.step, *self.train_step(batch), batch, flops)
                log.advance(progress.step)
                if progress.step % config.log.every_steps == 0 or progress.step == self.steps:
                    self._log_window(log, rate)
                elif self._evaluation_is_due() and self.device.type == "cuda":
                    torch.cuda.synchronize()  # the steps' time must not be counted as the evaluation's
                progress.seconds += time.perf_counter() - started
                progress.samples += config.train.batch_size
                self._after_step(log)
            self._conclude_save()

    def batches(self, first: int = 0) -> Iterator[StepBatch]:
        """What each step from `first` to `steps`, counted from 0, trains on."""
        size, seed = self.config.train.batch_size, self.config.run.seed
        for step in range(first, self.steps):
            text = [] if self.pretrain_set is None else step_samples(self.pretrain_set, size, seed, step)
            batch = make_step_batch(step_samples(self.train_set, size, seed, step), text, self.config.train.max_tokens)
            yield batch.pin() if self.device.type == "cuda" else batch

    def select_batch(self, batch: StepBatch) -> StepBatch:
        """The next step's batch with the sequences that the method trains on, given those of the data."""
        step = self.progress.step
        chosen = self.method.select_batch(step, (step + 1) / self.steps, batch.samples, self.rollouts)
        if chosen is batch.samples:
            return batch
        return make_step_batch(chosen, batch.pretrain_blocks, self.config.train.max_tokens)

    def _finish(self) -> dict:
        """Writes and returns the summary; the folder `final` is written last: with it the run is finished."""
        progress, folder = self.progress, self.config.run.folder
        if isinstance(self.teacher, CachedTeacher):
            seconds = self.teacher.saved(progress.samples - self.resumed_samples)
            console.print(f"the teacher's cache saved about {seconds:.1f} s")
        step, dev_loss, dev_rouge_l, saved = self._selected()
        summary = {
            "method": self.config.method,
            "steps": self.steps,
            "selected_step": step,
            "skipped_steps": progress.skipped_steps,
            "dev_loss_before": progress.first_dev_loss,
            "dev_loss": dev_loss,
            "dev_rouge_l_before": progress.first_dev_rouge_l,
            "dev_rouge_l": dev_rouge_l,
            "seconds_per_sample": progress.seconds / progress.samples,
            "peak_memory_bytes": peak_memory(self.device),
        }
        text, final = json.dumps(summary, indent=2) + "\n", folder / "final"
        try:
            distributed.run_on_rank0(functools.partial(atomic_write, folder / "summary.json", text))
            if saved:
                distributed.run_on_rank0(functools.partial(checkpoint.copy_model, saved, final))
            else:
                self.saver.save_model(final)
        except WRITE_ERRORS as error:
            raise Interrupted(f"{final} can't be written ({error}): make room") from None
        return summary

    def _selected(self) -> tuple[int, float | None, float | None, pathlib.Path | None]:
        """The step whose weights `final` gets, its development loss and ROUGE-L, and its checkpoint.

        The last step, whose weights are in memory (None), unless eval.select asks for the best, and that is whole.
        """
        last = self.steps, self.progress.dev_loss, self.progress.dev_rouge_l, None
        if self.config.eval.select == "last" or self.progress.best is None or self.progress.best[1] == self.steps:
            return last
        _, step, loss, rouge_l = self.progress.best
        by_rouge = self.config.eval.select == "rouge_l"
        virtue, value = ("highest dev ROUGE-L", f"{rouge_l:.2f}") if by_rouge else ("lowest dev loss", f"{loss:.4f}")
        saved = self.checkpoints.folder_of(step)
        if reason := distributed.run_on_rank0(functools.partial(checkpoint.damage, saved)):
            console.print(f"[bold red]damaged[/] {saved} ({reason}), of the {virtue}: the last step is taken")
            return last
        console.print(f"step {step} is taken, of the {virtue}, {value}")
        return step, loss, rouge_l, saved

    def train_step(self, batch: StepBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """One optimizer step; returns its loss, gradient norm, and the loss's parts, still on the device."""
        weight = self.config.data.pretrain.weight if batch.pretrain_blocks else 0.0
        sums = [0.0] * (2 if batch.pretrain_blocks else 1)  # the method's loss, and that of plain text
        for part in batch.micro_batches:
            with distributed.grad_sync(self.replica, part is batch.micro_batches[-1]):
                if part.is_pretrain:
                    sums[1] = sums[1] + self._backward(part, batch.num_pretrain_labels, self._text_loss, weight)
                else:
                    sums[0] = sums[0] + self._backward(part, batch.num_labels, self._method_loss)
        total, *of_text = distributed.all_reduce_sum(torch.stack(sums))
        parts = {}
        if of_text:
            parts = {"loss_method": total, "loss_pretrain": of_text[0]}
            total = total + weight * of_text[0]
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.config.optim.clip_norm)
        norm = distributed.full_tensor(norm)
        # The fused AdamW reads this on the device: where it is 1, weights, moments and step counts stay as they are.
        self.optimizer.found_inf = (~is_finite(total, norm)).float()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm, parts

    def _backward(self, part: Batch, labels: int, loss_of: Callable[[Batch], Callable], weight: float = 1.0) -> Tensor:
        """Adds to the gradient that of `weight` times a micro-batch's share of the mean loss; returns the share.

        Args:
            labels: of the whole step, on all ranks: the mean is over these.
            loss_of: gives a micro-batch's summed loss, as a function of hidden states, projection and bias.
        """
        part = part.to(self.device)
        with self.precision():
            loss = self.replica(part, loss_of(part)) / labels
        (weight * loss).backward()
        return loss.detach()

    def _method_loss(self, part: Batch) -> Callable[..., Tensor]:
        states = self.teacher.states(part) if self.teacher else None
        return functools.partial(self.method.loss, batch=part, teacher=states)

    def _text_loss(self, part: Batch) -> Callable[..., Tensor]:
        if not hasattr(self.method, "pretrain_loss"):
            return functools.partial(cross_entropy, batch=part)
        return functools.partial(self.method.pretrain_loss, batch=part, teacher=self.teacher.live.states(part))

    def _flops(self, batch: StepBatch) -> int:
        """Of this rank."""
        total = 0
        for part in batch.micro_batches:
            taught = not part.is_pretrain or hasattr(self.method, "pretrain_loss")
            read = self.teacher.unknown(part.samples) if self.is_on_policy and not part.is_pretrain else None
            total += self.cost.flops(part.samples, taught, read)
        return total

    def _log_window(self, log: RunLog, rate: float) -> None:
        """Writes the point of the steps since the last one, and begins the next."""
        self._check_finite()
        numbers = self.method.metrics() | self.rollouts.metrics(self.window.steps) if self.is_on_policy else {}
        skipped = self.window.write(log, self.progress.step, rate, numbers)
        if skipped:
            self.progress.skipped_steps += skipped
            step, loss, norm = self.window.first_nonfinite.tolist()
            console.print(f"skipped {skipped} steps that were not finite, the first: {self._account(step, loss, norm)}")
        self.window = MetricsWindow(self.device)

    def _check_finite(self) -> None:
        """Looks at what the device has noted, and so waits for it. Raises FloatingPointError."""
        step, loss, norm = self.window.first_nonfinite.tolist()
        if step and self.config.train.on_nonfinite == "stop":
            self._conclude_save()
            saved = f"last good checkpoint: {self.saved}" if self.saved else "there is no checkpoint yet"
            raise FloatingPointError(
                f"{self._account(step, loss, norm)}; {saved}; resume with train.on_nonfinite=skip, or begin again with "
                "a lower optim.lr"
            )

    def _account(self, step: float, loss: float, norm: float) -> str:
        """The numbers of a step since the last logged point, and the rows that its samples or their prompts are."""
        numbers = {}
        for row in sorted({*self.window.rows[int(step) - self.progress.step - 1]}):
            source, _, number = self.where[row].rpartition(" ")
            numbers.setdefault(source, []).append(number)
        where = "; ".join(f"{source} {', '.join(numbers[source])}" for source in numbers)
        return f"step {int(step)}: loss {loss:.4g}, gradient norm {norm:.4g}, samples {where}"

    def _after_step(self, log: RunLog) -> None:
        """Evaluates and saves where that is due. Raises Interrupted after a signal."""
        if self._evaluation_is_due():
            self._conclude_save()  # what is best so far is known then
        progress, best = self.progress, self.progress.best
        improved = self._evaluation_is_due() and self._evaluate(log)
        stop = self.signals.of_any_rank()
        saved = self.checkpoints.folder_of(progress.step)
        due = progress.step and progress.step % (self.config.checkpoint.every_steps or self.steps_per_epoch) == 0
        if self.saved != saved and (stop or ((due or improved) and progress.step < self.steps)):
            self._save(log, best)
        if stop:
            self._conclude_save()
            kept = f"{self.saved} is saved" if self.saved == saved else f"last checkpoint: {self.saved or 'none'}"
            raise Interrupted(f"{stop} after step {progress.step} of {self.steps}; {kept}")

    def _evaluation_is_due(self) -> bool:
        step = self.progress.step
        due = step in (0, self.steps) or step % (self.config.eval.every_steps or self.steps_per_epoch) == 0
        return due and self.dev_set is not None and self.progress.evaluated_step != step

    def _evaluate(self, log: RunLog) -> bool:
        """Whether this is the best step so far. A signal ends it early; a resumed run does it again."""
        log.pause()
        with distributed.unsharded(self.student), self.precision():
            loss, rouge_l = self.dev_loss(), None
            if loss is not None and self.dev_rouge:
                rouge_l = self.dev_rouge.measure(self.student, self.signals)
        done = loss is not None and (rouge_l is not None or not self.dev_rouge)
        if done:
            log.evaluation(self.progress.step, loss, rouge_l)
            if self.is_on_policy:
                self.method.on_eval(loss)
        log.resume()
        return done and self.progress.evaluated(loss, rouge_l, self.config.eval.select == "rouge_l")

    def _save(self, log: RunLog, best: tuple | None) -> None:
        """Begins a checkpoint. best: `progress.best` before this step."""
        log.pause()
        self._conclude_save()
        self._check_finite()
        self.progress.window_seconds = log.window_seconds
        self.saving = self.progress.step, best
        best_step = self.progress.best[1] if self.progress.best else None
        try:
            self.saver.begin(self.progress.step, best_step, *self._state(), log.flush)
        except WRITE_ERRORS as error:
            self._give_up_save(error)
        log.resume()

    def _conclude_save(self) -> None:
        """Waits for the checkpoint that is being written, if one is."""
        if self.saving is None:
            return
        try:
            self.saver.conclude()
        except WRITE_ERRORS as error:
            self._give_up_save(error)
        else:
            (step, _), self.saving = self.saving, None
            self.saved = self.checkpoints.folder_of(step)

    def _give_up_save(self, error: Exception) -> None:
        """Without space the last checkpoint stays, and training goes on."""
        (step, best), self.saving = self.saving, None
        console.print(f"[bold red]no checkpoint[/] at step {step} ({error}); training goes on")
        if self.progress.best and self.progress.best[1] == step:
            self.progress.best = best  # of those that could be written

    def _state(self) -> tuple[dict[str, Tensor], dict]:
        """All that decides the steps to come besides model and optimizer, and what log and summary need."""
        generators, state = checkpoint.random_state()
        groups = {"random": checkpoint.by_rank(generators), "window": self.window.tensors()}
        tensors = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
        state |= {
            "progress": dataclasses.asdict(self.progress),
            "scheduler": self.scheduler.state_dict(),
            "data": self._fingerprints(),
            "environment": self._environment(),
        }
        if hasattr(self.method, "state_dict"):
            state["method"] = self.method.state_dict()
        if self.is_on_policy:
            state["rollouts"] = self.rollouts.counts
        return tensors, state

    def _restore(self, tensors: dict[str, Tensor], state: dict) -> None:
        """The inverse of `_state`, after model and optimizer. Raises ConfigError where the data have changed."""
        for key, now in self._fingerprints().items():
            if state["data"][key] != now:
                raise ConfigError(f"{key}: its text or the tokenizer has changed since {self.saved} was saved")
        for key, now in self._environment().items():
            then = state["environment"][key]
            if then != now:
                console.print(f"{key} was {then}, is {now}: the last bits of the result may differ")
        groups = {"random": {}, "window": {}}
        for key, value in tensors.items():
            group, _, name = key.partition("/")
            groups[group][name] = value
        self.window.load(groups["window"])
        self.progress = TrainState(**state["progress"])
        self.scheduler.load_state_dict(state["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        if "method" in state:
            self.method.load_state_dict(state["method"])
        if "rollouts" in state:
            self.rollouts.counts = state["rollouts"]
        # Last: loading models draws from the generators.
        checkpoint.set_random_state(checkpoint.of_rank(groups["random"]), state)

    def _fingerprints(self) -> dict[str, str]:
        """A hash of the tokens of all sources that the steps to come read."""
        sources = {"data.train": self.train_set, "data.pretrain": self.pretrain_set}
        return {key: source._fingerprint for key, source in sources.items() if source is not None}

    def _environment(self) -> dict[str, str | int]:
        return {"PyTorch": torch.__version__, "device": device_name(self.device), "processes": distributed.world_size()}

    @torch.no_grad()
    def dev_loss(self) -> float | None:
        """Cross-entropy of the development responses, mean over their tokens; None where a signal arrives."""
        self.student.eval()
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        batch = make_step_batch(list(self.dev_set), [], self.config.train.max_tokens)
        for part in batch.micro_batches:
            total += self.student(part.to(self.device), functools.partial(cross_entropy, batch=part))
            if self.signals.received:
                break
        self.student.train()
        return None if self.signals.of_any_rank() else distributed.all_reduce_sum(total).item() / batch.num_labels
