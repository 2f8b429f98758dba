"""The processes of a run, one for each GPU: they meet, compare what each is to do, and end together."""

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import re
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist

from . import __version__
from .distributed import all_gather_object, all_reduce_max, is_rank0, rank, world_size
from .errors import GRACE, ConfigError, Interrupted, first_line

# Words in the messages of torch.distributed's two backends, and in those of no other error.
LOST_CONNECTION = ("gloo", "nccl", "connection closed", "connection reset", "timed out")
POLL_SECONDS = 0.05  # between two looks at the store
VERSIONS = {
    "abkd_fast": __version__,
    "PyTorch": torch.__version__,
    "transformers": importlib.metadata.version("transformers"),
}
SHOWN = 3  # keys of a message, and ranks of one value

_store: dist.Store | None = None
_timeout: datetime.timedelta | None = None
_last = itertools.count()  # a program may have several runs


@contextlib.contextmanager
def process_group(
    timeout_minutes: float = 30.0, values: Mapping | None = None, mistake: ConfigError | None = None
) -> Iterator[None]:
    """Joins the processes that torchrun has started, by its environment variables: NCCL between GPUs, else gloo.

    values: what this process is to do, as JSON values; it must be the same in all of them.
    mistake: why it can't do that. All raise the first one.

    A process gives up if it waits for others longer than the timeout. Raises ConfigError for environment variables that
    don't fit together, and where processes differ. Raises ConnectionError with the ranks that don't answer if a process
    is lost. Where one ends by a ConfigError or a signal, all raise the same.
    """
    global _store, _timeout
    number, count = _place()
    if count == 1:
        yield
        return
    _timeout = datetime.timedelta(minutes=timeout_minutes)
    backend = "gloo"
    if (device := int(os.environ.get("LOCAL_RANK", 0))) < torch.cuda.device_count():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)  # from here on "cuda" means this GPU
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=_timeout))
        _store = part_of_attempt(store, number, count, _timeout)
        dist.init_process_group(backend, store=_store, rank=number, world_size=count, timeout=_timeout)
    except RuntimeError as error:
        raise ConnectionError(f"rank {number} of {count} can't meet the others: {first_line(error)}") from error
    if not is_rank0():  # the other ranks would repeat the warnings of rank 0
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    try:
        mistakes = [error for error in all_gather_object(mistake) if error is not None]
        if mistakes:
            raise mistakes[0]
        check_same({"versions": VERSIONS, **(values or {})})
        yield
    except (ConfigError, Interrupted, KeyboardInterrupt) as error:
        if (other := _end_of_another()) is not None:  # torchrun then sends signals to those that are left
            raise other from None
        with contextlib.suppress(RuntimeError):  # the process of the store may be gone
            kind = "ConfigError" if isinstance(error, ConfigError) else "Interrupted"
            _store.set(f"ended/{rank()}", json.dumps([kind, str(error)]))
        raise
    except RuntimeError as error:
        if any(word in str(error).lower() for word in LOST_CONNECTION):
            raise _lost_ranks(error) from error
        raise
    dist.destroy_process_group()  # not after an error: other ranks may wait in a collective


def _place() -> tuple[int, int]:
    """This process's rank and the number of processes. Raises ConfigError for variables that don't fit together."""
    way_out = "start the processes with torchrun, or unset it for a single one"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"):
        if not re.fullmatch("[0-9]{1,9}", os.environ.get(name, "0")):
            raise ConfigError(f'{name} is "{os.environ[name]}" in the environment, expected a number; {way_out}')
    number, count = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT") if count > 1 else ()
    if missing := [name for name in needed if name not in os.environ]:
        raise ConfigError(f"WORLD_SIZE is {count} in the environment, without {', '.join(missing)}; {way_out}")
    if number >= count:
        raise ConfigError(f"RANK is {number} in the environment, but WORLD_SIZE is {count}; {way_out}")
    return number, count


def part_of_attempt(store: dist.Store, number: int, count: int, timeout: datetime.timedelta) -> dist.Store:
    """The part of torchrun's store that only the processes of this attempt use. Rank `number` of `count` calls it.

    The store outlives a restart, with the addresses of dead processes. The number of restarts can't tell the attempts
    apart: on several machines each torchrun counts its own. So every process has a name of its own, and rank 0 answers
    each name with its own one, until all have come to the part that is named so.

    Raises RuntimeError where others don't come within the timeout.
    """
    name, others = uuid.uuid4().hex, range(1, count)
    end = time.monotonic() + timeout.total_seconds()
    came, answers = ([f"{key}/{other}" for other in others] for key in ("came", "answer"))
    if number:
        store.set(f"came/{number}", name)
    while time.monotonic() < end:
        if number and store.check([f"answer/{number}"]):
            asked, first = store.get(f"answer/{number}").decode().split()
            if asked == name:
                store.set(f"{first}/{number}", "")
                return dist.PrefixStore(first, store)
        elif not number and store.check(came):  # perhaps processes of an earlier attempt: this one's come later
            store.multi_set(answers, [f"{asked.decode()} {name}" for asked in store.multi_get(came)])
            if store.check([f"{name}/{other}" for other in others]):
                return dist.PrefixStore(name, store)
        time.sleep(POLL_SECONDS)
    raise RuntimeError(f"not all have come within {timeout.total_seconds() / 60:g} minutes")


def have_met() -> bool:
    """Whether there are several processes, and they can tell each other something."""
    return _store is not None


def is_restarted() -> bool:
    """Whether a torchrun has started its processes again after a failure. Collective: each machine counts its own."""
    return all_reduce_max(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))) > 0


def check_same(values: Mapping) -> None:
    """Raises ConfigError on all ranks where they have different values: names the keys, and which rank has what.

    values: JSON values by their keys, mappings within them too. Collective.
    """
    if world_size() == 1:
        return
    of_ranks = all_gather_object(dict(_flat(values)))
    keys = dict.fromkeys(key for own in of_ranks for key in own)
    different = [key for key in keys if len({own.get(key) for own in of_ranks}) > 1]
    if not different:
        return
    told = [f"{key} is {_by_rank([own.get(key, 'missing') for own in of_ranks])}" for key in different[:SHOWN]]
    if len(different) > SHOWN:
        told.append(f"and {len(different) - SHOWN} more keys differ")
    way_out = "start all with one command, one recipe and the same files"
    raise ConfigError(f"the processes differ: {'; '.join(told)}; {way_out}")


def _flat(values: Mapping, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys, and their values as JSON."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, default=str)


def _by_rank(values: list[str]) -> str:
    """Which rank has which value, in words."""
    ranks: dict[str, list[int]] = {}
    for number, value in enumerate(values):
        ranks.setdefault(value, []).append(number)
    words = []
    for value, those in ranks.items():
        where = f"rank {', '.join(map(str, those))}" if len(those) <= SHOWN else f"{len(those)} ranks"
        words.append(f"{value if len(value) <= 80 else f'{value[:79]}…'} on {where}")
    return ", ".join(words)


def tag_with_rank(text: str, topic: str = "") -> str | None:
    """The message with this rank's number; None if another rank has said the same, or something on this topic."""
    with contextlib.suppress(RuntimeError):  # the process of the store may be gone
        if _store.add(f"said/{topic or hashlib.sha256(text.encode()).hexdigest()}", 1) > 1:
            return None
    return f"rank {rank()} of {world_size()}: {text}"


def _end_of_another() -> ConfigError | Interrupted | None:
    """The error by which another rank has ended, if one has told."""
    with contextlib.suppress(RuntimeError):  # the process of the store may be gone
        for other in range(world_size()):
            if other != rank() and _store.check([f"ended/{other}"]):
                kind, text = json.loads(_store.get(f"ended/{other}"))
                return ConfigError(text) if kind == "ConfigError" else Interrupted(text)
    return None


def _lost_ranks(error: RuntimeError) -> Exception:
    """The error of a rank that has told why it ends; else a ConnectionError with the ranks that don't answer.

    Waits GRACE for ranks that stop, too.
    """
    silent = set(range(world_size())) - {rank()}
    with contextlib.suppress(RuntimeError, KeyboardInterrupt):  # the store may be gone; torchrun ends those that wait
        if (other := _end_of_another()) is not None:
            return other
        _store.set(f"stopped/{rank()}", "")
        end = time.monotonic() + GRACE
        while silent and time.monotonic() < end:
            silent = {other for other in silent if not _store.check([f"stopped/{other}"])}
            time.sleep(0.1)
    names = ", ".join(map(str, sorted(silent))) or "that has stopped"
    return ConnectionError(f"no answer from rank {names}: it has died, or hangs ({first_line(error)})")


@functools.cache
def background_group() -> dist.ProcessGroup:
    """A group of all processes for a background thread, whose messages must not mix with those of training."""
    return dist.new_group(backend="gloo", timeout=_timeout)


def run_last_on_rank0(function: Callable[..., None], *arguments: object) -> None:
    """Calls a function on rank 0 alone at the end of a run, however long it takes: no collective waits for it.

    Other ranks return when it has ended, also with an error, which rank 0 alone raises.
    """
    key = f"done/{next(_last)}"
    if not is_rank0():
        _store.wait([key], datetime.timedelta(days=30))
        return
    try:
        function(*arguments)
    finally:
        if _store is not None:
            _store.set(key, "")
