"""How this process keeps memory."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's <malloc.h>
_LARGE = (1 << 31) - 1
_MOST_KEPT = 1 << 26  # bytes of a tensor
_MOST_KEPT_OF_VARIED = 1 << 24


def keep_freed_memory(varied: bool = False) -> None:
    """Let freed tensors' memory serve the next ones, instead of going back to the system and coming back zeroed.

    A tuning step makes and frees hundreds of large tensors; fetching each from the system anew took a fifth of the step's time
    (ResNet-50, two cores). The largest tensors go back all the same: between others, the holes that they leave fill up, and a
    process grew to three times what it used. Does nothing where the C library is not glibc.

    Args:
        varied: tensors are of many sizes, which fit into each other's places badly: fewer of them stay.
    """
    most = _MOST_KEPT_OF_VARIED if varied else _MOST_KEPT
    # Some glibc take no threshold above 32 MiB; without one, the other setting would make matters worse.
    if _glibc("mallopt", _MMAP_THRESHOLD, most) or _glibc("mallopt", _MMAP_THRESHOLD, _MOST_KEPT // 2):
        _glibc("mallopt", _TRIM_THRESHOLD, _LARGE)


def return_freed_memory() -> None:
    """Give freed memory back to the system: the next stage of a run needs tensors of other sizes."""
    _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> int:
    """The result of a function of the C library; 0 where there is none of this name."""
    try:
        return int(getattr(ctypes.CDLL(None), function)(*arguments))
    except (OSError, AttributeError, TypeError):
        return 0
