"""What several processes, one for each GPU, do together. A single process communicates nothing (see `processes.py`)."""

import contextlib
import os
import pickle
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

# The argument gets a new name, which older versions of torch don't know.
warnings.filterwarnings("ignore", r".*broadcast_buffers. is deprecated", FutureWarning)

Item = TypeVar("Item")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_rank0() -> bool:
    """Whether this process is rank 0, which writes and prints."""
    return rank() == 0


# Collectives: every rank has to call them, in the same order.


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sums a tensor over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_count(number: int) -> int:
    """The sum of a number over all ranks."""
    return int(all_reduce_sum(torch.tensor(number)))


def all_reduce_max(number: float) -> float:
    """The largest number of all ranks."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def all_gather_object(item: Item) -> list[Item]:
    """The items of all ranks, in the order of the ranks."""
    if world_size() == 1:
        return [item]
    items = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def barrier() -> None:
    """Waits until all ranks have come here."""
    all_gather_object(None)


def local_shard(items: list[Item]) -> list[Item]:
    """This rank's part of the items: rank, rank + world_size, …"""
    return items[rank() :: world_size()]


def gather_shards(items: list[Item]) -> list[Item]:
    """The inverse of `local_shard`: the items of all ranks in the original order."""
    shards = all_gather_object(items)
    return [shards[index % world_size()][index // world_size()] for index in range(sum(map(len, shards)))]


def run_on_all_ranks(function: Callable[[], Item]) -> list[Item]:
    """Calls a function on every rank and returns all results. An error of one rank is raised on all of them."""
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
    """The error, or a RuntimeError with its text if pickle can't send it."""
    try:
        pickle.dumps(error)
    except Exception:
        return RuntimeError(repr(error))
    return error


def run_on_rank0(function: Callable[..., Item], *arguments: object) -> Item:
    """Calls a function on rank 0 alone. All ranks return its result, or raise its error."""
    return run_on_all_ranks(lambda: function(*arguments) if is_rank0() else None)[0]


def run_on_each_node(function: Callable[[], object]) -> None:
    """Calls a function on the first rank of each machine. All ranks raise its error."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    run_on_all_ranks(lambda: function() if is_first else None)


@contextlib.contextmanager
def rank0_context(context: contextlib.AbstractContextManager) -> Iterator[None]:
    """Rank 0 enters the context for all ranks. An error in entering it is raised on all of them."""
    with contextlib.ExitStack() as stack:
        run_on_rank0(lambda: stack.enter_context(context) and None)
        yield


@contextlib.contextmanager
def rank0_first() -> Iterator[None]:
    """Rank 0 runs the block first. The others wait for it, and find on the disk what it has written."""
    if not is_rank0():
        barrier()
    try:
        yield
    finally:
        if is_rank0():
            barrier()


# A training step on several ranks.


def seed_per_rank(seed: int) -> None:
    """Gives every rank its own random numbers from here on, so that dropout differs between ranks."""
    if rank():
        torch.manual_seed(seed + 1_000_003 * rank())  # the run uses the seeds next to `seed` elsewhere


def replicate(model: nn.Module, may_idle: bool = False) -> nn.Module:
    """The model to call in training. Sums its gradients over ranks: each rank's loss is a part of one mean over all.

    may_idle: whether a pass may leave weights without a gradient, as experts without tokens. Each pass then looks for
    them; otherwise the other ranks would wait for their gradients.
    """
    if world_size() == 1 or is_sharded(model):
        return model
    if next(model.parameters()).is_cuda:
        torch._dynamo.config.optimize_ddp = False  # it would split compiled layers, which are small enough
    options = {"broadcast_buffers": False, "gradient_as_bucket_view": True, "find_unused_parameters": may_idle}
    replica = DistributedDataParallel(model, **options)
    replica.register_comm_hook(None, _sum)
    return replica


def _sum(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def grad_sync(model: nn.Module, when: bool) -> contextlib.AbstractContextManager:
    """A context for one micro-batch's passes, which sum the gradients over ranks if `when` is true.

    The gradients of a sharded model are summed every time: no rank has memory for all of them.
    """
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not when else contextlib.nullcontext()


def shard(
    model: nn.Module, layers: Iterable[nn.Module], device: torch.device, storage: torch.dtype, dtype: torch.dtype
) -> None:
    """Shards a model in place: each rank keeps its part of every weight, on `device`, in the type `storage`.

    The weights of an adapter keep their own type. A layer is gathered while it computes, in `dtype`. Weights outside of
    the layers (above all the embeddings) stay gathered from a forward pass to the end of its backward pass. Both passes
    communicate: all ranks have to make the same passes.
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
    # By default FSDP2 prefetches by the order of its last forward passes. Ranks may have made different passes while
    # they had all weights (see `unsharded`), and would wait for each other forever.
    for module, earlier in zip((*layers, model), (layers[0], *layers), strict=True):
        module.set_modules_to_backward_prefetch([earlier])


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


@contextlib.contextmanager
def unsharded(*models: nn.Module) -> Iterator[None]:
    """A context in which every rank has all weights of sharded models, and may compute without the others."""
    modules = [module for model in models for module in model.modules() if is_sharded(module)]
    layers = [module for module in modules if module not in models]
    for module in modules:
        module.unshard()
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True, recurse=False)
        for module in modules:
            module.reshard()


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def unshard_root(model: nn.Module) -> None:
    """Gathers the weights outside of a sharded model's layers, as a forward pass leaves them."""
    if is_sharded(model):
        model.unshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
