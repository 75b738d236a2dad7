"""Several processes that do one run together, a device each, as torchrun starts them. In a single process all of it is free.

Only the first process prints and writes. What the others need of it, they are sent.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from dfs_cli.errors import ConfigError, LostProcessError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_TIMEOUT = timedelta(minutes=10)  # for one that hangs; of one that dies its connections tell at once, and torchrun does
_FAILED = "dfs_failed"

_stores: list[Any] = []
"""The store of the processes, while they are joined: torch keeps its own private."""
_alone: list[bool] = []


def is_first() -> bool:
    """Whether this process prints and writes; known before torch is imported."""
    return not _is_one_of_several() or os.environ["RANK"] == "0"


def _is_one_of_several() -> bool:
    """By torchrun's environment."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(name in os.environ for name in names) and os.environ["WORLD_SIZE"] != "1"


def join(device: str) -> None:
    """Join the processes that torchrun started, if it did, until :func:`leave`.

    Args:
        device: as ``--device``; each process has a device of its own.

    Raises:
        ConfigError: there are more processes on this machine than GPUs.
    """
    if not _is_one_of_several() or _stores:
        return
    import torch
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    on_cuda = device != "cpu" and torch.cuda.is_available()
    if on_cuda:
        index, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if index >= there:
            raise ConfigError(
                f"this machine has {there} GPUs: pass --nproc-per-node no more than that, or --device cpu"
            )
        torch.cuda.set_device(index)
    store, rank, size = next(iter(rendezvous("env://")))
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    _stores.append(store)


def leave() -> None:
    """Leave the other processes, if they were joined."""
    if _stores:
        from torch import distributed

        _stores.clear()
        distributed.destroy_process_group()


def says_what_failed() -> bool:
    """Whether this process is the one to say why the run ends: the first one that finds out."""
    if not _stores:
        return is_first()
    try:
        return bool(_stores[0].add(_FAILED, 1) == 1)
    except RuntimeError:  # nobody is there any more
        return is_first()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What all processes do at the same time.

    Raises:
        LostProcessError: another one is not there any more.
    """
    try:
        yield
    except RuntimeError as error:
        if size() == 1 or not any(word in str(error).lower() for word in ("connection", "gloo", "nccl", "timed out")):
            raise
        raise LostProcessError(
            "another process of this run ended, or hangs: start it again, a conversion or a sweep with --resume"
        ) from None


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """As if there were no other process, within the context."""
    _alone.append(True)
    try:
        yield
    finally:
        _alone.pop()


def rank() -> int:
    """Number of this process, from 0."""
    from torch import distributed

    return distributed.get_rank() if size() > 1 else 0


def size() -> int:
    """How many processes there are."""
    from torch import distributed

    joined = not _alone and distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if joined else 1


def share(items: int) -> range:
    """Which of so many items are this process's: all of them come after those of the process before."""
    return range(items * rank() // size(), items * (rank() + 1) // size())


def of_first(value: T) -> T:
    """The first process's value. A tensor comes to the device of this one's; in other values tensors must be on the CPU."""
    if size() == 1:
        return value
    import torch
    from torch import distributed

    values: list[Any] = [value.cpu() if isinstance(value, torch.Tensor) else value]
    with together():
        distributed.broadcast_object_list(values, src=0)
    result: T = values[0].to(value.device) if isinstance(value, torch.Tensor) else values[0]
    return result


def of_all(value: T) -> list[T]:
    """All processes' values, in order; tensors in them must be on the CPU."""
    if size() == 1:
        return [value]
    from torch import distributed

    values: list[Any] = [None] * size()
    with together():
        distributed.all_gather_object(values, value)
    return values


def joined_rows(rows: Tensor) -> tuple[Tensor, slice]:
    """The rows (N, ...) of all processes, one process after the other, and where this one's are."""
    if size() == 1:
        return rows, slice(0, len(rows))
    import torch

    parts = of_all(rows.detach().cpu())
    begin = sum(map(len, parts[: rank()]))
    return torch.cat(parts).to(rows.device), slice(begin, begin + len(rows))


def total(values: Tensor) -> Tensor:
    """Sums over all processes, of any shape, on the CPU."""
    if size() == 1:
        return values
    from torch import distributed

    result = values.detach().cpu().clone()
    with together():
        distributed.all_reduce(result)
    return result


def weights(*counts: int) -> list[float]:
    """What a mean over so many of this process's items counts, where the mean over the processes is that over all items."""
    if size() == 1:
        return [1.0] * len(counts)
    import torch

    all_counts = total(torch.tensor(counts)).tolist()
    return [count * size() / max(n, 1) for count, n in zip(counts, all_counts, strict=True)]


def mean(values: Tensor) -> float:
    """The mean of the values (N,) of all processes, which may have different numbers of them; not a number of none."""
    if size() == 1:
        return float(values.mean()) if len(values) else math.nan
    import torch

    added, count = total(torch.tensor([float(values.double().sum()), len(values)], dtype=torch.float64)).tolist()
    return float(added / count) if count else math.nan


def largest(*values: int) -> list[int]:
    """The largest of all processes' values, each for itself."""
    if size() == 1:
        return list(values)
    import torch
    from torch import distributed

    result = torch.tensor(values)
    with together():
        distributed.all_reduce(result, op=distributed.ReduceOp.MAX)
    return [int(value) for value in result]
