"""The cores and the memory of this process, as the system counts them."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

try:
    import resource
except ModuleNotFoundError:  # Windows has none
    resource = None  # type: ignore[assignment]

T = TypeVar("T")

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def interruptions() -> int:
    """How often the system has taken a core from this process for another program; 0 where it does not tell."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource is not None else 0


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """The size of ``tensors`` in bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def size_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, images: Tensor | None = None) -> int:
    """Bytes of the model, the optimizer's state and the images: they stay from step to step."""
    tensors = [*model.parameters(), *model.buffers()]
    if optimizer is not None:
        tensors += [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
    if images is not None:
        tensors.append(images)
    return bytes_of(tensors)


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The peak of the bytes in tensors during ``step``, beyond those before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def added_memory(build: Callable[[], T], use: Callable[[T], object]) -> tuple[T, int | None]:
    """The result of ``build``, and the peak growth of the process, in bytes, while it is built and used.

    The growth is None where the system does not report it. Free memory that is reused is not counted.
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
    """Bytes in a line of /proc/self/status."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)
