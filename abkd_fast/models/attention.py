"""Padding-free causal attention over sequences packed end to end: one function, registered with transformers."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

NAME = "abkd_packed"
calls = 0  # how often the function ran; the start-up check expects one call a layer


def backend(device: torch.device) -> str:
    """The attention that runs on this device: "flash-attn", "varlen_attn" (PyTorch's) or "sdpa loop" (CPUs)."""
    if device.type != "cuda":
        return "sdpa loop"
    return "flash-attn" if importlib.util.find_spec("flash_attn") else "varlen_attn"


def supports_dropout(device: torch.device) -> bool:
    """Whether attention has dropout here; PyTorch's variable-length attention has none."""
    return backend(device) != "varlen_attn"


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, T, dim]
    key: Tensor,  # [1, key heads, T, dim]
    value: Tensor,  # [1, key heads, T, dim]
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a packed row: [1, T, heads, dim], and no weights.

    Raises RuntimeError for what packing can't express: soft-capping, attention sinks, a model that loses the
    sequence boundaries (cu_seq_lens_q) on the way.
    """
    global calls
    if not torch.compiler.is_compiling():  # a compiled counter would be compiled again at every value
        calls += 1
    if softcap is not None or s_aux is not None:
        raise RuntimeError(f"{'soft-capping' if s_aux is None else 'sinks'} in its attention, which packing lacks")
    if cu_seq_lens_q is None:
        raise RuntimeError("its layers lose the sequence boundaries on the way to attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = -1 if sliding_window is None else sliding_window - 1  # transformers counts the current token
    if query.device.type == "cuda":
        # Under autocast rotary embeddings leave queries and keys in float32, but the kernels need 16 bits.
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
        q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # [T, heads, dim]
        return _variable_length()(q, k, v, cu_seq_lens_q, max_length_q, scale, window, dropout)[None], None
    outputs = []
    boundaries = cu_seq_lens_q.tolist()
    for start, end in itertools.pairwise(boundaries):
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        outputs.append(_one_sequence(q, k, v, scale, window, dropout))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _one_sequence(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, dropout: float) -> Tensor:
    length = q.shape[2]
    mask = None
    if 0 <= window < length - 1:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(-window)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


@functools.cache
def _variable_length() -> Callable[..., Tensor]:
    """The GPU kernel, as f(q, k, v, cu_seqlens, max_seqlen, scale, window, dropout) on [T, heads, dim]."""
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_varlen_func

        def flash(
            q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, window: int, dropout: float
        ) -> Tensor:
            return flash_attn_varlen_func(
                q, k, v, cu, cu, longest, longest, dropout, scale, causal=True, window_size=(window, 0)
            )

        return flash

    from torch.nn.attention.varlen import varlen_attn

    if not {"scale", "window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():
        raise RuntimeError(f"flash-attn is missing, and torch {torch.__version__} is too old to do without it")

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, window: int, dropout: float
    ) -> Tensor:
        if dropout:
            raise RuntimeError("attention dropout, which needs flash-attn on a GPU")
        grouped = q.shape[1] != k.shape[1]
        kernel = functools.partial(varlen_attn, scale=scale, window_size=(window, 0), enable_gqa=grouped)
        return _in_multiples_of_8(kernel, q, k, v, cu, cu, longest, longest)

    return varlen


def _in_multiples_of_8(kernel: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    """Pads heads to a size that the kernel supports. The kernel's scale must not depend on that size.

    Zeros change no product (OpenLLaMA-3B has 100).
    """
    dim = q.shape[-1]
    if dim % 8:
        q, k, v = (F.pad(x, (0, -dim % 8)) for x in (q, k, v))
    return kernel(q, k, v, *arguments)[..., :dim]


AttentionInterface.register(NAME, packed_attention)
