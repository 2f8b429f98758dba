"""The device that models run on, and the type that they compute in."""

import contextlib
import math
import os
import pathlib
import platform
import re
import resource
import sys
import time

import torch

from . import distributed
from .errors import ConfigError, reading
from .losses import row_ops

LEAST_CAPABILITY = (8, 0)  # of the kernels of flash-attn and of PyTorch's variable-length attention, and of bfloat16


def choose_device(wish: str, section: str = "") -> torch.device:
    """The device for "auto", "cpu" or "cuda", within a container's CPU quota.

    Raises ConfigError, with `section` before the key, if there is none, and for variables of the environment that no
    kernel or device can follow.
    """
    if wish == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{section}device is cuda, but PyTorch sees no GPU; use auto or cpu")
    with reading("the losses have no kernels to use"):
        row_ops.build_info()
    limit_threads()
    device = torch.device("cuda" if wish != "cpu" and torch.cuda.is_available() else "cpu")
    with reading("LOCAL_RANK of the environment is no number", "; unset it"):
        number, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if device.type == "cuda" and number >= count:
        problem = f"process {number} of this machine has no GPU of its own, of {count}"
        raise ConfigError(f"{section}device is {wish}, but {problem}: start as many processes, or use cpu")
    return device


def choose_dtype(wish: str, device: torch.device, section: str = "") -> torch.dtype:
    """The type for "auto" or a type's name.

    Raises ConfigError if models don't compute in it on this device, and for a GPU that they don't run on.
    """
    if device.type != "cuda":
        return torch.float32 if wish == "auto" else getattr(torch, wish)
    if wish not in ("auto", "bfloat16"):
        raise ConfigError(f"{section}dtype is {wish}, but packed attention on a GPU computes in bfloat16; use that")
    # Older GPUs lack bfloat16, and float16 with scaled losses would not help: attention's kernels don't run there.
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        has, needs = (".".join(map(str, pair)) for pair in (capability, LEAST_CAPABILITY))
        raise ConfigError(
            f"{section}device: {device_name(device)} has compute capability {has}, but packed attention needs {needs} "
            "or more; use another GPU, or device cpu"
        )
    return torch.bfloat16


def limit_threads() -> None:
    """Uses no more threads than the container may use CPUs, unless OMP_NUM_THREADS says how many."""
    quota = cpu_quota()
    if quota is not None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), math.ceil(quota))))


def cpu_quota(group: pathlib.Path = pathlib.Path("/sys/fs/cgroup")) -> float | None:
    """The CPUs that the container's control group (version 2 or 1) may use; None without a limit."""
    with contextlib.suppress(OSError, ValueError):
        limit, period = (group / "cpu.max").read_text(encoding="ascii").split()
        return float(limit) / float(period)  # "max" is no number
    with contextlib.suppress(OSError, ValueError):
        limit, period = (float((group / f"cpu/cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return limit / period if limit > 0 else None
    return None


class BusyMachine:
    """Notices other programs on the CPUs. PyTorch's threads, which wait for each other, then lose most of their time.

    GNU's OpenMP lets a waiting thread spin: it keeps a CPU that the thread with the work could use.
    """

    def __init__(self, device: torch.device) -> None:
        is_slow = device.type == "cpu" and torch.get_num_threads() > 1 and "OMP_WAIT_POLICY" not in os.environ
        self.before = _seconds_without_cpu() if is_slow else None
        self.since = time.monotonic()

    def hint(self) -> str | None:
        """What to do about it, once, after five seconds; None where there is nothing to say."""
        seconds = time.monotonic() - self.since
        if self.before is None or seconds < 5:
            return None
        share = (_seconds_without_cpu() - self.before) / seconds
        self.before = None
        if share < 0.2:
            return None
        return (
            f"other programs keep the CPUs busy: training was ready but had none in {share:.0%} of the time; "
            "OMP_WAIT_POLICY=PASSIVE in the environment makes it much faster on such a machine"
        )


def _seconds_without_cpu() -> float | None:
    """Seconds in which this thread was ready to run, but had no CPU; None where the system doesn't say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(pathlib.Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    return None


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {(count := torch.get_num_threads())} thread{'s' * (count > 1)}"


def cpu_name() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*:(.*)", info.read_text(), re.MULTILINE) if info.exists() else None
    return name[1].strip() if name else platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> int:
    """Bytes that the GPU has allocated at most, or else the process; the largest of all ranks. Collective."""
    if device.type == "cuda":
        return int(distributed.all_reduce_max(torch.cuda.max_memory_allocated(device)))
    unit = 1 if sys.platform == "darwin" else 1024
    return int(distributed.all_reduce_max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit))


def free_memory(device: torch.device) -> int:
    """Bytes that the device could still allocate; 0 if the system doesn't say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    return 0
