"""What the operating system knows of this process: its cores and its memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_STATUS, _RESET, _TASKS = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/self/task")


@contextlib.contextmanager
def pinned_to(cores: int) -> Iterator[int]:
    """Keep the process, with the threads that it has by now and those to come, to so many cores, where the system lets it;
    gives how many cores it may use (0: not known)."""
    if not hasattr(os, "sched_setaffinity"):
        yield 0
        return
    before = {0: os.sched_getaffinity(0)}
    kept = set(sorted(before[0])[:cores])
    for thread in _threads():
        with contextlib.suppress(OSError):
            before[thread] = os.sched_getaffinity(thread)
            os.sched_setaffinity(thread, kept)
    try:
        yield len(kept)
    finally:
        for thread in _threads():
            with contextlib.suppress(OSError):
                os.sched_setaffinity(thread, before.get(thread, before[0]))


def _threads() -> list[int]:
    """The process's threads; they may have ended when they are asked for."""
    try:
        return [int(task.name) for task in _TASKS.iterdir()]
    except OSError:
        return [0]


def added_memory(build: Callable[[], T], use: Callable[[T], object]) -> tuple[T, int | None]:
    """What ``build`` makes, and by how many bytes the process grew, at its peak, while it was made and used.

    None where the system does not tell. What was free before and is used again is not seen.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS") if _reset_peak() else None
    made = build()
    use(made)
    peak = _resident("VmHWM")
    return made, None if before is None or peak is None else max(0, peak - before)


def _reset_peak() -> bool:
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> int | None:
    """Bytes of a line of /proc/self/status."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)
