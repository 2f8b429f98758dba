"""What identifies a model: hashes of its weights and the deciding part of its configuration."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import distributed
from ..config.schema import ModelConfig
from ..files import atomic_write, cache_folder, file_digest
from . import lora

if TYPE_CHECKING:
    from transformers import PretrainedConfig


# Keys of a configuration that don't change what the model computes.
NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def hash_weights(
    spec: ModelConfig, hf_config: PretrainedConfig, key: str, folder: pathlib.Path | None = None
) -> dict[str, str]:
    """Identifies a model's weights: by a hash of each file, or by the commit of a model from the Hub.

    The files of an adapter that is merged into them count, too: its settings say how much of it is added.
    Hashes are remembered in `folder` (default: the cache folder), each with its file's size, times and inode: hashing
    runs at some 1.5 GB/s. Rank 0 does it for all. `key` names the model in a ConfigError.
    """
    adapter = lora.find_adapter(spec.adapter, key) if spec.adapter else None
    return distributed.run_on_rank0(lambda: _hash(spec.path, hf_config, adapter, folder or cache_folder()))


def _hash(path: str, hf_config: PretrainedConfig, adapter: pathlib.Path | None, folder: pathlib.Path) -> dict[str, str]:
    weights = pathlib.Path(path)
    if weights.is_dir():
        hashes = _hash_files(sorted(weights.glob("*.safetensors")) or sorted(weights.glob("*.bin")), folder)
    else:
        hashes = {path: hf_config._commit_hash}
    if adapter is not None:
        files = _hash_files(sorted(adapter.glob("adapter_*")), folder)
        hashes |= {f"adapter/{name}": digest for name, digest in files.items()}
    return hashes


def _hash_files(files: list[pathlib.Path], folder: pathlib.Path) -> dict[str, str]:
    memo = folder / "weights.json"
    try:
        known = json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    hashes, found = {}, {}
    for file in files:
        status = file.stat()
        # The inode's change time is in it because `cp -p` restores the other times, but not this one.
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        match known.get(str(file.resolve())):
            case [*then, str(digest)] if then == stamp:
                hashes[file.name] = digest
            case _:
                hashes[file.name] = file_digest(file)
                found[str(file.resolve())] = [*stamp, hashes[file.name]]
    if found:
        with contextlib.suppress(OSError):  # a read-only folder: they are hashed again next time
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(memo, json.dumps(known | found, indent=1))
    return hashes


def describe_model(config: PretrainedConfig, dropout: tuple[str, ...]) -> dict:
    """A model's configuration as JSON values, without the keys that don't change its hidden states."""
    values = json.loads(json.dumps(config.to_dict(), default=str))
    return {name: value for name, value in values.items() if name not in (*NOT_THE_MODEL, *dropout)}


def tensor_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
