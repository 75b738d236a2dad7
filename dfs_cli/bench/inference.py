"""The time of inference: dense and dynamic, in PyTorch and in ONNX Runtime, measured in turns within one run."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from dfs_cli.bench.candidates import INT8, OWN, Candidate, Step, deciding_seconds, list_candidates
from dfs_cli.bench.clock import Lap, check_repeats, in_turns, on_threads, percentiles
from dfs_cli.bench.machine import describe_machine
from dfs_cli.bench.process import added_memory, peak_bytes, size_of
from dfs_cli.bench.verdict import Measured, Verdict, judge
from dfs_cli.bench.workload import Workload, size_of_images
from dfs_cli.observer import Observer
from dfs_cli.ranges import BATCH_SIZES, LARGE_BATCH, check_batch_sizes
from dfs_cli.validation import Json

_WARM_UP = 1
# Seconds for which a candidate runs untimed before each of its turns, like a server at work: cores are awake, threads of the
# previous candidate have come to rest, and the caches hold the candidate's weights.
_UNTIMED = 0.03


class Run(NamedTuple):
    """One run of a candidate.

    Args:
        seconds: that it took.
        deciding: of these, for deciding.
        answers: the classes that its images were given.
        interrupted: whether another program had the core for a while.
    """

    seconds: float
    deciding: float
    answers: tuple[int, ...]
    interrupted: bool = False


@dataclass(frozen=True)
class Row(Json):
    """The measurements of one candidate. Times are of a run, which has ``batch`` images, in milliseconds.

    Args:
        name, batch: of the candidate; images per run.
        mean_ms, p50_ms, p95_ms, p99_ms: mean and percentiles over the images (or batches); each counts with the median of its
            runs, so that the network's own spread is seen, not that of a machine that serves other programs, too.
        low_ms, high_ms: the least and the largest mean, of this one and of single passes: how steady the machine was.
        controller_ms: mean time of deciding in a run; None where it is not observed.
        runs: how many were timed.
        interrupted: share of them during which another program had the core, see :class:`dfs_cli.bench.clock.Lap`.
        images_per_second: from the mean.
        peak_bytes: peak memory, as PyTorch counts it, or the growth of the process with ONNX Runtime; None: unknown.
        file_bytes: size of its file.
        cost: mean cost of an image, as a fraction of the dense network's.
        top1: percent of the images that it answered right while it was timed; None: classes or weights are not known.
        speedup: images per second relative to each other candidate of this batch size, by its name.
        time: share of the dense network's time in the same runtime.
    """

    name: str
    batch: int
    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    low_ms: float
    high_ms: float
    controller_ms: float | None
    runs: int
    interrupted: float
    images_per_second: float
    peak_bytes: int | None
    file_bytes: int
    cost: float
    top1: float | None
    speedup: dict[str, float]
    time: float


@dataclass(frozen=True)
class InferenceBench(Json):
    """All candidates, and how they were measured.

    Args:
        rows: one for each.
        threads: of both runtimes.
        repeats: passes over the images.
        options, gate: of the dynamic network.
        image_size: (C, H, W).
        images: number of different images.
        decisions: where they come from, for people.
        graph: facts about the dynamic network's graph: its ``features``, int8 or float, and, where there are real images,
            its comparison with the network; None: ONNX Runtime is not installed.
        machine: processor, system, and versions of the runtimes.
        verdicts: the dynamic network beside all others in ONNX Runtime, for single images and for each size of a batch; none
            where that is not installed.
    """

    rows: tuple[Row, ...]
    threads: int
    repeats: int
    options: tuple[int, ...]
    gate: str
    image_size: tuple[int, ...]
    images: int
    decisions: str
    graph: dict[str, Any] | None
    machine: dict[str, str]
    verdicts: tuple[Verdict, ...]


@torch.inference_mode()
def bench_inference(
    workload: Workload,
    threads: int,
    repeats: int = 3,
    rivals: Mapping[str, Workload] | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    observer: Observer | None = None,
) -> InferenceBench:
    """Time all candidates, in turns.

    Args:
        threads: for PyTorch and for ONNX Runtime.
        repeats: how often each image is timed. The images are divided into blocks; each candidate in turn runs a block, one
            image after the other or as a batch.
        rivals: by name, other networks that are compared in ONNX Runtime, on the same images.
        batch_sizes: images per run in ONNX Runtime, besides single ones: divisors of 64, so that every image is in one run.
        observer: told about progress.

    Raises:
        ConfigError: ``threads`` or ``repeats`` is below 1, or a batch has another size.
    """
    check_repeats(repeats)
    check_batch_sizes(batch_sizes)
    observer = observer or Observer()
    with on_threads(threads):
        observer.stage("preparing", None)
        candidates, graph = list_candidates(workload, threads, rivals, batch_sizes)
        prepared = [_prepare(candidate) for candidate in candidates]
        blocks = -(-len(workload.images) // LARGE_BATCH)
        observer.stage("blocks of images", _WARM_UP + repeats * blocks)
        turns = in_turns(
            [_measure(c, step, blocks, threads) for c, (step, _) in zip(candidates, prepared, strict=True)],
            repeats * blocks,
            _WARM_UP,
            observer.advance,
        )
    runs = [by_pass(measured, blocks) for measured in turns]
    return InferenceBench(
        rows=make_rows(candidates, runs, [peak for _, peak in prepared]),
        threads=threads,
        repeats=repeats,
        options=workload.network.bits,
        gate=workload.gate,
        image_size=size_of_images(workload.images),
        images=len(workload.images),
        decisions=workload.decisions,
        graph=graph,
        machine=describe_machine(),
        verdicts=make_verdicts(candidates, runs),
    )


def by_pass(turns: Sequence[Sequence[Run]], blocks: int) -> list[list[Run]]:
    """The runs of each pass over all images, from those of each turn; ``blocks`` turns make a pass."""
    passes = [turns[i : i + blocks] for i in range(0, len(turns), blocks)]
    return [[run for turn in one for run in turn] for one in passes]


def _prepare(candidate: Candidate) -> tuple[Step, int | None]:
    """The function that runs the candidate, and its peak memory in bytes; None: unknown."""
    images = candidate.workload.images[: candidate.batch]
    if not candidate.in_pytorch:
        return added_memory(candidate.build, lambda step: step(images))
    step = candidate.build()
    step(images)
    return step, size_of(cast(nn.Module, step)) + peak_bytes(lambda: step(images), torch.device("cpu"))


def _measure(candidate: Candidate, step: Step, blocks: int, threads: int) -> Callable[[int], list[Run]]:
    """A function that measures the candidate's runs of a turn."""
    images = candidate.workload.images

    def measure(turn: int) -> list[Run]:
        start = turn % blocks * LARGE_BATCH
        # Whole batches alone can be compared: the last one is filled up with the first images.
        firsts = range(start, min(start + LARGE_BATCH, len(images)), candidate.batch)
        inputs = [images[[(first + i) % len(images) for i in range(candidate.batch)]] for first in firsts]
        began, untimed = time.perf_counter(), itertools.cycle(inputs)
        while time.perf_counter() - began < _UNTIMED:
            step(next(untimed))
        return [_timed(step, batch, threads) for batch in inputs]

    return measure


def _timed(step: Step, images: Tensor, threads: int) -> Run:
    before = deciding_seconds(step)
    lap = Lap(lambda: step(images), threads)
    return Run(lap.seconds, deciding_seconds(step) - before, tuple(lap.result.argmax(dim=1).tolist()), lap.interrupted)


def make_rows(
    candidates: Sequence[Candidate], runs: Sequence[Sequence[Sequence[Run]]], peaks: Sequence[int | None]
) -> tuple[Row, ...]:
    """A row for each candidate, from its runs in each pass, compared with the others of its batch size."""
    rows = [_row(*measured) for measured in zip(candidates, runs, peaks, strict=True)]
    return tuple(_compared(row, [other for other in rows if other.batch == row.batch]) for row in rows)


def _row(candidate: Candidate, passes: Sequence[Sequence[Run]], peak: int | None) -> Row:
    seconds = _seconds(passes)
    typical = (1000 * seconds.median(dim=0).values).tolist()
    means = (1000 * seconds.mean(dim=1)).tolist()
    mean, values = statistics.fmean(typical), percentiles(typical)
    deciding = [1000 * run.deciding for runs in passes for run in runs]
    right = _right(candidate, passes)
    return Row(
        name=candidate.name,
        batch=candidate.batch,
        mean_ms=mean,
        p50_ms=values[49],
        p95_ms=values[94],
        p99_ms=values[98],
        low_ms=min(mean, *means),
        high_ms=max(mean, *means),
        controller_ms=statistics.fmean(deciding) if any(deciding) else None,
        runs=seconds.numel(),
        interrupted=statistics.fmean(run.interrupted for runs in passes for run in runs),
        images_per_second=1000 * candidate.batch / mean,
        peak_bytes=peak,
        file_bytes=candidate.size,
        cost=candidate.cost,
        top1=None if right is None else 100 * float(right.double().mean()),
        speedup={},
        time=1.0,
    )


def _seconds(passes: Sequence[Sequence[Run]]) -> Tensor:
    """The seconds of each run in each of R passes, (R, runs) in float64."""
    return torch.tensor([[run.seconds for run in runs] for runs in passes], dtype=torch.float64)


def _right(candidate: Candidate, passes: Sequence[Sequence[Run]]) -> Tensor | None:
    """(N,), whether the candidate answered right; None: classes or weights are not known."""
    targets = candidate.workload.targets
    if targets is None or not candidate.has_answers:
        return None
    answers = torch.tensor([answer for run in passes[0] for answer in run.answers])
    return answers[: len(targets)] == targets


def _compared(row: Row, rows: Sequence[Row]) -> Row:
    speedup = {other.name: other.mean_ms / row.mean_ms for other in rows if other is not row}
    dense = speedup.get("pytorch-dense" if row.name == "pytorch-dfs" else "ort-fp32")
    return replace(row, speedup=speedup, time=1.0 if dense is None or row.name == "pytorch-dense" else 1 / dense)


def make_verdicts(candidates: Sequence[Candidate], runs: Sequence[Sequence[Sequence[Run]]]) -> tuple[Verdict, ...]:
    """The dynamic network beside all others in ONNX Runtime, for each size of a batch in which it was measured there."""
    measured: dict[int, dict[str, Measured]] = {}
    for candidate, passes in zip(candidates, runs, strict=True):
        if not candidate.in_pytorch:
            found = Measured(_seconds(passes), _right(candidate, passes))
            measured.setdefault(candidate.batch, {})[candidate.name] = found
    return tuple(judge(OWN, found, INT8, batch) for batch, found in measured.items() if OWN in found)
