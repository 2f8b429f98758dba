"""Padding-free causal attention over sequences packed end to end: one function, registered with transformers."""

import contextlib
import importlib.util
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from ..errors import first_line

NAME = "abkd_packed"
used: set[str] = set()  # what the function was asked for beside windows; `forms.choose` reads it
_given: dict[str, Any] = {}  # the options of models that lose them between their forward pass and attention


class Kernel(NamedTuple):
    """The attention of a GPU."""

    name: str  # "flash-attn", or "varlen_attn", which is PyTorch's
    attend: Callable[..., Tensor]  # f(q, k, v, cu_seqlens, max_seqlen, scale, window, dropout) on [T, heads, dim]
    has_windows: bool = True
    note: str = ""  # why it is not flash-attn, where that is installed


_kernel: Kernel | None = None


def gpu_kernel() -> Kernel:
    """The attention that a GPU runs here: flash-attn if it can be imported, else PyTorch's."""
    # Not functools.cache: compiled layers call this, and Dynamo warns of every cached function.
    global _kernel
    if _kernel is None:
        _kernel = _find_kernel()
    return _kernel


def backend(device: torch.device) -> str:
    """The attention that runs on this device: "flash-attn", "varlen_attn" (PyTorch's) or "sdpa loop" (CPUs)."""
    return gpu_kernel().name if device.type == "cuda" else "sdpa loop"


def describe(device: torch.device) -> str:
    """The backend, and why it is not flash-attn where that is installed but doesn't work."""
    note = gpu_kernel().note if device.type == "cuda" else ""
    return f"{backend(device)} ({note})" if note else backend(device)


def supports_dropout(device: torch.device) -> bool:
    """Whether attention has dropout here; PyTorch's variable-length attention has none."""
    return backend(device) != "varlen_attn"


def supports_windows(device: torch.device) -> bool:
    """Whether attention can be limited to the last tokens here; torch 2.10's variable-length attention cannot."""
    return device.type != "cuda" or gpu_kernel().has_windows


def missing(device: torch.device, needs: frozenset[str]) -> str | None:
    """What a model's attention needs and has not on this device, in words; None if nothing."""
    return None


@contextlib.contextmanager
def given(options: dict[str, Any]) -> Iterator[None]:
    """A context in which `options` reach attention also from models that lose keyword arguments on the way."""
    global _given
    before, _given = _given, options
    try:
        yield
    finally:
        _given = before


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
    if softcap is not None or s_aux is not None:
        raise RuntimeError(f"{'soft-capping' if s_aux is None else 'sinks'} in its attention, which packing lacks")
    if dropout:
        used.add("dropout")
    if cu_seq_lens_q is None:
        cu_seq_lens_q, max_length_q = _given["cu_seq_lens_q"], _given["max_length_q"]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = -1 if sliding_window is None else sliding_window - 1  # transformers counts the current token
    if query.device.type == "cuda":
        # The kernels need 16 bits. Rotary embeddings may leave queries and keys in float32, but never values.
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else value.dtype
        q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # [T, heads, dim]
        return gpu_kernel().attend(q, k, v, cu_seq_lens_q, max_length_q, scale, window, dropout)[None], None
    outputs = []
    for start, end in itertools.pairwise(cu_seq_lens_q.tolist()):
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        outputs.append(_one_sequence(q, k, v, scale, window, dropout))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _one_sequence(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, dropout: float) -> Tensor:
    length, mask, grouped = q.shape[2], None, q.shape[1] != k.shape[1]
    if 0 <= window < length - 1:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(-window)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, mask is None, scale=scale, enable_gqa=grouped)


def _find_kernel() -> Kernel:
    note = ""
    if importlib.util.find_spec("flash_attn"):
        try:
            from flash_attn import flash_attn_varlen_func

            return Kernel("flash-attn", _with_flash_attn(flash_attn_varlen_func))
        except Exception as error:  # of many kinds: it may be built for another torch, or for no such GPU
            note = f"flash-attn is installed, but its import fails: {first_line(error)}"

    from torch.nn.attention.varlen import varlen_attn

    has_windows = "window_size" in inspect.signature(varlen_attn).parameters
    return Kernel("varlen_attn", _with_varlen_attn(varlen_attn), has_windows, note)


def _with_flash_attn(flash_attn_varlen_func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v, cu, longest, scale, window, dropout: flash_attn_varlen_func(
        q, k, v, cu, cu, longest, longest, dropout, scale, causal=True, window_size=(window, 0)
    )


def _with_varlen_attn(varlen_attn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """PyTorch's attention, whose arguments differ: scales and windows came with torch 2.11, grouped heads with 2.12."""
    known = inspect.signature(varlen_attn).parameters
    takes_scale, takes_groups = "scale" in known, "enable_gqa" in known

    def kernel(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, window: int) -> Tensor:
        options = {"scale": scale, "window_size": (window, 0)} if takes_scale else {"is_causal": True}
        if not takes_scale:
            factor = scale * math.sqrt(q.shape[-1])  # the kernel divides by this root
            q = q if abs(factor - 1) < 1e-9 else q * factor
        if (groups := q.shape[1] // k.shape[1]) > 1:
            if takes_groups:
                options["enable_gqa"] = True
            else:
                k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        return varlen_attn(q, k, v, cu, cu, longest, longest, **options)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, window: int, dropout: float
    ) -> Tensor:
        if dropout:
            raise RuntimeError("attention dropout, which needs flash-attn on a GPU")
        if window >= 0 and not takes_scale:
            raise RuntimeError("a sliding window, which needs torch 2.11 or flash-attn on a GPU")
        return _in_multiples_of_8(kernel, q, k, v, cu, longest, scale, window)

    return attend


def _in_multiples_of_8(kernel: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    """Pads heads to a size that the kernel supports (OpenLLaMA-3B has 100). Zeros change no product.

    The kernel's scale must be that of the size before.
    """
    dim = q.shape[-1]
    if dim % 8:
        q, k, v = (F.pad(x, (0, -dim % 8)) for x in (q, k, v))
    return kernel(q, k, v, *arguments)[..., :dim]


AttentionInterface.register(NAME, packed_attention)
