"""The identity of a model: hashes of its weights, the deciding part of its configuration, its adapter's folder."""

import contextlib
import hashlib
import json
import pathlib

import torch
from torch import Tensor
from transformers import PretrainedConfig

from .. import distributed
from ..config.models import ModelConfig
from ..errors import ConfigError, reading
from ..files import (
    atomic_write,
    cache_folder,
    check_trusted,
    entries,
    file_digest,
    is_local_path,
    make_cache_folder,
    read_json,
)
from . import quantized
from .dropout import without_rates

ADAPTER_SETTINGS = "adapter_config.json"
# Keys of a configuration that don't change what the model computes.
NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def find_adapter(adapter: str, key: str) -> pathlib.Path:
    """An adapter's folder; one from the Hub is downloaded. Raises ConfigError where there is none."""
    folder = pathlib.Path(adapter)
    if not folder.is_dir():
        if is_local_path(adapter):
            raise ConfigError(f"{key}.adapter: {adapter}: no such adapter folder")
        from huggingface_hub import snapshot_download

        with reading(f"{key}.adapter: {adapter}: no such folder, and no such adapter on the Hub"):
            folder = pathlib.Path(snapshot_download(adapter, allow_patterns="adapter_*"))
    if not (folder / ADAPTER_SETTINGS).exists():
        hint = f"; it holds a whole model: give it as {key}.path" if (folder / "config.json").exists() else ""
        raise ConfigError(
            f"{key}.adapter: {adapter} has no {ADAPTER_SETTINGS}, expected a LoRA adapter as peft saves it{hint}"
        )
    return folder


def hash_weights(
    spec: ModelConfig, hf_config: PretrainedConfig, key: str, folder: pathlib.Path | None = None
) -> dict[str, str]:
    """Identifies a model's weights: by a hash of each file, or by the commit of a model from the Hub.

    The files of its adapter count, too: its settings say how much of it is added. So does the way they are quantized.
    Hashes are remembered in `folder` (default: the cache folder), each with its file's size, times and inode: hashing
    runs at some 1.5 GB/s. Rank 0 does it for all. `key` names the model in a ConfigError.
    """
    adapter = find_adapter(spec.adapter, key) if spec.adapter else None
    quantization = quantized.read(spec, hf_config, key)
    weights, memo = pathlib.Path(spec.path), (folder or cache_folder()) / "weights.json"

    def hash_all() -> dict[str, str]:
        check_trusted(memo.parent, memo)
        if weights.is_dir():
            hashes = _hash_files(entries(weights, "*.safetensors") or entries(weights, "*.bin"), memo)
        else:
            hashes = {spec.path: hf_config._commit_hash}
        files = _hash_files(entries(adapter, "adapter_*"), memo) if adapter else {}
        hashes |= {f"adapter/{name}": digest for name, digest in files.items()}
        return hashes if quantization is None else {**hashes, "quantization": quantization.identity()}

    return distributed.run_on_rank0(hash_all)


def _hash_files(files: list[pathlib.Path], memo: pathlib.Path) -> dict[str, str]:
    try:
        known = read_json(memo)
    except ConfigError:
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
            make_cache_folder(memo.parent)
            atomic_write(memo, json.dumps(known | found, indent=1))
    return hashes


def describe_model(config: PretrainedConfig) -> dict:
    """A model's configuration as JSON values, without the keys that don't change its hidden states."""
    values = json.loads(json.dumps(config.to_dict(), default=str))
    return {name: value for name, value in without_rates(values).items() if name not in NOT_THE_MODEL}


def portable_config(config: PretrainedConfig) -> str:
    """A model's configuration as JSON for another machine: no path, no code, and weights that nothing quantizes."""
    values = json.loads(config.to_json_string())
    left_out = ("_name_or_path", "auto_map", "quantization_config")
    return json.dumps({name: value for name, value in values.items() if name not in left_out}, indent=2)


def tensor_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
