"""Decides whether the teacher's hidden states are cached, and builds the cache."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import pathlib
import time
from collections.abc import Callable, Iterator

import datasets
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from .. import distributed
from ..config.schema import Config
from ..console import console, format_bytes
from ..data.batches import pack
from ..device import free_memory
from ..errors import ConfigError
from ..files import cache_folder
from ..models.identity import describe_model, hash_tensors, hash_weights
from ..models.loading import DROPOUT, MetaModel
from ..models.packed import PackedCausalLM
from . import store
from .teacher import CachedTeacher, Teacher

MEMORY_SHARE = 0.25  # share of the free memory that mode auto uses for hidden states


class TeacherCache:
    """Decides how a run gets its teacher's hidden states, and opens or builds the cache."""

    def __init__(
        self,
        config: Config,
        teacher: MetaModel,
        dataset: datasets.Dataset,
        samples: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """samples: how many samples of `dataset` the run will see, counting repetitions.

        Raises ConfigError for a folder that can't hold the cache, where mode insists on it.
        """
        self.mode, self.spec, self.config = config.cache.mode, config.teacher, teacher.config
        self.root = pathlib.Path(config.cache.dir) if config.cache.dir else cache_folder()
        self.dataset, self.samples, self.device, self.dtype = dataset, samples, device, dtype
        self.max_tokens = config.train.max_tokens
        self.layout = store.Layout(dataset)
        self.width = teacher.model.get_output_embeddings().weight.shape[1]
        self.bytes = self.layout.rows * self.width * dtype.itemsize
        if self.mode == "off":
            return
        weights = None  # random weights are known only after they are drawn
        if self.spec.path is not None:
            weights = hash_weights(self.spec, teacher.config, "teacher", self.root)
        self._identify(weights)
        problem = self.file.problem()
        if self.mode == "disk" and problem and not self.file.is_recorded:
            raise ConfigError(f"cache.dir: {problem}; choose another, or cache.mode=off")

    def _identify(self, weights: dict | str | None) -> None:
        identity = {
            "weights": weights,
            "model": describe_model(self.config, DROPOUT),
            "samples": store.hash_samples(self.dataset),
            "dtype": str(self.dtype),
            "device": self.device.type,
        }
        self.file = store.HiddenStateStore(self.root, identity, self.layout, self.width, self.dtype)

    @property
    def passes(self) -> float:
        return self.samples / len(self.dataset)

    def choose(self, memory: int) -> tuple[bool, bool, str]:
        """Whether to use a file, whether to use memory, and why not. memory: free bytes of device memory.

        Raises ConfigError where mode asks for memory that isn't there.
        """
        if self.mode == "off":
            return False, False, "cache.mode is off"
        found = self.file.is_recorded
        problem = None if found else self.file.problem()
        if self.mode == "auto" and not found and self.passes <= 1:
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

    def open(
        self,
        load: Callable[[], PackedCausalLM],
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
        least = -distributed.all_reduce_max(-free_memory(self.device))  # all ranks have to make the same choice
        choose = functools.partial(self.choose, max(0, least - reserved))
        on_disk, in_memory, reason = distributed.run_on_rank0(choose)
        if not on_disk and not in_memory:
            return Teacher(load(), f"runs in every step ({reason})")
        model = None
        if self.spec.path is None:
            model = load()
            weights = {name: distributed.full_tensor(tensor) for name, tensor in model.state_dict().items()}
            self._identify(hash_tensors(weights))
        builder = _Builder(self, load, model, precision)
        if on_disk:
            try:
                return self._from_file(builder, in_memory)
            except OSError as error:
                reason = f"{self.file.folder}: {error.strerror or error}"
                if self.mode == "disk":
                    raise ConfigError(f"cache.dir: {reason}; choose another, or cache.mode=off") from None
                if self.mode == "auto" and not in_memory:
                    return Teacher(builder.model(), f"runs in every step ({reason})")
        rows = torch.zeros(self.layout.rows, self.width, dtype=self.dtype, device=self.device)
        for number, block, _ in builder.blocks(range(len(self.layout.blocks))):
            rows[self.layout.block(number)] = block
        distributed.all_reduce_sum(rows)  # a rank has its own rows, and zeros elsewhere
        where = f"in memory, not kept ({reason})"
        return self._cached(builder, rows, builder.head(), where, builder.seconds)

    def _from_file(self, builder: _Builder, in_memory: bool) -> CachedTeacher:
        with distributed.rank0_context(self.file.locked()):
            started = time.perf_counter()
            missing, is_whole = distributed.run_on_rank0(
                lambda: (self.file.missing(), self.file.read_head() is not None)
            )
            checked = time.perf_counter() - started
            if missing or not is_whole:
                distributed.run_on_rank0(self.file.reserve)
                distributed.run_on_rank0(functools.partial(self.file.write_head, *builder.head()))
                self._fill(builder, missing)
            self.file.read_index()  # what rank 0 has written
            head = self.file.read_head()
        rows = self.file.read()
        where = f"mapped from {self.file.folder}"
        if in_memory:
            rows, where = rows.to(self.device, copy=True), f"in memory, kept in {self.file.folder}"
        if not missing:
            where += f", checked in {checked:.1f} s"
        return self._cached(builder, rows, head, where, self.file.seconds)

    def _fill(self, builder: _Builder, missing: list[int]) -> None:
        """Computes and writes blocks, one a rank at a time: an interruption loses no more. Raises OSError."""
        mine = builder.blocks(missing)

        def write_next() -> list[tuple[int, int, float]]:
            return [
                (number, self.file.write(number, rows), seconds) for number, rows, seconds in itertools.islice(mine, 1)
            ]

        for _ in range(0, len(missing), distributed.world_size()):
            written = list(itertools.chain(*distributed.run_on_all_ranks(write_next)))
            distributed.run_on_rank0(functools.partial(self.file.record, written))

    def _cached(
        self, builder: _Builder, rows: Tensor, head: tuple[Tensor, Tensor | None], where: str, seconds: float
    ) -> CachedTeacher:
        """The cached teacher; the body is freed. seconds: what one pass over the data takes."""
        head = tuple(None if tensor is None else tensor.detach().to(self.device) for tensor in head)
        teacher = CachedTeacher(rows, self.layout, head, (seconds, builder.seconds))
        built = f"built in {builder.seconds:.1f} s" if builder.seconds else "found"
        saved = max(0, teacher.seconds_saved(self.samples))
        teacher.note = f"states cached, {format_bytes(self.bytes)} {where}; {built}, will save about {saved:.1f} s"
        builder.free()
        return teacher


class _Builder:
    """Computes blocks of hidden states. It loads the model when it first needs it."""

    def __init__(
        self,
        owner: TeacherCache,
        load: Callable[[], PackedCausalLM],
        model: PackedCausalLM | None,
        precision: Callable[[], contextlib.AbstractContextManager],
    ) -> None:
        self.owner, self.load, self.loaded, self.precision = owner, load, model, precision
        self.seconds = 0.0

    def model(self) -> PackedCausalLM:
        if self.loaded is None:
            self.loaded = self.load()
        return self.loaded

    def head(self) -> tuple[Tensor, Tensor | None]:
        distributed.unshard_root(self.model())
        return self.model().head.weight, self.model().head.bias

    def blocks(self, numbers: list[int] | range) -> Iterator[tuple[int, Tensor, float]]:
        """This rank's share of the blocks: number, rows [n, H] and seconds of each."""
        owner, teacher = self.owner, Teacher(self.model())
        if len(numbers):
            total = len(owner.layout.blocks)
            console.print(
                f"teacher cache: computing {len(numbers)} of {total} blocks, {format_bytes(owner.bytes)} in all"
            )
        columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True), TextColumn("teacher's states")
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            for first in bar.track(range(0, len(numbers), distributed.world_size())):
                started = time.perf_counter()
                place = first + distributed.rank()
                number = numbers[min(place, len(numbers) - 1)]
                samples = [owner.dataset[index] for index in owner.layout.blocks[number]]
                batches = pack(samples, owner.max_tokens)
                with self.precision():
                    parts = [teacher.linear_head(batch.to(owner.device)).hidden for batch in batches]
                    if distributed.is_sharded(teacher.model):  # no rank can compute without the others
                        for _ in range(int(distributed.all_reduce_max(len(batches))) - len(batches)):
                            teacher.linear_head(batches[-1].to(owner.device))
                if place >= len(numbers):
                    return
                rows = torch.cat(parts)
                if owner.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - started
                self.seconds += seconds
                yield number, rows, seconds

    def free(self) -> None:
        self.loaded = None
        gc.collect()
        if self.owner.device.type == "cuda":
            torch.cuda.empty_cache()
