"""Decides whether the teacher's hidden states are cached, and builds the cache."""

import contextlib
import dataclasses
import functools
import gc
import itertools
import pathlib
import time
from collections.abc import Callable, Iterator

import datasets
import numpy as np
import torch
from torch import Tensor

from .. import distributed
from ..config.schema import Config
from ..console import ProgressBar, console, format_bytes
from ..data.batches import pack, teacher_view
from ..device import free_memory
from ..errors import ConfigError
from ..files import cache_folder, check_path_length, disk_bytes
from ..models.causal_lm import CausalLM
from ..models.identity import describe_model, hash_tensors, hash_weights
from ..models.loading import MetaModel
from ..models.vocabularies import Vocabulary
from . import shards, store
from .folder import StatesFolder
from .origin import Origin, date_note, settings_of
from .shards import FLOAT8, Part, Rows
from .teacher import CachedTeacher, Teacher

LOCK_SECONDS = 0.2  # between two looks at the lock of another builder
OR_OFF = ", or cache.mode=off"  # a way out of messages, for runs
MEMORY_SHARE = 0.25  # share of the free memory that mode auto uses for hidden states


@dataclasses.dataclass(frozen=True)
class Assignment:
    """A teacher, and the samples whose hidden states a run wants of it."""

    key: str  # the teacher's in the configuration
    config: Config  # the run's, with this teacher alone
    teacher: MetaModel
    vocabulary: Vocabulary
    dataset: datasets.Dataset
    indices: np.ndarray | None  # of `dataset` among the run's samples; None: these are all
    where: Callable[[int], str]  # the place of a sample of `dataset` in the user's files
    samples: int  # how many of `dataset` the run will see, counting repetitions; 0: none with its own response
    device: torch.device
    dtype: torch.dtype  # of the computation
    earlier: tuple["TeacherCache", ...] = ()  # those of other teachers, which are built before


def describe_folder(folder: pathlib.Path) -> str:
    """A cache's folder, and what all of it takes."""
    return f"{folder} ({format_bytes(disk_bytes(folder))} on the disk)"


class TeacherCache:
    """Decides how a run gets its teacher's hidden states, and opens or builds the cache."""

    def __init__(self, given: Assignment) -> None:
        """Raises ConfigError for a folder that can't hold the cache, where mode insists on it."""
        config, teacher = given.config, given.teacher
        self._take(given)
        self.spec, self.config = config.teacher, teacher.config
        self.origin = Origin.of(config, teacher.config, teacher.form.logit_map, given.vocabulary)
        self.logit_map = self.origin.logit_map
        self.root = pathlib.Path(config.cache.dir) if config.cache.dir else cache_folder()
        check_path_length("cache.dir", self.root, is_written=True)
        self.max_tokens = config.train.max_tokens
        self.layout = store.Layout(self.dataset)
        self.width = teacher.model.get_output_embeddings().weight.shape[1]
        self.bytes = self.layout.rows * shards.row_bytes(self.width, self.kept)
        head = teacher.model.get_output_embeddings().parameters()
        self.head_bytes = sum(tensor.numel() for tensor in head) * self.dtype.itemsize
        if self.mode == "off" or not self.samples:
            return
        weights = None  # random weights are known only after they are drawn
        if self.spec.path is not None:
            weights = hash_weights(self.spec, teacher.whole, "teacher", self.root)
        self._identify(weights)
        problem = self.file.problem(self._claimed())
        if self.mode == "disk" and problem and not self.file.is_recorded:
            raise ConfigError(f"cache.dir: {problem}; choose another{OR_OFF}")

    def _claimed(self) -> int:
        """The bytes that caches of other teachers will take of the same disk."""
        waiting = [cache.file for cache in self.earlier if cache.mode != "off" and cache.samples]
        return sum(file.missing_bytes for file in waiting if not file.is_recorded)

    def _take(self, given: Assignment) -> None:
        self.earlier = given.earlier
        self.key, self.where = given.key, given.where
        self.mode, self.dataset, self.samples = given.config.cache.mode, given.dataset, given.samples
        self.indices, self.device, self.dtype = given.indices, given.device, given.dtype
        # The type of rows in files and in memory, where this run computes them.
        self.kept = FLOAT8 if given.config.cache.dtype == "float8" else self.dtype

    def _identify(self, weights: dict | str | None) -> None:
        identity = {
            "weights": weights,
            "model": describe_model(self.config),
            "samples": store.hash_samples(self.dataset),
            "dtype": str(self.dtype),
            "device": self.device.type,
        }
        if self.kept == FLOAT8:
            identity["states"] = "float8"
        sizes = self.layout, self.width, self.kept, self.head_bytes
        self.file = store.HiddenStateStore(self.root, identity, self.dataset, *sizes, self.origin)

    @property
    def is_found(self) -> bool:
        """Whether the run finds all hidden states, and needs no teacher for those."""
        return self.mode != "off" and bool(self.samples) and self.file.is_recorded

    @property
    def content(self) -> str | None:
        """What tells this teacher from another one at its place: the fingerprint of its weights, where it is known."""
        is_known = self.mode != "off" and self.samples
        return store.fingerprint(self.file.identity["weights"]) if is_known else None

    def choose(self, memory: int) -> tuple[bool, bool, str]:
        """Whether to use a file, whether to use memory, and why not. memory: free bytes of device memory.

        Raises ConfigError where mode asks for memory that isn't there.
        """
        if self.mode == "off":
            return False, False, "cache.mode is off"
        if not self.samples:
            return False, False, "the run trains on no response of the data"
        found = self.file.is_recorded
        problem = None if found else self.file.problem(self._claimed())
        if self.mode == "auto" and not found and self.samples <= len(self.dataset):
            return False, False, "no sample is seen twice"
        if self.mode == "memory":
            if self.bytes > memory:
                raise ConfigError(
                    f"cache.mode is memory, but the teacher's states are {format_bytes(self.bytes)} and "
                    f"{format_bytes(memory)} are free; use disk or off"
                )
            return problem is None, True, problem or ""
        fits = self.bytes <= MEMORY_SHARE * memory
        if self.mode == "disk" or problem is None:
            # On a CPU, memory holds the pages of a mapped file anyway.
            return True, self.mode == "auto" and fits and self.device.type == "cuda", ""
        if fits:
            return False, True, problem
        return False, False, f"{problem}, and {format_bytes(self.bytes)} are too much for memory"

    def _choose_together(self, reserved: int) -> tuple[bool, bool, str]:
        """What `choose` says about the rank with the least memory: all have to make the same choice."""
        least = -distributed.all_reduce_max(-free_memory(self.device))
        return distributed.run_on_rank0(lambda: self.choose(max(0, least - reserved)))

    def open(
        self,
        load: Callable[[], CausalLM],
        precision: Callable[[], contextlib.AbstractContextManager],
        reserved: int,
    ) -> Teacher | CachedTeacher:
        """The cached teacher, whose missing blocks are computed first, or a live one. Collective.

        Args:
            load: gives the model; called only if something has to be computed (or the weights are random).
            precision: the context that the model runs in.
            reserved: bytes of device memory that the training will need besides what it holds now.

        Raises ConfigError where what the mode asks for can't be had.
        """
        on_disk, in_memory, reason = self._choose_together(reserved)
        if not on_disk and not in_memory:
            return Teacher(load(), f"{'runs in every step' if self.samples else 'never runs'} ({reason})")
        self.load, self.precision, self.build_seconds = functools.cache(load), precision, 0.0
        if self.spec.path is None:
            tensors = self.load().state_dict().items()
            self._identify(hash_tensors({name: distributed.full_tensor(tensor) for name, tensor in tensors}))
        if on_disk:
            try:
                return self._from_file(in_memory)
            except OSError as error:
                reason = f"{self.file.folder}: {error.strerror or error}"
                if self.mode == "disk":
                    raise ConfigError(f"cache.dir: {reason}; choose another{OR_OFF}") from None
                if self.mode == "auto" and not in_memory:
                    return Teacher(self.load(), f"runs in every step ({reason})")
        return self._cached(self._in_memory(), self._head(), f"in memory, not kept ({reason})", self.build_seconds)

    def _in_memory(self) -> Rows:
        """All rows, computed into device memory."""
        values = torch.zeros(self.layout.rows, self.width * self.kept.itemsize, dtype=torch.uint8, device=self.device)
        values = values.view(self.kept)
        scales = torch.zeros(self.layout.rows, 1, device=self.device) if self.kept == FLOAT8 else None
        part = Part(values, scales)
        mine = self._compute(range(len(self.layout.blocks)))

        def keep_next() -> None:
            for number, block, _ in itertools.islice(mine, 1):
                for all_rows, some in zip(part, Part.of(block, self.kept), strict=True):
                    if all_rows is not None:
                        all_rows[self.layout.block(number)] = some

        for _ in range(0, len(self.layout.blocks), distributed.world_size()):
            distributed.run_on_all_ranks(keep_next)
        for tensor in part:
            if tensor is not None:  # a rank has its own rows, and zeros elsewhere; no rank can add float8
                distributed.all_reduce_sum(tensor.view(torch.uint8) if tensor.dtype == FLOAT8 else tensor)
        return Rows([part], self.dtype)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Rank 0 has the lock for all ranks. These meet while they wait: a long wait is no lost connection."""
        is_mine = distributed.run_on_rank0(self.file.lock)
        if not is_mine:
            console.print(f"teacher cache: another process is building {self.file.folder}: waiting for it")
        while not is_mine:
            time.sleep(LOCK_SECONDS)
            is_mine = distributed.run_on_rank0(self.file.lock)
        try:
            yield
        finally:
            if distributed.is_rank0():
                self.file.unlock()

    def _from_file(self, in_memory: bool) -> CachedTeacher:
        with self._locked():
            started = time.perf_counter()
            look = self.file.missing, self.file.has_head, self.file.has_others
            missing, head, others = distributed.run_on_rank0(lambda: [each() for each in look])
            checked = time.perf_counter() - started
            if missing or not head or not others:
                distributed.run_on_rank0(self.file.reserve)
            if missing or not head:
                distributed.run_on_rank0(self.file.write_head, *self._head())
                self._fill(missing)
            distributed.run_on_rank0(self.file.update_origin)
            opened = []

            def read() -> None:
                self.file.read_index()  # what rank 0 has written
                opened.extend((self._rows(self.file.shards, in_memory), store.read_head(self.file.folder)))

            distributed.run_on_all_ranks(read)  # where one can't read, as on another machine, all have to do without
        where = f"{'in memory, kept in' if in_memory else 'mapped from'} {describe_folder(self.file.folder)}"
        if not missing:
            where += f", checked in {checked:.1f} s"
        return self._cached(*opened, where, self.file.seconds)

    def _rows(self, files: shards.Shards, in_memory: bool) -> Rows:
        rows = Rows(files.map(), self.dtype)
        return rows.to(self.device) if in_memory else rows

    def _fill(self, missing: list[int]) -> None:
        """Computes and writes blocks, one a rank at a time: an interruption loses no more. Raises OSError."""
        mine = self._compute(missing)

        def write_next() -> list[tuple[int, int, float]]:
            return [(n, self.file.write(n, rows), seconds) for n, rows, seconds in itertools.islice(mine, 1)]

        for _ in range(0, len(missing), distributed.world_size()):
            written = list(itertools.chain(*distributed.run_on_all_ranks(write_next)))
            distributed.run_on_rank0(self.file.record, written)

    def _cached(self, rows: Rows, head: tuple[Tensor, Tensor | None], where: str, seconds: float) -> CachedTeacher:
        """The cached teacher; the body is freed. seconds: what one pass over the data takes."""
        teacher = self._teacher(rows, head, seconds)
        built = f"built in {self.build_seconds:.1f} s" if self.build_seconds else "found"
        saved = max(0, teacher.seconds_saved(self.samples))
        size = format_bytes(self.bytes) + (" in float8, which rounds them," if self.kept == FLOAT8 else "")
        teacher.note = f"states cached, {size} {where}; {built}, will save about {saved:.1f} s"
        self.load.cache_clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return teacher

    def _teacher(self, rows: Rows, head: tuple[Tensor, Tensor | None], seconds: float) -> CachedTeacher:
        head = tuple(None if tensor is None else tensor.detach().to(self.device) for tensor in head)
        places = self.layout if self.indices is None else self.layout.among(self.indices)
        seconds = seconds, self.build_seconds
        return CachedTeacher(rows, places, len(self.dataset), head, self.logit_map, seconds)

    def _head(self) -> tuple[Tensor, Tensor | None]:
        distributed.unshard_root(self.load())
        return self.load().head.weight, self.load().head.bias

    def _check_finite(self, number: int, rows: Tensor) -> None:
        """Raises ConfigError, which names the first sample, for a block with rows that are not finite."""
        finite = torch.isfinite(rows).all(1)
        if not finite.all():
            first = self.layout.block(number).start + int(finite.int().argmin())
            sample = next(index for index in self.layout.blocks[number] if first < self.layout.sample(index).stop)
            problem = f"{self.origin.teacher} has hidden states that are not finite at {self.where(sample)}"
            reason = f"its weights are damaged, or {shards.dtype_name(self.dtype)} has no room for its numbers"
            raise ConfigError(f"{self.key}: {problem}: {reason}; get it again, or give another train.dtype")

    def _compute(self, numbers: list[int] | range) -> Iterator[tuple[int, Tensor, float]]:
        """Computes this rank's share of the blocks: number, rows [n, H] and seconds of each.

        Raises ConfigError for rows that are not finite.
        """
        teacher = Teacher(self.load())
        if len(numbers):
            count = f"{len(numbers)} of {len(self.layout.blocks)} blocks"
            console.print(f"teacher cache: computing {count}, {format_bytes(self.bytes)} of states in all")
        with ProgressBar("teacher's states, block") as bar:
            for first in bar.track(range(0, len(numbers), distributed.world_size())):
                started = time.perf_counter()
                place = first + distributed.rank()
                number = numbers[min(place, len(numbers) - 1)]
                views = [teacher_view(self.dataset[index]) for index in self.layout.blocks[number]]
                batches = pack(views, self.max_tokens)
                with self.precision():
                    parts = [teacher.linear_head(batch.to(self.device)).hidden for batch in batches]
                    if distributed.is_sharded(teacher.model):  # no rank can compute without the others
                        for _ in range(int(distributed.all_reduce_max(len(batches))) - len(batches)):
                            teacher.linear_head(batches[-1].to(self.device))
                if place >= len(numbers):
                    return
                rows = torch.cat(parts)
                self._check_finite(number, rows)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - started
                self.build_seconds += seconds
                yield number, rows, seconds


class GivenStates(TeacherCache):
    """The states in `teacher.hidden_states`: a folder that was built before, perhaps on another machine."""

    def __init__(self, given: Assignment) -> None:
        """Raises ConfigError for a folder that is damaged, not complete, or lacks a sample."""
        self._take(given)
        self.build_seconds = 0.0
        self.file = StatesFolder(given.config.teacher.hidden_states, f"{given.key}.hidden_states")
        distributed.run_on_each_node(self.file.check)
        self.logit_map, self.bytes = self.file.logit_map, self.file.bytes
        self.head = self.file.head(given.teacher.model.get_output_embeddings().weight.shape, self.dtype)
        settings = settings_of(given.config, given.vocabulary)
        note = date_note(given.config, given.key, given.vocabulary.tokenizer)
        self.layout = self.file.find(self.dataset, given.where, settings, note)
        started = time.perf_counter()
        distributed.run_on_each_node(self.file.verify)
        self.check_seconds = time.perf_counter() - started

    @property
    def content(self) -> str:
        """The fingerprint of the states."""
        return self.file.fingerprint

    def open(
        self,
        load: Callable[[], CausalLM],
        precision: Callable[[], contextlib.AbstractContextManager],
        reserved: int,
    ) -> CachedTeacher:
        """The cached teacher. Nothing is loaded or computed; the arguments are those of `TeacherCache.open`."""
        _, in_memory, _ = self._choose_together(reserved)
        share = len(self.dataset) / self.file.samples  # the run may use a part of what was computed
        teacher = self._teacher(self._rows(self.file.shards, in_memory), self.head, self.file.seconds * share)
        kept = shards.dtype_name(self.file.dtype)
        if self.file.dtype == FLOAT8:
            kept += ", which rounds them"
        elif self.file.dtype != self.dtype:
            kept += f", converted to {shards.dtype_name(self.dtype)}"
        if self.kept == FLOAT8 != self.file.dtype:
            kept += " (cache.dtype=float8 rounds nothing that is given)"
        how = "in memory, from" if in_memory else "mapped from"
        size, checked = format_bytes(self.bytes), f"checked in {self.check_seconds:.1f} s"
        teacher.note = f"states given, {size} in {kept}, {how} {describe_folder(self.file.folder)}, {checked}"
        return teacher
