"""Checkpoints: whole or not there at all, checked before use. The newest and the best stay."""

import json
import pathlib
import random
import re
import shutil
from collections.abc import Callable

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from .. import distributed, manifest
from ..console import console, styled
from ..errors import ConfigError
from ..files import atomic_folder, entries

STATE, TENSORS, OPTIMIZER = "trainer.json", "trainer.safetensors", "optimizer"


def damage(folder: pathlib.Path) -> str | None:
    """The damage of a checkpoint in words; None where all files are as they were written. Raises PermissionError."""
    return manifest.damage(folder, folder / manifest.NAME)


class Checkpoints:
    """The checkpoints of one run: folders like step-000120 with a model in Hugging Face layout and the train state."""

    def __init__(self, folder: pathlib.Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def folder_of(self, step: int) -> pathlib.Path:
        return self.folder / f"step-{step:06d}"

    def all(self) -> list[pathlib.Path]:
        """All whole checkpoints, oldest first."""
        return sorted(
            (path for path in entries(self.folder) if re.fullmatch(r"step-\d+", path.name)),
            key=lambda path: int(path.name.removeprefix("step-")),
        )

    def newest(self) -> pathlib.Path | None:
        """The newest whole checkpoint. Damaged ones are reported and moved aside, unfinished ones removed.

        Raises ConfigError where all are damaged, and OSError where they can't be read.
        """
        for unfinished in entries(self.folder, "*.tmp"):
            shutil.rmtree(unfinished)
        damaged = {}
        for path in reversed(self.all()):
            if (reason := damage(path)) is None:
                self._set_aside(damaged)
                return path
            damaged[path] = reason
        if damaged:
            path, reason = next(iter(damaged.items()))
            raise ConfigError(f"{path} is damaged ({reason}), and no other is there: move the run aside to start again")
        return None

    def _set_aside(self, damaged: dict[pathlib.Path, str]) -> None:
        for path, reason in damaged.items():
            aside = path.with_name(path.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            rest = f" {path} ({reason}): moved to {aside.name}; an older one is used"
            console.print(styled("damaged", "bold red", rest))

    def save(self, step: int, best_step: int | None, write: Callable[[pathlib.Path], None]) -> None:
        """Lets `write` fill a new checkpoint, then deletes old ones. Raises OSError."""
        with atomic_folder(self.folder_of(step)) as folder:
            write(folder)
            manifest.write(folder, folder / manifest.NAME)
        for old in self.all()[: -self.keep]:
            if best_step is None or old != self.folder_of(best_step):
                # Renamed first, because a folder that is half deleted must not look whole.
                leaving = old.rename(old.with_name(old.name + ".tmp"))
                shutil.rmtree(leaving, ignore_errors=True)


def copy_model(folder: pathlib.Path, target: pathlib.Path, convert: Callable[[pathlib.Path], None]) -> None:
    """Copies the model files of a checkpoint, without the train state, into a new folder, and converts them there."""
    ignored = shutil.ignore_patterns(manifest.NAME, STATE, TENSORS, OPTIMIZER)
    with atomic_folder(target) as temporary:
        shutil.copytree(folder, temporary, ignore=ignored, dirs_exist_ok=True)
        convert(temporary)


def load(folder: pathlib.Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the JSON values of the train state."""
    return load_file(folder / TENSORS), json.loads((folder / STATE).read_text(encoding="utf-8"))


def by_rank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of all ranks, named by rank, for one file. Collective."""
    own = enumerate(distributed.all_gather_object(tensors))
    return {f"{rank}.{name}": tensor for rank, tensors in own for name, tensor in tensors.items()}


def of_rank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's tensors of what `by_rank` returned; none where there were fewer ranks then."""
    own = f"{distributed.rank()}."
    return {name.removeprefix(own): tensor for name, tensor in tensors.items() if name.startswith(own)}


def random_state() -> tuple[dict[str, Tensor], dict]:
    """The states of all random generators: PyTorch's as tensors, Python's and NumPy's as JSON values."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        tensors["cuda"] = torch.cuda.get_rng_state()
    name, keys, *rest = np.random.get_state()
    return tensors, {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}


def set_random_state(tensors: dict[str, Tensor], state: dict) -> None:
    if tensors:
        torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
