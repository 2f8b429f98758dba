"""Padding-free causal attention over sequences packed end to end: one function, registered with transformers."""

import contextlib
import importlib.util
import inspect
import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from ..errors import first_line
from .sinks import one_sequence_written_out, sink_attention, spans, window_mask

NAME = "abkd_packed"
WIDEST_HEAD = 256  # of a GPU's kernels
used: set[str] = set()  # what the function was asked for beside windows; `forms.choose` reads it
callers: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # the modules that call the function
_given: dict[str, Any] = {}  # the options of models that lose them between their forward pass and attention


class Kernel(NamedTuple):
    """The attention of a GPU."""

    name: str  # "flash-attn", or "varlen_attn", which is PyTorch's
    attend: Callable[..., Tensor]  # f(q, k, v, cu_seqlens, max_seqlen, scale, window, dropout) on [T, heads, dim]
    has_windows: bool = True
    has_softcap: bool = False  # as a ninth argument of `attend`
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
    """What a model's attention needs and has not on this device, in words; None if nothing.

    needs: what `used` has after a forward pass.
    """
    if device.type != "cuda":
        return None
    if "wide heads" in needs:
        return f"its attention heads are wider than {WIDEST_HEAD}, which a GPU's attention kernels don't take"
    if {"softcap", "sinks"} <= needs:
        return "soft caps and sinks in its attention, which no attention of a GPU has together"
    if "softcap" in needs and not gpu_kernel().has_softcap:
        return "soft caps in its attention, which need flash-attn 2.6 or later on a GPU"
    return None


class given(contextlib.AbstractContextManager):
    """A context in which `options` reach attention also from models that lose keyword arguments on the way."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def __enter__(self) -> None:
        global _given
        self.before, _given = _given, self.options

    def __exit__(self, *error: object) -> None:
        global _given
        _given = self.before


def recomputation() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """Contexts of a checkpointed layer and of its second pass, which has the options that are given now."""
    return contextlib.nullcontext(), given(_given)


def option(options: dict[str, Any], name: str) -> Any:
    """An option that reached attention as a keyword argument, or else by `given`; None where it didn't."""
    return _given.get(name) if (value := options.get(name)) is None else value


class Settings(NamedTuple):
    """What one layer's attention does."""

    scale: float  # of the products of queries and keys
    window: int | None = None  # how many of the last tokens are seen, the current one included; None: all
    chunk: int | None = None  # a sequence consists of chunks of so many tokens, which do not see each other
    softcap: float | None = None  # scores z become softcap tanh(z / softcap)
    sinks: Tensor | None = None  # [heads], one more score in each head's softmax, without a value

    @property
    def before(self) -> int:
        """How many tokens before the current one are seen; -1: all."""
        return -1 if self.window is None else self.window - 1

    def first_seen(self, length: int) -> int:
        """The first token that the last one of `length` tokens sees."""
        first = 0 if self.window is None else max(0, length - self.window)
        return first if self.chunk is None else max(first, (length - 1) // self.chunk * self.chunk)


def read_settings(module: nn.Module, query: Tensor, options: dict[str, Any]) -> Settings:
    """The settings in the keyword arguments of a layer's attention, and in what `note_masks` has noted."""
    scale, sinks, softcap = options.get("scaling"), options.get("s_aux"), options.get("softcap")
    settings = Settings(
        query.shape[-1] ** -0.5 if scale is None else scale,
        options["sliding_window"] if "sliding_window" in options else getattr(module, "masked_window", None),
        getattr(module, "masked_chunk", None),
        softcap,
        sinks,
    )
    if not torch.compiler.is_compiling():
        asked = {
            "softcap": softcap is not None,
            "sinks": sinks is not None,
            "wide heads": query.shape[-1] > WIDEST_HEAD,
            "dropout": bool(options.get("dropout")),
        }
        used.update(name for name, is_asked in asked.items() if is_asked)
        callers.add(module)
    return settings


def note_masks(model: nn.Module) -> None:
    """Notes at each layer what its attention is not told, because transformers puts it into the mask.

    A layer's number is not read while it computes: compiled layers share their code. The rules are those of
    `transformers.masking_utils.create_masks_for_generate`.
    """
    for module in model.modules():
        config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
        if config is None or index is None:
            continue
        # A configuration may also have a value that its family does not know.
        known = {name: value for name, value in vars(config).items() if hasattr(type(config), name)}
        window, chunk, kinds = map(known.get, ("sliding_window", "attention_chunk_size", "layer_types"))
        if kinds is not None:
            window = window if kinds[index] == "sliding_attention" else None
            chunk = chunk if kinds[index] == "chunked_attention" else None
        module.masked_window, module.masked_chunk = window, chunk


def chunk_boundaries(cu_seqlens: Tensor, position_ids: Tensor, chunk: int) -> Tensor:
    """Sequence boundaries that also lie between chunks, in int32. The host does not wait for a GPU.

    The number of chunks is known to the GPU alone. So there are as many as there can be, and the last ones are empty.

    Args:
        cu_seqlens: the start of each sequence, and T.
        position_ids: [1, T], from 0 in every sequence.
    """
    tokens = position_ids.shape[1]
    places = torch.arange(tokens, dtype=torch.int32, device=position_ids.device)
    starts = torch.where(position_ids[0] % chunk == 0, places, tokens).sort().values
    most = min(tokens, len(cu_seqlens) - 1 + tokens // chunk)
    return F.pad(starts[:most], (0, 1), value=tokens)


def by_own_place(module: nn.Module, query: Tensor, options: dict[str, Any]) -> Tensor:
    """Queries [1, heads, T, dim] of a layer that scales them by their place in the row: by that in their sequence.

    Llama 4 does, in layers without rotary embeddings. All other queries are returned as they are.
    """
    if not getattr(module, "attn_temperature_tuning", False) or module.use_rope:
        return query

    def factor(places: Tensor) -> Tensor:
        return ((places + 1.0) / module.floor_scale).floor().log1p() * module.attn_scale + 1.0

    places = option(options, "places")[0]
    ratio = factor(places) / factor(torch.arange(len(places), device=places.device))
    return (query * ratio[:, None]).to(query.dtype)


def packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, dim]
    key: Tensor,  # [1, key heads, T, dim]
    value: Tensor,  # [1, key heads, T, its own dim]
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a packed row: [1, T, heads, dim of the values], and no weights.

    options: the keyword arguments that transformers gives to attention, and those of `PackedCausalLM.run_body`. These
    may also come by `given`.
    """
    settings, dropout = read_settings(module, query, options), options.get("dropout", 0.0)
    query = by_own_place(module, query, options)
    has_kernel = settings.sinks is not None and settings.softcap is None and settings.chunk is None and not dropout
    if query.device.type == "cuda" or has_kernel:
        return _by_kernel(query, key, value, settings, dropout, options)[None], None
    outputs = []
    boundaries = option(options, "cu_seq_lens_q")
    if boundaries is None:
        raise ValueError("this model reads packed rows now: it is being trained; load what was saved for other uses")
    for start, end in spans(boundaries, settings.chunk):
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        if settings.sinks is None and settings.softcap is None:
            out = _one_sequence(q, k, v, settings.scale, settings.before, dropout)
        else:
            caps = settings.softcap, settings.sinks
            out = one_sequence_written_out(q, k, v, settings.scale, settings.before, dropout, *caps)
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1).contiguous(), None


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, settings: Settings, dropout: float, options: dict[str, Any]
) -> Tensor:
    names = ("cu_seq_lens_q", "max_length_q") if settings.chunk is None else ("chunk_cu_seq_lens", "max_chunk_length")
    # The kernels need one type, those of GPUs 16 bits. Rotary embeddings may leave queries and keys in float32, but
    # never values.
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    tensors = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # [T, heads, dim]
    kernel = gpu_kernel().attend if settings.sinks is None else sink_attention
    arguments = *(option(options, name) for name in names), settings.scale, settings.before, dropout
    return _in_multiples_of_8(kernel, *tensors, *arguments, *(x for x in settings[-2:] if x is not None))


def _one_sequence(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, dropout: float) -> Tensor:
    grouped, mask = q.shape[1] != k.shape[1], window_mask(q.shape[2], window, q.device)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, mask is None, scale=scale, enable_gqa=grouped)


def _find_kernel() -> Kernel:
    note = ""
    if importlib.util.find_spec("flash_attn"):
        try:
            from flash_attn import flash_attn_varlen_func

            has_softcap = "softcap" in inspect.signature(flash_attn_varlen_func).parameters
            return Kernel("flash-attn", _with_flash_attn(flash_attn_varlen_func), has_softcap=has_softcap)
        except Exception as error:  # of many kinds: it may be built for another torch, or for no such GPU
            note = f"flash-attn is installed, but its import fails: {first_line(error)}"

    from torch.nn.attention.varlen import varlen_attn

    has_windows = "window_size" in inspect.signature(varlen_attn).parameters
    return Kernel("varlen_attn", _with_varlen_attn(varlen_attn), has_windows, note=note)


def _with_flash_attn(flash_attn_varlen_func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu: Tensor,
        longest: int,
        scale: float,
        window: int,
        dropout: float,
        softcap: float = 0.0,
    ) -> Tensor:
        caps = {"softcap": softcap} if softcap else {}
        return flash_attn_varlen_func(
            q, k, v, cu, cu, longest, longest, dropout, scale, causal=True, window_size=(window, 0), **caps
        )

    return attend


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
        return kernel(q, k, v, cu, longest, scale, window)

    return attend


def _in_multiples_of_8(kernel: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    """Pads heads to one size that the kernel supports: OpenLLaMA-3B has 100, DeepSeek's values are narrower than keys.

    Zeros change no product. The kernel's scale must be that of the size before.
    """
    dim = v.shape[-1]
    width = max(q.shape[-1], dim)
    width += -width % 8
    q, k, v = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    out = kernel(q, k, v, *arguments)
    return out if dim == width else out[..., :dim].contiguous()


AttentionInterface.register(NAME, packed_attention)
