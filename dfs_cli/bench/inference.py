"""The time of inference: dense and dynamic, in PyTorch and in ONNX Runtime, measured in turns within one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from dfs_cli.bench.candidates import DENSE_OF, Candidate, Step, deciding_seconds, list_candidates
from dfs_cli.bench.clock import check_repeats, in_turns, on_threads, percentiles
from dfs_cli.bench.process import added_memory, peak_bytes, size_of
from dfs_cli.bench.workload import Workload
from dfs_cli.observer import Observer
from dfs_cli.validation import Json

_WARM_UP = 3
_LARGE_EVERY = 4  # one batch per this many single images, as it takes longer
# Seconds for which a candidate runs untimed before each measurement: cores wake up, the threads of the previous candidate,
# which wait busily for some 15 ms, come to rest, and the caches fill with the candidate's weights.
_UNTIMED = 0.03


class Run(NamedTuple):
    """Seconds of a run, and of deciding within it."""

    seconds: float
    deciding: float


@dataclass(frozen=True)
class Row(Json):
    """The measurements of one candidate.

    Args:
        name, batch: of the candidate; images per run.
        p50_ms, p25_ms, p75_ms, p95_ms: percentiles over the runs, in milliseconds.
        controller_ms: mean time of deciding in a run, in milliseconds; None where it is not observed.
        runs: how many were timed.
        images_per_second: from the median.
        peak_bytes: peak memory, as PyTorch counts it, or the growth of the process with ONNX Runtime; None: unknown.
        file_bytes: size of its file.
        cost: mean cost of an image, as a fraction of the dense network's.
        speedup: images per second relative to each other candidate of this batch size, by its name.
        time: share of the dense network's time in the same runtime.
    """

    name: str
    batch: int
    p50_ms: float
    p25_ms: float
    p75_ms: float
    p95_ms: float
    controller_ms: float | None
    runs: int
    images_per_second: float
    peak_bytes: int | None
    file_bytes: int
    cost: float
    speedup: dict[str, float]
    time: float


@dataclass(frozen=True)
class InferenceBench(Json):
    """All candidates, and how they were measured.

    Args:
        rows: one for each.
        threads, cores: on which all ran; 0 cores: unknown.
        repeats: rounds.
        options, gate: of the dynamic network.
        image_size: (C, H, W).
        images: number of different images.
        decisions: where they come from, for people.
        graph: facts about the dynamic network's graph: its ``features``, int8 or float, and, where there are real images,
            its comparison with the network; None: ONNX Runtime is not installed.
    """

    rows: tuple[Row, ...]
    threads: int
    cores: int
    repeats: int
    options: tuple[int, ...]
    gate: str
    image_size: tuple[int, ...]
    images: int
    decisions: str
    graph: dict[str, Any] | None


@torch.inference_mode()
def bench_inference(
    workload: Workload, threads: int, repeats: int = 50, observer: Observer | None = None
) -> InferenceBench:
    """Time all candidates, in turns.

    Args:
        threads: for PyTorch and for ONNX Runtime; the process keeps to as many cores.
        repeats: rounds; in each, every candidate for single images runs once, those for batches in every fourth.
        observer: told about progress.

    Raises:
        ConfigError: ``threads`` or ``repeats`` is below 1.
    """
    check_repeats(repeats)
    observer = observer or Observer()
    with on_threads(threads) as cores:
        observer.stage("preparing", None)
        candidates, graph = list_candidates(workload, threads)
        prepared = [_prepare(workload, candidate) for candidate in candidates]
        observer.stage("rounds", _WARM_UP + repeats)
        runs = in_turns(
            [_measure(workload, c, step) for c, (step, _) in zip(candidates, prepared, strict=True)],
            repeats,
            _WARM_UP,
            [1 if candidate.batch == 1 else _LARGE_EVERY for candidate in candidates],
            observer.advance,
        )
    return InferenceBench(
        rows=make_rows(candidates, runs, [peak for _, peak in prepared]),
        threads=threads,
        cores=cores,
        repeats=repeats,
        options=workload.network.bits,
        gate=workload.gate,
        image_size=tuple(workload.images.shape[1:]),
        images=len(workload.images),
        decisions=workload.decisions,
        graph=graph,
    )


def _images(workload: Workload, batch: int, turn: int) -> Tensor:
    """The images (N, C, H, W) of a turn: the same for all candidates of a batch size."""
    total = len(workload.images)
    if batch == 1:
        return workload.images[turn % total : turn % total + 1]
    return workload.images[[(turn * batch + i) % total for i in range(batch)]]


def _prepare(workload: Workload, candidate: Candidate) -> tuple[Step, int | None]:
    """The function that runs the candidate, and its peak memory in bytes; None: unknown."""
    images = _images(workload, candidate.batch, 0)
    if not candidate.in_pytorch:
        return added_memory(candidate.build, lambda step: step(images))
    step = candidate.build()
    step(images)
    return step, size_of(cast(nn.Module, step)) + peak_bytes(lambda: step(images), torch.device("cpu"))


def _measure(workload: Workload, candidate: Candidate, step: Step) -> Callable[[int], Run]:
    """A function that measures the run of a turn."""

    def run(turn: int) -> Run:
        images = _images(workload, candidate.batch, turn)
        began = time.perf_counter()
        while time.perf_counter() - began < _UNTIMED:
            step(images)
        before, began = deciding_seconds(step), time.perf_counter()
        step(images)
        seconds = time.perf_counter() - began
        return Run(seconds, deciding_seconds(step) - before)

    return run


def make_rows(
    candidates: Sequence[Candidate], runs: Sequence[Sequence[Run]], peaks: Sequence[int | None]
) -> tuple[Row, ...]:
    """A row for each candidate, compared with the others of its batch size."""
    rows = [_row(*measured) for measured in zip(candidates, runs, peaks, strict=True)]
    return tuple(_compared(row, [other for other in rows if other.batch == row.batch]) for row in rows)


def _row(candidate: Candidate, runs: Sequence[Run], peak: int | None) -> Row:
    values = percentiles([1000 * run.seconds for run in runs])
    deciding = [1000 * run.deciding for run in runs]
    return Row(
        name=candidate.name,
        batch=candidate.batch,
        p50_ms=values[49],
        p25_ms=values[24],
        p75_ms=values[74],
        p95_ms=values[94],
        # The mean: a median would hide deciding if most images need little of it.
        controller_ms=statistics.fmean(deciding) if any(deciding) else None,
        runs=len(runs),
        images_per_second=1000 * candidate.batch / values[49],
        peak_bytes=peak,
        file_bytes=candidate.size,
        cost=candidate.cost,
        speedup={},
        time=1.0,
    )


def _compared(row: Row, rows: Sequence[Row]) -> Row:
    speedup = {other.name: other.p50_ms / row.p50_ms for other in rows if other is not row}
    dense = speedup.get(DENSE_OF.get(row.name, ""))
    return replace(row, speedup=speedup, time=1.0 if dense is None else 1 / dense)
