"""True numbers on the imaginary card: the CPU's operators compute on its memory.

PyTorch's CUDA operators run as on a GPU: dispatch, shapes, allocations, launches. Their kernels compute nothing. So
`Emulate` calls the CPU's operator on the same memory after each. Our row kernels need no such call: the shim runs their
device code when they are launched. Captured graphs replay what was called during their capture.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import card
import torch
from on_cpu import ON_CPU
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
# Their results have a size that the host must know: it reads the GPU's memory.
DATA_DEPENDENT = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}
EMPTY = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.empty_like.default,
    aten.new_empty_strided.default,
}
# These do the same on any device, or change no memory.
SAME = {"aten::_local_scalar_dense", "aten::detach", "aten::set_", "aten::resize_"}


def alias(tensor: Tensor) -> Tensor:
    """A CPU tensor on the same memory."""
    if tensor.device.type != "cuda":
        return tensor
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    bytes_of = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    layout = tensor.storage_offset(), tensor.shape, tensor.stride()
    return torch.empty(0, dtype=tensor.dtype).set_(bytes_of, *layout)


def tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _has_mask(func: Any, args: tuple) -> bool:
    """Whether an index is a mask, whose true elements the host has to count."""
    indexes = func._schema.name in ("aten::index", "aten::index_put_", "aten::index_put")
    return indexes and any(x is not None and x.dtype == torch.bool for x in args[1])


class Emulate(TorchDispatchMode):
    """A context in which CUDA tensors have true numbers. Memory that nothing has written is NaN.

    `observers` are called with each operator on CUDA tensors, also inside custom operators, and with its arguments and
    its result, before it computes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0
        self.observers: list[Callable[[Any, tuple, dict, Any], None]] = []

    def __enter__(self) -> "Emulate":  # again, too, within an operator
        self.depth += 1
        card.run_row_kernels(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.depth -= 1
        card.run_row_kernels(self.depth > 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        if name in OPDEFS:  # an operator written in Python: go on inside it
            with self:
                return OPDEFS[name]._init_fn(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # .to(), .contiguous() and the like: go on with what they consist of
                return func.decompose(*args, **kwargs)
        on_card = any(x.is_cuda for x in tensors((args, kwargs))) or str(kwargs.get("device", "")).startswith("cuda")
        if not on_card or func.is_view or name in SAME:
            return func(*args, **kwargs)
        if func in DATA_DEPENDENT or _has_mask(func, args) or name == "aten::isin":
            return self._on_cpu_alone(func, args, kwargs)
        result = func(*args, **kwargs)
        for observe in self.observers:
            observe(func, args, kwargs, result)
        if name.startswith("abkd_fast::row_"):
            return result
        work = functools.partial(_compute, func, args, kwargs, result)
        if torch.cuda.is_current_stream_capturing():
            _captured.append(work)
        else:
            work()
        return result

    def _on_cpu_alone(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Of operators whose CUDA form would read a number that no kernel has computed."""
        if func._schema.name != "aten::isin":
            card.note_wait(f"data-dependent {func}")
        result = func(*tree_map_only(Tensor, alias, args), **tree_map_only(Tensor, alias, kwargs))
        return args[0] if func._schema.is_mutable else tree_map_only(Tensor, lambda x: x.cuda(), result)


def _compute(func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """Writes what the CPU's operator makes to the memory of `result`."""
    if func in EMPTY:
        for out in tensors(result):
            if out.is_floating_point():
                alias(out).fill_(torch.nan)
        return
    given = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
    args, kwargs = (tree_map_only(Tensor, alias, x) for x in (args, kwargs))
    args, kwargs = (tree_map_only(torch.device, lambda _: torch.device("cpu"), x) for x in (args, kwargs))
    kwargs = {key: value for key, value in kwargs.items() if key not in ("pin_memory", "generator", "non_blocking")}
    made = ON_CPU.get(func, func)(*args, **kwargs)
    for out, value in zip(tensors(result), tensors(made), strict=False):
        if out.untyped_storage().data_ptr() not in given and out.shape == value.shape:
            alias(out).copy_(value)


# ---- graphs, and printing

_captured: list[Callable[[], None]] = []  # the work of the capture in progress


def _capture_begin(graph: torch.cuda.CUDAGraph, *args: Any, **kwargs: Any) -> None:
    _captured.clear()
    _real["capture_begin"](graph, *args, **kwargs)


def _capture_end(graph: torch.cuda.CUDAGraph) -> None:
    graph.emulated = list(_captured)
    _captured.clear()
    _real["capture_end"](graph)


def _replay(graph: torch.cuda.CUDAGraph) -> None:
    with _disable_current_modes():
        for work in getattr(graph, "emulated", ()):
            work()
    _real["replay"](graph)


_real = {name: getattr(torch.cuda.CUDAGraph, name) for name in ("capture_begin", "capture_end", "replay")}
for _name, _function in (("capture_begin", _capture_begin), ("capture_end", _capture_end), ("replay", _replay)):
    setattr(torch.cuda.CUDAGraph, _name, _function)


def _text(tensor: Tensor, *args: Any, _real: Callable = torch._tensor_str._str, **kwargs: Any) -> str:
    if type(tensor) not in (Tensor, torch.nn.Parameter):  # the compiler's have no memory
        return _real(tensor, *args, **kwargs)
    with _disable_current_modes():  # printing computes outside of all modes
        return _real(alias(tensor.detach()).clone(), *args, **kwargs)


torch._tensor_str._str = _text
