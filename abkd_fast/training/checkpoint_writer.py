"""Writes checkpoints of model and optimizer: a thread writes copies while training goes on.

Where each process holds a part of every weight, it writes that part, through torch.distributed.checkpoint.
"""

from __future__ import annotations

import collections
import functools
import json
import math
import pathlib
import shutil
import types
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from transformers import PreTrainedTokenizerBase

from .. import distributed, processes
from ..errors import library_errors
from ..files import atomic_folder
from ..models.causal_lm import CausalLM
from .checkpoint import OPTIMIZER, STATE, TENSORS, Checkpoints

# Intended: every process reads on its own.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)

MODEL = "model"
FILE_BYTES = 1 << 30  # limit of one file of a process's parts; a file is assembled in memory
AT_ONCE = StagingOptions(
    use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
)

Tensors = dict[str, Tensor]


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time, and its result. All methods are collective.

    As a context manager it waits, on exit, for the checkpoint that is being written.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        model: CausalLM,
        optimizer: torch.optim.Optimizer,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.checkpoints, self.model, self.optimizer, self.tokenizer = checkpoints, model, optimizer, tokenizer
        self.group = processes.background_group() if distributed.is_sharded(model) else None
        device = next(model.parameters()).device
        choose = functools.partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1, "checkpoint", choose)
        self.writing: Future | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *error: types.TracebackType | None) -> None:
        self.thread.shutdown()

    def begin(self, step: int, best_step: int | None, tensors: Tensors, state: dict, first: Callable[[], None]) -> None:
        """Begins a checkpoint of model and optimizer as they are now. Raises OSError.

        best_step: the step whose checkpoint stays. tensors, state: rank 0's train state, the latter as JSON values.
        first: is called by rank 0 before the checkpoint is written.
        """
        copies, text = {}, json.dumps(state) + "\n"
        if self.group or distributed.is_rank0():
            values = {MODEL: self.model.weights(), OPTIMIZER: optimizer_tensors(self.optimizer, self.model)}
            copies = _copied({**values, TENSORS: tensors})

        def write(write_model: Callable[[pathlib.Path], None], folder: pathlib.Path) -> None:
            write_model(folder)
            save_file(copies[TENSORS], folder / TENSORS)
            (folder / STATE).write_text(text, encoding="utf-8")

        def save(write_model: Callable[[pathlib.Path], None]) -> None:
            first()
            self.checkpoints.save(step, best_step, functools.partial(write, write_model))

        parts = self._empty_parts(self.checkpoints.folder_of(step))
        self.writing = self.thread.submit(self._write, parts, copies, save)

    def conclude(self) -> None:
        """Waits for the checkpoint that is being written. Raises OSError."""
        writing, self.writing = self.writing, None
        distributed.run_on_all_ranks(writing.result)

    def save_model(self, folder: pathlib.Path, convert: Callable[[pathlib.Path], None] | None = None) -> None:
        """Writes the model and its tokenizer into a new folder, and converts it there. Raises OSError."""

        def save(write_model: Callable[[pathlib.Path], None]) -> None:
            with atomic_folder(folder) as temporary:
                write_model(temporary)
                if convert:
                    convert(temporary)

        parts = self._empty_parts(folder)
        distributed.run_on_all_ranks(lambda: self._write(parts, {MODEL: self.model.weights()}, save))

    def _empty_parts(self, target: pathlib.Path) -> pathlib.Path:
        """An empty folder for the parts that ranks write before they are joined in `target`."""
        parts = target.with_name(target.name + ".parts.tmp")
        if self.group:
            distributed.run_on_rank0(lambda: shutil.rmtree(parts) if parts.exists() else None)
        return parts

    def _write(
        self, parts: pathlib.Path, tensors: dict[str, Tensors], save: Callable[[Callable[[pathlib.Path], None]], None]
    ) -> None:
        """Writes this rank's parts. Rank 0 then calls `save` with a function that fills a folder."""
        try:
            if self.group:
                self._write_parts(parts, tensors)
            if distributed.is_rank0():
                save(functools.partial(self._write_joined if self.group else self._write_whole, parts, tensors))
        finally:
            if distributed.is_rank0():
                shutil.rmtree(parts, ignore_errors=True)

    def _write_parts(self, parts: pathlib.Path, tensors: dict[str, Tensors]) -> None:
        """Writes the parts of every rank. The model's are joined from file to file."""
        for kind in (MODEL, OPTIMIZER):
            if kind in tensors:
                writer = HuggingFaceStorageWriter(
                    str(parts / kind), _files(tensors[kind]), save_distributed=True, enable_consolidation=kind == MODEL
                )
                try:
                    dcp.save(tensors[kind], storage_writer=writer, process_group=self.group)
                except CheckpointException as error:
                    reason, _ = next(iter(error.failures.values()))
                    with library_errors():
                        raise reason from error

    def _write_joined(self, parts: pathlib.Path, tensors: dict[str, Tensors], folder: pathlib.Path) -> None:
        """Fills a folder from the ranks' files. transformers writes the model again, for the names in its layout."""
        _check_parts(parts / MODEL / "sharded", tensors[MODEL])
        weights = {}
        for file in (parts / MODEL).glob("*.safetensors"):
            weights |= load_file(file)  # mapped, not read
        dtype = next(iter(weights.values())).dtype
        self.model.save(folder, self.tokenizer, weights)
        settings = folder / "config.json"
        if settings.exists():  # its type may be wrong: FSDP2 replaces weights while it computes
            values = json.loads(settings.read_text(encoding="utf-8"))
            values["dtype"] = str(dtype).removeprefix("torch.")
            settings.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if OPTIMIZER in tensors:
            _check_parts(parts / OPTIMIZER, tensors[OPTIMIZER])
            (parts / OPTIMIZER).rename(folder / OPTIMIZER)

    def _write_whole(self, _: pathlib.Path, tensors: dict[str, Tensors], folder: pathlib.Path) -> None:
        """Fills a folder from the tensors of this process, which has all."""
        self.model.save(folder, self.tokenizer, tensors[MODEL])
        if OPTIMIZER in tensors:
            (folder / OPTIMIZER).mkdir()
            save_file(_separated(tensors[OPTIMIZER]), folder / OPTIMIZER / "optimizer.safetensors")


def _copied(tensors: dict[str, Tensors]) -> dict[str, Tensors]:
    """Copies in CPU memory."""
    stager = DefaultStager(AT_ONCE)
    try:
        return stager.stage(tensors)
    finally:
        stager.close()  # else it keeps the copies as long as the originals live


def _separated(tensors: Tensors) -> Tensors:
    """The tensors, each with memory of its own, as safetensors wants them. Optimizers may share constants."""
    separated, known = {}, set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        separated[name] = tensor.clone() if place in known else tensor.contiguous()
        known.add(place)
    return separated


def _files(tensors: Tensors) -> dict[str, int]:
    """The number of the file, from 1, into which a rank puts its part of each tensor."""
    files, total = {}, 0
    for name, tensor in tensors.items():
        files[name] = 1 + total // (FILE_BYTES * distributed.world_size())
        total += tensor.nbytes
    return files


def _check_parts(folder: pathlib.Path, tensors: Tensors) -> None:
    """Raises OSError where parts are missing. torch.distributed.checkpoint would put zeros there."""
    found = collections.Counter()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as parts:
            found.update({name: math.prod(parts.get_slice(name).get_shape()) for name in parts.keys()})  # noqa: SIM118
    for name, tensor in tensors.items():
        if found[name] != tensor.numel():
            raise OSError(f"{folder}: parts of {name} are missing: all processes have to see the same folders")


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> Tensors:
    """The optimizer's state, or this rank's parts of it, by parameter: "exp_avg.model.embed.weight"."""
    return {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def optimizer_numbers(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict]:
    """What else the state has for each parameter: {"model.embed.weight": {"step": 3}}."""
    numbers = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        if own := {key: value for key, value in state.items() if not isinstance(value, Tensor)}:
            numbers[name] = own
    return numbers


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, folder: pathlib.Path) -> None:
    """Loads this rank's part of the optimizer's state from a checkpoint that any number of processes wrote.

    Every tensor gets memory of its own, because a mapped file's alignment could change the last bit of a sum.
    """
    reader = HuggingFaceStorageReader(str(folder / OPTIMIZER))
    parameters = dict(model.named_parameters())
    for full_name, kept in reader.read_metadata().state_dict_metadata.items():
        key, _, name = full_name.partition(".")
        parameter = parameters[name]
        like = parameter.detach() if kept.size == parameter.shape else torch.empty(kept.size, device=parameter.device)
        optimizer.state[parameter][key] = torch.empty_like(like, dtype=kept.properties.dtype)
    dcp.load(optimizer_tensors(optimizer, model), storage_reader=reader, no_dist=True)
