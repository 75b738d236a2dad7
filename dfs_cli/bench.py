"""What things cost on the clock: measured in turns within one run, given as ratios of medians."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from dfs_cli.config import DynamicConfig, Preprocessing, TuningConfig
from dfs_cli.errors import ConfigError
from dfs_cli.nn.probe import ProbedResNet
from dfs_cli.process import pinned_to
from dfs_cli.resolve import resolve_device
from dfs_cli.surgery.convert import fit_scales, plan_costs, to_dynamic
from dfs_cli.tuning.loop import Goal, tuning_step
from dfs_cli.tuning.plan import plan_passes
from dfs_cli.tuning.state import start_state

_WARM_UP = 2
_HELD_OUT, _VALIDATION = 5000, 50_000  # image counts that the plan supposes


class Timing(NamedTuple):
    """Seconds of one step: median and quartiles over the runs."""

    median: float
    low: float
    high: float


@contextmanager
def on_threads(threads: int) -> Iterator[int]:
    """PyTorch on ``threads`` threads, the process on as many cores, within the context; gives how many cores (0: not known)."""
    if threads < 1:
        raise ConfigError(f"threads {threads} is below 1")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pinned_to(threads) as cores:
            yield cores
    finally:
        torch.set_num_threads(before)


def bench_tuning(
    model: nn.Module,
    preprocessing: Preprocessing,
    dynamic: DynamicConfig,
    budget: float,
    tuning: TuningConfig,
    repeats: int = 10,
    on_repeat: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """One tuning step (forward, backward, update) against a step of fine-tuning the dense network, on random images.

    Both train all weights with AdamW at the same batch size, in the channels-last layout. The dense step is cross-entropy
    alone, with batch-norm in training mode; the tuning step includes the original's forward pass for distillation.

    Returns:
        ``time_ratio`` and ``memory_ratio`` (tuning over dense; of peak memory, with weights, optimizer and images), and
        what they are made of: seconds and bytes.
    """
    if repeats < 1:
        raise ConfigError(f"repeats {repeats} is below 1")
    device = resolve_device(tuning.device)
    teacher = copy.deepcopy(model).to(device).eval()
    table = plan_costs(model, dynamic, preprocessing.train_size)
    table.check_budget(budget)
    generator = torch.Generator().manual_seed(tuning.seed)
    images = torch.randn(tuning.batch_size, *preprocessing.train_size, generator=generator).to(device)
    targets = torch.randint(model.num_classes, (tuning.batch_size,), generator=generator).to(device)  # type: ignore[call-overload]
    network = to_dynamic(teacher, dynamic, table)
    fit_scales(network, images)
    goal = Goal(budget)
    if isinstance(network, ProbedResNet):
        # The fewer bits, the more damage: all that a plan of costs needs to know.
        damage = (1 - torch.tensor(table.options) / max(table.options)).square().repeat(len(table.blocks), 1)
        goal = plan_passes(network, table, damage, budget, _HELD_OUT, _VALIDATION)
    network.fit_gate(images)
    images = images.to(memory_format=torch.channels_last)
    teacher = teacher.to(memory_format=torch.channels_last)
    state = start_state(network.to(memory_format=torch.channels_last).train(), tuning, 10**6, 1)
    dense = copy.deepcopy(teacher).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-5)

    def dense_step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=tuning.amp):
            logits = dense(images)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def own_step() -> None:
        tuning_step(state, teacher, table, images, targets, goal, tuning)

    steps = {"dense": dense_step, "tuning": own_step}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(_WARM_UP + repeats):
        for name, step in steps.items():
            spent = _seconds(step, device)
            if i >= _WARM_UP:
                seconds[name].append(spent)
        on_repeat(i + 1)
    held = {
        "dense": size_of(dense, optimizer, images),
        "tuning": size_of(network, state.optimizer, images) + size_of(teacher),
    }
    memory = {name: held[name] + peak_bytes(step, device) for name, step in steps.items()}
    timings = {name: _timing(values) for name, values in seconds.items()}
    return {
        "time_ratio": timings["tuning"].median / timings["dense"].median,
        "memory_ratio": memory["tuning"] / memory["dense"],
        "dense_seconds": timings["dense"]._asdict(),
        "tuning_seconds": timings["tuning"]._asdict(),
        "dense_bytes": memory["dense"],
        "tuning_bytes": memory["tuning"],
        "batch_size": tuning.batch_size,
        "image_size": list(preprocessing.train_size),
        "options": list(table.options),
        "gate": dynamic.gate,
        "second_pass_share": goal.share,
        "repeats": repeats,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _timing(values: list[float]) -> Timing:
    if len(values) == 1:
        return Timing(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high)


def size_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, images: Tensor | None = None) -> int:
    """Bytes that stay from step to step."""
    tensors = [*model.parameters(), *model.buffers()]
    if optimizer is not None:
        tensors += [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
    if images is not None:
        tensors.append(images)
    return bytes_of(tensors)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """What ``tensors`` take."""
    return sum(t.numel() * t.element_size() for t in tensors)


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """The most bytes that a step holds at a time beyond what stays."""
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
