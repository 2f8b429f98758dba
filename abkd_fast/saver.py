"""Writes model and optimizer: checkpoints in a thread, of copies, while training goes on.

Where each process holds a part of every weight, it writes that part alone, by torch.distributed.checkpoint.
"""

from __future__ import annotations

import functools
import json
import pathlib
import shutil
import types
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from transformers import PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_NAME

from . import lora, parallel
from .checkpoint import OPTIMIZER, STATE, TENSORS, Checkpoints, atomic_folder
from .models import PackedCausalLM

# Meant: every process reads for itself alone.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)

MODEL = "model"
AT_ONCE = StagingOptions(
    use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
)


class Saver:
    """Writes a run's checkpoints, one at a time, and its result. All ranks have to call its methods together.

    Left, it waits for the checkpoint that is being written.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        model: PackedCausalLM,
        optimizer: torch.optim.Optimizer,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.checkpoints, self.model, self.optimizer, self.tokenizer = checkpoints, model, optimizer, tokenizer
        self.group = parallel.background_group() if parallel.is_sharded(model) else None
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *error: types.TracebackType | None) -> None:
        self.thread.shutdown()

    def begin(
        self, step: int, best_step: int | None, tensors: dict[str, Tensor], state: dict, first: Callable[[], None]
    ) -> None:
        """Begins a checkpoint of model and optimizer as they are now.

        Args:
            best_step: whose checkpoint stays.
            tensors, state: the trainer's own, the latter for JSON; of the main process.
            first: what the main process does before.
        """
        copies, text = {}, json.dumps(state) + "\n"
        if self.group or parallel.is_main():
            copies = {MODEL: self._weights(), OPTIMIZER: optimizer_tensors(self.optimizer, self.model)}
            copies = DefaultStager(AT_ONCE).stage({**copies, TENSORS: tensors})

        def write(write_model: Callable[[pathlib.Path], None], folder: pathlib.Path) -> None:
            write_model(folder)
            save_file(copies[TENSORS], folder / TENSORS)
            (folder / STATE).write_text(text, encoding="utf-8")

        def save(write_model: Callable[[pathlib.Path], None]) -> None:
            first()
            self.checkpoints.save(step, best_step, functools.partial(write, write_model))

        target = self.checkpoints.folder_of(step)
        self.writing = self.thread.submit(self._write, target, copies, save)

    def conclude(self) -> None:
        """Waits for the checkpoint that is being written. Raises one of WRITE_ERRORS."""
        writing, self.writing = self.writing, None
        parallel.everywhere(writing.result)

    def save_model(self, folder: pathlib.Path) -> None:
        """Writes the model, with its tokenizer, into a new folder. Raises one of WRITE_ERRORS."""

        def save(write_model: Callable[[pathlib.Path], None]) -> None:
            with atomic_folder(folder) as temporary:
                write_model(temporary)

        parallel.everywhere(lambda: self._write(folder, {MODEL: self._weights()}, save))

    def _weights(self) -> dict[str, Tensor]:
        weights = self.model.weights()
        return self.model.in_files(weights) if self.group else weights

    def _write(
        self,
        target: pathlib.Path,
        tensors: dict[str, dict[str, Tensor]],
        save: Callable[[Callable[[pathlib.Path], None]], None],
    ) -> None:
        """Has the main process `save` into the target, with what writes model and optimizer into a folder."""
        parts = target.with_name(target.name + ".parts.tmp")
        try:
            if self.group:
                self._write_parts(tensors[MODEL], parts / MODEL, joined=True)
                if OPTIMIZER in tensors:
                    self._write_parts(tensors[OPTIMIZER], parts / OPTIMIZER, joined=False)
            if parallel.is_main():
                save(functools.partial(self._write_joined if self.group else self._write_whole, tensors, parts))
        finally:
            if parallel.is_main():
                shutil.rmtree(parts, ignore_errors=True)

    def _write_parts(self, tensors: dict[str, Tensor], folder: pathlib.Path, joined: bool) -> None:
        """Every rank's parts, which the main process joins, from file to file, if they are to be."""
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True, enable_consolidation=joined)
        try:
            dcp.save(tensors, storage_writer=writer, process_group=self.group)
        except CheckpointException as error:
            reason, _ = next(iter(error.failures.values()))
            raise reason from error

    def _write_joined(self, tensors: dict[str, dict[str, Tensor]], parts: pathlib.Path, folder: pathlib.Path) -> None:
        self.model.save(folder, self.tokenizer, {})
        (weights,) = (parts / MODEL).glob("*.safetensors")
        weights.replace(folder / (lora.WEIGHTS if self.model.has_adapter else SAFE_WEIGHTS_NAME))
        if OPTIMIZER in tensors:
            (parts / OPTIMIZER).rename(folder / OPTIMIZER)

    def _write_whole(self, tensors: dict[str, dict[str, Tensor]], parts: pathlib.Path, folder: pathlib.Path) -> None:
        self.model.save(folder, self.tokenizer, tensors[MODEL])
        if OPTIMIZER in tensors:
            (folder / OPTIMIZER).mkdir()
            save_file(tensors[OPTIMIZER], folder / OPTIMIZER / "optimizer.safetensors")


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state, or this rank's parts of it, by the parameters' names: "exp_avg.model.embed.weight"."""
    return {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, folder: pathlib.Path) -> None:
    """The inverse, from a checkpoint's files, however many processes wrote it, and this one's parts alone.

    Every tensor gets memory of its own: a mapped file's alignment could change a sum's last bit.
    """
    reader = HuggingFaceStorageReader(str(folder / OPTIMIZER))
    parameters = dict(model.named_parameters())
    for full_name, kept in reader.read_metadata().state_dict_metadata.items():
        key, _, name = full_name.partition(".")
        parameter = parameters[name]
        like = parameter.detach() if kept.size == parameter.shape else torch.empty(kept.size, device=parameter.device)
        optimizer.state[parameter][key] = torch.empty_like(like, dtype=kept.properties.dtype)
    dcp.load(optimizer_tensors(optimizer, model), storage_reader=reader, no_dist=True)
