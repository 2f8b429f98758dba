"""Several processes, one a GPU: all of torch.distributed that a run uses. Alone, every function here does nothing."""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import logging
import os
import pickle
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .errors import first_line

# It gets another name, which older versions don't know.
warnings.filterwarnings("ignore", r".*broadcast_buffers. is deprecated", FutureWarning)

GRACE = 5.0  # seconds that a rank has to say it stops, too, before others call it dead
# In messages of torch.distributed's two backends, and of no other error.
LOST_CONNECTION = ("gloo", "nccl", "connection closed", "connection reset", "timed out")

_store: dist.Store | None = None
_timeout: datetime.timedelta | None = None

Item = TypeVar("Item")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_rank0() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def is_restarted() -> bool:
    """Whether torchrun has started the processes again, after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


@contextlib.contextmanager
def process_group(timeout_minutes: float = 30.0) -> Iterator[None]:
    """Joins the processes that torchrun started, by its environment variables: NCCL between GPUs, else gloo.

    A process that waits for others longer than the timeout gives up. Raises ConnectionError, with the ranks that don't
    answer, where another one is lost.
    """
    global _store, _timeout
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    _timeout = datetime.timedelta(minutes=timeout_minutes)
    backend = "gloo"
    if (number := int(os.environ.get("LOCAL_RANK", 0))) < torch.cuda.device_count():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(number)  # from here on "cuda" means this one
    _store, number, count = next(dist.rendezvous("env://", timeout=_timeout))
    dist.init_process_group(backend, store=_store, rank=number, world_size=count, timeout=_timeout)
    if not is_rank0():  # they would repeat its warnings
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    try:
        yield
    except RuntimeError as error:
        if reason := _lost_ranks(error):
            raise ConnectionError(reason) from error
        raise
    dist.destroy_process_group()  # not after an error: others may wait in it


def tag_with_rank(text: str, topic: str = "") -> str | None:
    """A message of this rank, with its name; None where another rank has said the same, or all on its topic."""
    if _store is None:  # what was wrong before the processes met is the same for all of a machine
        return text if os.environ.get("LOCAL_RANK", "0") == "0" else None
    with contextlib.suppress(RuntimeError):  # of a store whose process is gone
        if _store.add(f"said/{topic or hashlib.sha256(text.encode()).hexdigest()}", 1) > 1:
            return None
    return f"rank {rank()} of {world_size()}: {text}"


def _lost_ranks(error: RuntimeError) -> str | None:
    """Which ranks don't answer, where that is what an error is about. Waits GRACE for those that stop as well."""
    if world_size() == 1 or not any(word in str(error).lower() for word in LOST_CONNECTION):
        return None
    silent = set(range(world_size())) - {rank()}
    with contextlib.suppress(RuntimeError):  # of a store whose process is gone
        _store.set(f"stopped/{rank()}", "")
        end = time.monotonic() + GRACE
        while silent and time.monotonic() < end:
            silent = {other for other in silent if not _store.check([f"stopped/{other}"])}
            time.sleep(0.1)
    names = ", ".join(map(str, sorted(silent))) or "that has stopped"
    return f"no answer from rank {names}: it has died, or hangs ({first_line(error)})"


@functools.cache
def background_group() -> dist.ProcessGroup:
    """All processes, for a thread beside the one that trains, whose messages must not meet its own."""
    return dist.new_group(backend="gloo", timeout=_timeout)


# Collectives. Every rank has to call them, in the same order.


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_count(number: int) -> int:
    """The sum over all ranks."""
    return int(all_reduce_sum(torch.tensor(number)))


def all_reduce_max(number: float) -> float:
    """The largest over all ranks."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def all_gather_object(item: Item) -> list[Item]:
    """Every rank's, in order of the ranks."""
    if world_size() == 1:
        return [item]
    items = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def barrier() -> None:
    """Waits for all ranks."""
    all_gather_object(None)


def local_shard(items: list[Item]) -> list[Item]:
    """This rank's of the items: every world-th."""
    return items[rank() :: world_size()]


def gather_shards(items: list[Item]) -> list[Item]:
    """The inverse: what each rank made of its share, all in the order of the whole."""
    parts = all_gather_object(items)
    return [parts[place % world_size()][place // world_size()] for place in range(sum(map(len, parts)))]


def run_on_all_ranks(function: Callable[[], Item]) -> list[Item]:
    """What it returns on every rank; what it raises on one is raised on all."""
    if world_size() == 1:
        return [function()]
    try:
        outcome = function(), None
    except Exception as error:
        outcome = None, _portable(error)
    outcomes = all_gather_object(outcome)
    if (error := next((error for _, error in outcomes if error is not None), None)) is not None:
        raise error
    return [result for result, _ in outcomes]


def _portable(error: Exception) -> Exception:
    """The error, or its text where it can't be sent."""
    try:
        pickle.dumps(error)
    except Exception:
        return RuntimeError(repr(error))
    return error


def run_on_rank0(function: Callable[[], Item]) -> Item:
    """Calls it in the main process alone; what it returns, or raises, all get."""
    return run_on_all_ranks(function if is_rank0() else lambda: None)[0]


@contextlib.contextmanager
def rank0_context(context: contextlib.AbstractContextManager) -> Iterator[None]:
    """The context, entered by the main process for all."""
    with contextlib.ExitStack() as stack:
        run_on_rank0(lambda: stack.enter_context(context) and None)
        yield


@contextlib.contextmanager
def rank0_first() -> Iterator[None]:
    """The others wait until the main process is through, and find what it leaves on the disk."""
    if not is_rank0():
        barrier()
    try:
        yield
    finally:
        if is_rank0():
            barrier()


# A step on several ranks


def seed_per_rank(seed: int) -> None:
    """From here on ranks draw different numbers: other samples get another dropout."""
    if rank():
        torch.manual_seed(seed + 1_000_003 * rank())  # seeds next to `seed` are taken


def replicate(model: nn.Module) -> nn.Module:
    """The model as it is to be called in training. Gradients are summed over ranks, not averaged: losses are shares
    of one mean over all ranks.
    """
    if world_size() == 1 or is_sharded(model):
        return model
    if next(model.parameters()).is_cuda:
        torch._dynamo.config.optimize_ddp = False  # it would cut compiled layers, which are small enough, into pieces
    replica = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    replica.register_comm_hook(None, _sum)
    return replica


def _sum(state, bucket):  # noqa: ANN001 - it is refused with annotations that are text
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def grad_sync(model: nn.Module, when: bool) -> contextlib.AbstractContextManager:
    """A micro-batch's passes, after which gradients are summed over ranks, or only collected.

    Those of a sharded model are summed every time: no rank has room for all of them.
    """
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not when else contextlib.nullcontext()


def shard(
    model: nn.Module, layers: Iterable[nn.Module], device: torch.device, storage: torch.dtype, dtype: torch.dtype
) -> None:
    """Leaves each rank its part of every weight, on its device, in the type `storage`, of an adapter in its own.

    A layer is whole while it computes, in `dtype`.

    What is in no layer, the embeddings above all, is whole from a forward pass on to the end of the backward pass. Both
    communicate: all ranks have to make the same ones.
    """
    layers = list(layers)
    mesh = init_device_mesh(device.type, (world_size(),))
    policy = MixedPrecisionPolicy(dtype, torch.float32) if dtype == torch.bfloat16 else MixedPrecisionPolicy()
    read = next(model.parameters()).dtype
    for module in (*layers, model):
        for parameter in module.parameters():
            if parameter.dtype == read != storage:
                parameter.data = parameter.data.to(storage)
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)  # a sum, as in `replicate`
        module.set_force_sum_reduction_for_comms(True)
    # By itself FSDP2 fetches ahead what came before in its last forward passes, of which ranks may have made different
    # ones while they had all weights: then they would wait for each other forever.
    for module, earlier in zip((*layers, model), (layers[0], *layers), strict=True):
        module.set_modules_to_backward_prefetch([earlier])


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


@contextlib.contextmanager
def unsharded(*models: nn.Module) -> Iterator[None]:
    """Within it every rank has all weights of sharded models, and may compute without the others."""
    parts = [part for model in models for part in model.modules() if is_sharded(part)]
    layers = [part for part in parts if part not in models]
    for part in parts:
        part.unshard()
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True, recurse=False)
        for part in parts:
            part.reshard()


def local_numel(tensor: Tensor) -> int:
    """How many numbers of a tensor this rank has."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel()


def unshard_root(model: nn.Module) -> None:
    """Makes what is in no layer of a sharded model whole, as a forward pass leaves it."""
    if is_sharded(model):
        model.unshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor of which every rank may have a part. All ranks have to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
