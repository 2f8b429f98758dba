"""The type of the weights in final/: `run.save_dtype`. Checkpoints keep that of training, so runs resume exactly."""

import json
import pathlib
import re

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from .. import distributed
from ..config.schema import Config
from ..console import console
from ..errors import ConfigError
from ..files import read_json
from ..models import loading
from ..models.causal_lm import CausalLM

INDEX = "model.safetensors.index.json"


def choose(config: Config, given: PreTrainedModel | None) -> torch.dtype | None:
    """The type that final/ gets; None: that of training. Raises ConfigError where `auto` finds none.

    given: the student, if it is a model in memory, as it was given.
    """
    wish = config.run.save_dtype
    if wish != "auto":
        return wish and getattr(torch, wish)
    if given is not None:
        return given.dtype
    path = _first_base(config.student.path)
    return torch.float32 if path is None else loading.published_dtype(path, "run.save_dtype is auto")


def _first_base(path: str | None) -> str | None:
    """The model that a run's result began with, also by way of other results. Any other path is returned itself."""
    while path is not None and pathlib.Path(path).name == "final":
        settings = pathlib.Path(path).with_name("config.json")
        try:
            path = read_json(settings, shape={"student": {"path": (str, None)}})["student"]["path"]
        except ConfigError:  # it is no run's
            break
    return path


class Conversion:
    """Makes the weights of a folder have a type."""

    def __init__(self, dtype: torch.dtype | None, student: CausalLM) -> None:
        """dtype: None changes nothing. Modules that transformers always reads in float32 keep it."""
        self.dtype, self.student = dtype, student
        model = student.saved_model.get_base_model() if student.has_adapter else student.saved_model
        kept = {*(model._keep_in_fp32_modules_strict or ())} if dtype in (torch.float16, torch.bfloat16) else set()
        kept |= {*(model._keep_in_fp32_modules or ())} if dtype == torch.float16 else set()
        names = "|".join(re.escape(name).replace(r"\*", ".*") for name in sorted(kept))
        self.kept = re.compile(names) if names else None

    def is_refused(self) -> bool:
        """Whether a trained weight has a number that the type can't hold. Collective."""
        trained = [(name, p.detach()) for name, p in self.student.named_parameters() if p.requires_grad]
        count = sum(self._overflows(name, distributed.local_part(tensor)) for name, tensor in trained)
        return distributed.all_reduce_count(count) > 0

    def apply(self, folder: pathlib.Path) -> None:
        """Converts the weights of a folder in Hugging Face layout, file by file, and says so in its config.json.

        Raises ConfigError for a number that the type can't hold.
        """
        if self.dtype is None:
            return
        name, before, size = str(self.dtype).removeprefix("torch."), set(), 0
        for file in sorted(folder.glob("*.safetensors")):
            types, bytes_ = self._convert(file)
            before, size = before | types, size + bytes_
        for settings in filter(pathlib.Path.exists, (folder / "config.json", folder / INDEX)):
            values = json.loads(settings.read_text(encoding="utf-8"))
            if settings.name == INDEX:
                values["metadata"]["total_size"] = size
            else:
                values["dtype"] = name
                parts = [part for part in values.values() if isinstance(part, dict) and "dtype" in part]
                for part in parts:  # of a multimodal model
                    part["dtype"] = name
            settings.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if before:
            console.print(f"final/ has its weights in {name}, converted from {', '.join(sorted(before))}")

    def _convert(self, file: pathlib.Path) -> tuple[set[str], int]:
        """Converts a file. Returns the types that its tensors had, of those that it changes, and all bytes."""
        tensors, before = {}, set()
        with safe_open(file, "pt") as source:
            metadata = source.metadata()
            for name in source.keys():  # noqa: SIM118 - it is no dict
                tensors[name] = tensor = source.get_tensor(name)
                if self._overflows(name, tensor):
                    raise ConfigError(self._refusal(name, tensor))
                if self._changes(name, tensor):
                    before.add(str(tensor.dtype).removeprefix("torch."))
                    tensors[name] = tensor.to(self.dtype)
        if before:
            temporary = file.with_name(file.name + ".tmp")
            save_file(tensors, temporary, metadata)
            temporary.replace(file)
        return before, sum(tensor.nbytes for tensor in tensors.values())

    def _changes(self, name: str, tensor: Tensor) -> bool:
        is_kept = self.kept is not None and self.kept.search(name)
        return self.dtype not in (None, tensor.dtype) and tensor.is_floating_point() and not is_kept

    def _overflows(self, name: str, tensor: Tensor) -> bool:
        is_changed = self._changes(name, tensor)
        return is_changed and not torch.equal(tensor.to(self.dtype).isfinite(), tensor.isfinite())

    def _refusal(self, name: str, tensor: Tensor) -> str:
        largest = tensor[tensor.isfinite()].abs().max().item()
        problem = f"{name} has {largest:g}, and the type ends at {torch.finfo(self.dtype).max:g}"
        python = ' (in Python resume=True, run={"save_dtype": "float32"})'
        return f"run.save_dtype: {problem}; continue with --resume --set run.save_dtype=float32, or bfloat16{python}"
