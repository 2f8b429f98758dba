"""The teachers of a run: none, one, or several of which each has rows of its own."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .. import distributed
from ..config.models import ModelConfig
from ..config.schema import Config
from ..data.batches import Batch, collate, count_labels
from ..errors import ConfigError
from ..losses.arguments import LinearHead, shared_vocabulary
from ..methods.base import Method, OnPolicyMethod
from ..models.causal_lm import CausalLM
from ..models.loading import MetaModel
from ..models.vocabularies import Vocabulary
from ..teacher.cache import Assignment, GivenStates, TeacherCache
from ..teacher.teacher import CachedTeacher, OnPolicyTeacher, Teacher
from .prepare import Prepared, TrainData, check_models, check_teacher_prompts, check_tokens, is_sharded

NOT_SHARDED = "but with train.parallel=fsdp all ranks have to ask the same teacher at a time"


class Lesson(NamedTuple):
    """Samples of a micro-batch that one teacher teaches."""

    batch: Batch
    rows: slice = slice(None)  # the samples' labels, among those of the micro-batch
    key: str | None = None  # the teacher's in the configuration; None without one
    head: LinearHead | None = None  # what the teacher says of them

    def of(self, student: LinearHead) -> LinearHead:
        """The student's hidden states of these samples, of those of the micro-batch."""
        return student if self.rows == slice(None) else student._replace(hidden=student.hidden[self.rows])


class Teachers:
    """By their keys in the configuration, "teacher" or "teachers.NAME", the models and how a run gets their states."""

    def __init__(
        self,
        config: Config,
        method: Method,
        student: MetaModel,
        tokenizer: PreTrainedTokenizerBase,
        prepared: Prepared,
    ) -> None:
        """Reads the models' configurations. Raises ConfigError where one doesn't fit the student or the method."""
        specs = config.all_teachers if method.needs_teacher else {}
        self.config, self.method = config, method
        self.metas = {key: prepared.model(key, spec) for key, spec in specs.items()}
        self.vocabularies: dict[str, Vocabulary] = {}
        for key, meta in self.metas.items():
            with self._naming(key):
                self.vocabularies[key] = check_models(config.of_teacher(key), student, meta, tokenizer, key)
        # Of the data that no single teacher reads.
        self.vocabulary = self.vocabularies.get("teacher") or check_models(config, student, None, tokenizer)
        self.is_on_policy = isinstance(method, OnPolicyMethod) and not any(
            spec.hidden_states for spec in specs.values()
        )
        live = "cache.mode is off" if config.cache.mode == "off" else ""
        live = f"method {config.method} asks them in training" if self.is_on_policy else live
        if self.are_several and live and is_sharded(config):
            raise ConfigError(f"teachers: {live}, {NOT_SHARDED}; use ddp", "teachers")
        self.caches: dict[str, TeacherCache] = {}
        self.built: dict[str, Teacher | CachedTeacher | OnPolicyTeacher] = {}

    def __getitem__(self, key: str) -> Teacher | CachedTeacher | OnPolicyTeacher:
        return self.built[key]

    def __bool__(self) -> bool:
        return bool(self.metas)

    @property
    def are_several(self) -> bool:
        return bool(self.metas) and self.config.teachers is not None

    @contextlib.contextmanager
    def _naming(self, key: str) -> Iterator[None]:
        """A context in which an error about one of several teachers says which."""
        try:
            yield
        except ConfigError as error:
            if not self.are_several or str(error).startswith(key):
                raise
            raise ConfigError(f"{key}: {error}", error.key) from None

    def assign(self, data: TrainData, device: torch.device, dtype: torch.dtype) -> None:
        """Gives each teacher its samples of the data, and finds out where their hidden states will come from.

        Raises ConfigError for a teacher without samples, or whose states can't be had.
        """
        self.name_of_row, of_sample = data.teachers, np.array([])
        if self.are_several:
            of_sample = np.array([self.key_of({"row": row}) for row in data.train_set["row"][:]])
        for key, meta in self.metas.items():
            config, own, indices = self.config.of_teacher(key), data, None
            if self.are_several:
                indices = np.flatnonzero(of_sample == key)
                if not len(indices):
                    rows = data.teachers.count(key.rpartition(".")[2])
                    problem = f"all {rows} rows with this teacher are left out: bad ones, or prompts that are too long"
                    problem = problem if rows else f"no row of {config.data.train} has this teacher"
                    raise ConfigError(f"{key}: {problem}; leave it out, or give it rows", key)
                own = dataclasses.replace(data, train_set=data.train_set.select(indices))
            share = self.method.off_policy_fraction * len(own.train_set) / len(data.train_set)
            samples = round(data.steps * config.train.batch_size * share) or int(share > 0)
            vocabulary = self.vocabularies[key]
            with self._naming(key):
                if self.are_several:  # else that of all data has checked them
                    check_tokens(vocabulary, own.train_set, own.place)
                check_teacher_prompts(config, self.method, meta, own)
                of_data = own.train_set, indices, own.place, samples
                earlier = tuple(self.caches.values())
                given = Assignment(key, config, meta, vocabulary, *of_data, device, dtype, earlier)
                self.caches[key] = TeacherCache(given) if config.teacher.hidden_states is None else GivenStates(given)
            self._check_device_map(key, config)

    def _check_device_map(self, key: str, config: Config) -> None:
        runs, processes = self.is_on_policy or not self.caches[key].is_found, distributed.world_size()
        if config.teacher.device_map and runs and processes > 1:
            problem = f"one process spreads the teacher over all GPUs, but there are {processes}"
            way_out = "build its cache first: python -m abkd_fast.cache, in one process"
            raise ConfigError(f"{key}.device_map: {problem}; {way_out}", f"{key}.device_map")

    def build(
        self,
        load: Callable[[ModelConfig, MetaModel], CausalLM],
        precision: Callable[[], contextlib.AbstractContextManager],
        reserved: int,
    ) -> None:
        """Builds one after the other. States that are kept are computed first; then that model leaves memory.

        Args:
            load: gives a teacher's model.
            precision: the context that the models run in.
            reserved: bytes of device memory that training will need besides what it holds now.

        Raises ConfigError where what cache.mode asks for can't be had.
        """
        for key, cache in self.caches.items():
            load_this = functools.partial(load, self.config.all_teachers[key], self.metas[key])
            # A resumed run needs the same random weights, and the same dropout whether or not a teacher's weights load.
            with torch.random.fork_rng(devices=[]), self._naming(key):
                torch.manual_seed(self.config.run.seed + 1 + sorted(self.caches).index(key))
                live = Teacher(load_this()) if self.is_on_policy else None
                of_data = cache.open((lambda: live.model) if live else load_this, precision, reserved)  # noqa: B023
            if self.are_several and is_sharded(self.config) and isinstance(of_data, Teacher):
                raise ConfigError(f"{key}: {of_data.note}, {NOT_SHARDED}; set cache.mode=disk, or use ddp", key)
            self.built[key] = OnPolicyTeacher(live, of_data) if live else of_data

    def key_of(self, sample: dict) -> str | None:
        """The key of a sample's teacher."""
        if self.are_several:
            return f"teachers.{self.name_of_row[sample['row']]}"
        return next(iter(self.metas), None)

    def grouped(self, samples: list[dict]) -> list[tuple[str | None, list[dict]]]:
        """Neighbors with one teacher, and its key."""
        return [(key, [*group]) for key, group in itertools.groupby(samples, self.key_of)]

    def choose(self, memory: int) -> dict[str, tuple[bool, bool, str]]:
        """What `TeacherCache.choose` says of each, with so many free bytes of device memory. Raises ConfigError."""
        choices = {}
        for key, cache in self.caches.items():
            with self._naming(key):
                choices[key] = cache.choose(memory)
        return choices

    def count_labels(self, samples: list[dict]) -> dict[str, int]:
        """The labels of each teacher that has some."""
        counts = dict.fromkeys(self.metas, 0)
        for sample in samples:
            counts[self.key_of(sample)] += count_labels(sample)
        return {key: count for key, count in counts.items() if count}

    def arrange(self, samples: list[dict]) -> list[dict]:
        """The samples, those of one teacher side by side: micro-batches then have few parts."""
        return sorted(samples, key=self.key_of) if self.are_several else samples

    def read_ahead(self, batch: Batch) -> Batch:
        """The micro-batch with its hidden states, if a step would wait for the disk. Another thread may call this."""
        if not self.built or batch.is_pretrain:
            return batch
        groups = self.grouped(batch.samples)
        if len(groups) == 1:
            return self.built[groups[0][0]].read_ahead(batch)
        parts = (self.built[key].read_ahead(collate(samples)) for key, samples in groups)
        return dataclasses.replace(batch, parts=tuple(part.pin() for part in parts))

    def lessons(self, batch: Batch) -> list[Lesson]:
        """The parts of a micro-batch, on its device, each with what its teacher says about it."""
        if not self.built:
            return [Lesson(batch)]
        if batch.is_pretrain:
            (key,) = self.built
            return [Lesson(batch, key=key, head=self.built[key].live.linear_head(batch))]
        groups = self.grouped(batch.samples)
        if len(groups) == 1:
            ((key, _),) = groups
            return [Lesson(batch, key=key, head=self.built[key].linear_head(batch))]
        parts, lessons, start = batch.parts or [collate(samples) for _, samples in groups], [], 0
        for (key, _), part in zip(groups, parts, strict=True):
            part = dataclasses.replace(part, loss_scale=batch.loss_scale).to(batch.input_ids.device)
            rows = slice(start, start := start + len(part.labels))
            lessons.append(Lesson(part, rows, key, self.built[key].linear_head(part)))
        return lessons

    def shared_tokens(self, key: str | None) -> int | None:
        """How many tokens the losses compare under a teacher, where they end before tokens that differ."""
        return None if key is None else self.vocabularies[key].shared

    @property
    def written_tokens(self) -> int | None:
        """How many tokens all models share, where responses that are written must end before others; None: all."""
        if not self.are_several:
            return self.vocabulary.shared
        each = self.vocabularies.values()
        return min(words.shared or shared_vocabulary(*words.sizes.values()) for words in each)

    def counts(self) -> str:
        """How many samples each of several teachers has, for people."""
        return ", ".join(f"{key.rpartition('.')[2]} {len(cache.dataset)}" for key, cache in self.caches.items())

    def notes(self) -> Iterator[str]:
        """Lines about tokens that the models don't have in common."""
        for key, vocabulary in (self.vocabularies or {"": self.vocabulary}).items():
            yield from (f"{key}: {note}" if self.are_several else note for note in vocabulary.notes())

    def seconds_saved(self, samples: int) -> float | None:
        """About how many seconds the caches save over so many samples of the run; None without a cache."""
        cached = {key: teacher for key, teacher in self.built.items() if isinstance(teacher, CachedTeacher)}
        total = sum(len(cache.dataset) for cache in self.caches.values())
        each = (teacher.seconds_saved(samples * teacher.samples / total) for teacher in cached.values())
        return sum(each) if cached else None
