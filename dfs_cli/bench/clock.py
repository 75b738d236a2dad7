"""Timing: candidates are measured in turns within one run, and compared by medians and quartiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from dfs_cli.bench.process import interruptions
from dfs_cli.ranges import check_range

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Median and quartiles of several runs, in seconds."""

    median: float
    low: float
    high: float


@contextmanager
def on_threads(threads: int) -> Iterator[None]:
    """Run PyTorch on ``threads`` threads within the context. The system chooses their cores: a thread that is pinned to one
    waits there for another program while others are free.

    Raises:
        ConfigError: ``threads`` is out of range.
    """
    check_range("threads", threads, 1, 1024)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_turns(
    measures: Sequence[Callable[[int], T]],
    repeats: int,
    warm_up: int,
    on_round: Callable[[int], None] = lambda rounds: None,
) -> list[list[T]]:
    """Call all ``measures`` in every round, one after the other: a temporary slowdown of the machine affects all of them.

    Args:
        measures: each gets the number of the round, from 0, and returns what it measured.
        repeats: rounds that count.
        warm_up: rounds before these, with negative numbers, whose results are dropped.
        on_round: called with 1 after each round.

    Returns:
        What each measure returned, in the rounds that count.

    Raises:
        ConfigError: ``repeats`` is out of range.
    """
    check_repeats(repeats)
    results: list[list[T]] = [[] for _ in measures]
    for turn in range(-warm_up, repeats):
        for measure, measured in zip(measures, results, strict=True):
            result = measure(turn)
            if turn >= 0:
                measured.append(result)
        on_round(1)
    return results


def check_repeats(repeats: int) -> None:
    """Raises ConfigError where ``repeats`` is out of range."""
    check_range("repeats", repeats, 1, 10**6)


class Lap(Generic[T]):
    """A run of ``step``, timed: its ``result``, the ``seconds`` that it took, and whether another program had the core
    meanwhile (``interrupted``).

    An interrupted run of one thread counts with the time that the thread had a core: what it takes on a machine that does
    nothing else. Of several threads that wait for one another, that cannot be told.

    Args:
        threads: on which ``step`` runs.
    """

    def __init__(self, step: Callable[[], T], threads: int) -> None:
        count, had_core, began = interruptions(), time.thread_time(), time.perf_counter()
        self.result = step()
        self.seconds, had_core = time.perf_counter() - began, time.thread_time() - had_core
        self.interrupted = interruptions() > count
        if self.interrupted and threads == 1:
            self.seconds = min(self.seconds, had_core)


def seconds_of(step: Callable[[], object], device: torch.device) -> float:
    """Seconds that ``step`` takes, including the work that it starts on an accelerator."""
    _synchronise(device)
    began = time.perf_counter()
    step()
    _synchronise(device)
    return time.perf_counter() - began


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def percentiles(values: Sequence[float]) -> list[float]:
    """The 1st to the 99th percentile; of a single value always that value."""
    return statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else [*values] * 99


def quartiles(seconds: Sequence[float]) -> Timing:
    """Median and quartiles of ``seconds``."""
    values = percentiles(seconds)
    return Timing(median=statistics.median(seconds), low=values[24], high=values[74])
