"""Where models run, and in which type."""

from __future__ import annotations

import torch

from .config import ConfigError


def choose_device(wish: str) -> torch.device:
    if wish == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device is cuda, but PyTorch sees no GPU; use auto or cpu")
    return torch.device("cuda" if wish != "cpu" and torch.cuda.is_available() else "cpu")


def choose_dtype(wish: str, device: torch.device) -> torch.dtype:
    if wish == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if wish in ("float32", "float64") and device.type == "cuda":
        raise ConfigError(f"train.dtype is {wish}, but packed attention on a GPU computes in bfloat16")
    return getattr(torch, wish)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
