"""What a network's parts cost on the target runtime: fitted to whole graphs of different policies, measured in turns."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dfs_cli.bench.clock import Lap, in_turns, on_threads
from dfs_cli.bench.cost_fit import BlockCosts, Deciding, largest_error
from dfs_cli.bench.machine import describe_machine
from dfs_cli.bench.workload import size_of_images, untuned_network
from dfs_cli.config import DynamicConfig, GateKind
from dfs_cli.control.base import controller_of
from dfs_cli.control.threshold import ALWAYS_REFINE, NEVER_REFINE
from dfs_cli.cost.decisions import NOT_RUN, Decisions
from dfs_cli.cost.device import DeviceCosts, ViewCosts
from dfs_cli.export.runtime import require_onnx
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.observer import Observer
from dfs_cli.presets import FULL_BITS
from dfs_cli.surgery.plan import plan_costs, plan_surgery

SMALLER = (0.75, 0.625)
"""Scales of smaller images that a first pass may see: the multiplications are 0.56 and 0.39 of those of the full size."""

_IMAGES = 8  # random: times do not depend on what they show, once decisions are forced
_PER_UNKNOWN, _CHECKED = 2.5, 12  # policies for each unknown of the fit, and policies that are not in it
_DECIDING = 16  # policies from which the time of deciding is found; half as many are not in that fit
# Bytes of graphs in memory at a time: the more there are, the longer the time over which each is measured.
_LARGEST = 1 << 29
_ROUNDS, _RUNS, _SECONDS = 12, 3, 0.015  # in each round a graph runs so many times, and so long, at least
_UNTIMED = 0.005
# Operating points at which no image takes the second pass, once after one that took it and once not, and every image.
_REFINE = (NEVER_REFINE, NEVER_REFINE, ALWAYS_REFINE)


class Measured(NamedTuple):
    """Decisions, for one image each, and the seconds that graphs with them took, (N,)."""

    decisions: Decisions
    seconds: list[float]


Run = tuple[Tensor, float]
"""The bitwidths (1, P * L) that a graph gave, empty where it decides nothing, and its seconds."""


class Job(NamedTuple):
    """A graph to be timed.

    Args:
        build: gives it, serialised.
        points: operating points to run it at, one after the other, over and over; None: its own.
    """

    build: Callable[[], bytes]
    points: tuple[float | None, ...] = (None,)


@torch.inference_mode()
def measure_costs(
    model: nn.Module,
    dynamic: DynamicConfig,
    input_size: tuple[int, int, int],
    gates: Sequence[GateKind] = (),
    threads: int = 1,
    name: str = "",
    seed: int = 0,
    observer: Observer | None = None,
) -> DeviceCosts:
    """Measure what the parts of ``model`` take in ONNX Runtime, one image at a time.

    Args:
        dynamic: options whose costs are measured; skipping is always one.
        input_size: (C, H, W).
        gates: the time of deciding is measured for these.
        threads: of ONNX Runtime.
        name: of the model, for people.
        seed: of the policies.
        observer: told about progress.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
        UnsupportedModelError: the model cannot be converted.

    Example:
        >>> import dfs_cli
        >>> model = dfs_cli.load_model("resnet20_digits")
        >>> costs = dfs_cli.measure_costs(model, dfs_cli.DynamicConfig(bits=(0, 8), gate="static"), (1, 8, 8))
        >>> costs.unit, costs.options, len(costs.blocks)
        ('ms', (0, 8), 9)
    """
    require_onnx()
    from dfs_cli.export.baselines import export_dense, quantize_dense

    observer = observer or Observer()
    options = tuple(sorted({0, *dynamic.bits}))
    images = torch.randn(_IMAGES, *input_size, generator=torch.Generator().manual_seed(seed))
    with on_threads(threads):
        observer.stage("graphs for the cost table", None)
        settings = dynamic.replace(bits=options, gate="ff", mirror=False, first_view=None)
        network = _network(model, settings, images)
        kinds = _kinds(network, images)
        dense = export_dense(model, input_size)
        clock = Clock(dense, images[:1], threads)
        static = Job(lambda: quantize_dense(dense, images))
        costs, error, (int8,) = _of_one_pass(
            network, input_size, BlockCosts(kinds, options), seed, clock, observer, (static,)
        )
        table = DeviceCosts(
            model=name or type(model).__name__,
            image_size=input_size,
            unit="ms",
            measured=True,
            machine=describe_machine() | {"runtime": "ONNX Runtime, single images", "threads": str(threads)},
            options=options,
            blocks=_by_block(network, costs),
            fixed=1000 * costs.fixed,
            dense=1000 * clock.dense,
            static_int8=1000 * int8,
            error=error,
        )
        if "probe" in gates and FULL_BITS not in (*options, dynamic.fixed_bits):
            for scale in SMALLER:
                looks = _network(model, settings.replace(gate="probe", first_view=scale), images)
                smaller, error, _ = _of_one_pass(looks, input_size, BlockCosts(kinds, options), seed, clock, observer)
                view = ViewCosts(scale, _by_block(network, smaller), 1000 * smaller.fixed)
                table = table.replace(smaller=(*table.smaller, view), error=max(table.error or 0.0, error))
        # The fewer options there are, the less is decided: those that the planner leaves out do not count.
        kept = table.useful(options)
        for gate in gates:
            if gate == "static":
                continue
            settings = dynamic.replace(bits=kept, gate=gate, alike=gate == "probe", first_view=None)
            found, error = _deciding(model, settings, images, costs.narrowed(kept), clock, observer)
            passes = tuple((1000 * always, 1000 * per_block) for always, per_block in found.passes)
            table = table.replace(
                deciding=table.deciding | {gate: passes},
                crowding=max(table.crowding, found.crowding),  # of the one gate with two passes
                error=max(table.error or 0.0, error),
            )
    return table


def _of_one_pass(
    network: DynamicResNet,
    input_size: tuple[int, int, int],
    costs: BlockCosts,
    seed: int,
    clock: Clock,
    observer: Observer,
    others: Sequence[Job] = (),
) -> tuple[BlockCosts, float, list[float]]:
    """Fit the costs of blocks in the first pass of ``network``, nothing decided.

    Args:
        costs: to be fitted.
        others: graphs that are timed beside them.

    Returns:
        The costs, the largest error of predictions for policies that they were not fitted to, and the other graphs' seconds.
    """
    from dfs_cli.export.part_writer import PartWriter
    from dfs_cli.export.parts import Parts
    from dfs_cli.export.write import serialise

    write = functools.partial(serialise, PartWriter(Parts(network, input_size)))
    count = round(_PER_UNKNOWN * costs.unknowns)
    policies = costs.draw(count + _CHECKED, seed)
    jobs = [Job(lambda p=p: write(Decisions.of_pass(p[None]))) for p in policies]  # type: ignore[misc]
    seconds = [times[0][1] for times in clock.measure([*jobs, *others], observer)]
    costs.fit(policies[:count], seconds[:count])
    predicted = costs.predict(Decisions.of_pass(policies[count:])).sum(axis=1).tolist()
    return costs, largest_error(predicted, seconds[count : len(policies)]), seconds[len(policies) :]


def _by_block(network: DynamicResNet, costs: BlockCosts) -> dict[str, tuple[float, ...]]:
    """Milliseconds of each option of each block, by the block's name."""
    rows = zip(network.blocks, costs.of_blocks(), strict=True)
    return {block.name: tuple(1000 * cost for cost in row) for block, row in rows}


def _network(model: nn.Module, dynamic: DynamicConfig, images: Tensor) -> DynamicResNet:
    """``model`` made dynamic, without tuning, as it would be exported."""
    plan = plan_surgery(model)
    return untuned_network(model, dynamic, plan_costs(model, dynamic, size_of_images(images), plan), plan, images)


def _kinds(network: DynamicResNet, images: Tensor) -> list[str]:
    """What tells blocks apart that differ in their work: their layers, and the shape of their input."""
    kinds: list[str] = []
    x = network.layout.stem(network.backbone, images[:1])
    for block in network.blocks:
        kinds.append(f"{tuple(x.shape)} {block.module!r}")
        x = block.skip(block.module, x)
    return kinds


def _deciding(
    model: nn.Module,
    dynamic: DynamicConfig,
    images: Tensor,
    costs: BlockCosts,
    clock: Clock,
    observer: Observer,
) -> tuple[Deciding, float]:
    """What a gate takes, and the largest error of predictions for graphs that were not in the fit."""
    from dfs_cli.export.part_writer import PartWriter
    from dfs_cli.export.parts import Parts
    from dfs_cli.export.write import serialise

    network = _network(model, dynamic, images)
    controller = controller_of(network)
    writer = PartWriter(Parts(network, size_of_images(images)))
    graphs = _DECIDING + _DECIDING // 2
    # For one pass each, and another one where there are two.
    policies = costs.draw(len(dynamic.bits) + 2 * graphs, seed=1)[len(dynamic.bits) :].split(2)

    def forced(policies: Tensor) -> bytes:
        controller.force(policies)
        return serialise(writer)

    points = _REFINE if len(controller.views) > 1 else (None,)
    jobs = [Job(lambda p=p: forced(p), points) for p in policies]  # type: ignore[misc]
    times = clock.measure(jobs, observer)
    # Each graph was timed at every operating point: whole graphs are in the fit, or not.
    fitted, others = (
        _measured(part, dynamic.bits, len(controller.views)) for part in (times[:_DECIDING], times[_DECIDING:])
    )
    found = Deciding(costs, *fitted)
    return found, largest_error(found.predict(others.decisions).tolist(), others.seconds)


def _measured(times: Sequence[Sequence[Run]], bits: tuple[int, ...], passes: int) -> Measured:
    """What graphs decided, and how long they took.

    Of two passes the first one needs more time after a second one, which leaves little of its weights in the caches: that is a
    cost of the second one.
    """
    runs = [run for graph in times for run in (_with_cold_caches(*graph) if passes > 1 else graph)]
    options = torch.tensor([[NOT_RUN if b < 0 else bits.index(b) for b in chosen[0].tolist()] for chosen, _ in runs])
    return Measured(Decisions(options.reshape(len(options), passes, -1)), [seconds for _, seconds in runs])


def _with_cold_caches(after_both: Run, one: Run, both: Run) -> tuple[Run, Run]:
    chosen, seconds = both
    return one, (chosen, seconds + max(0.0, after_both[1] - one[1]))


class Clock:
    """Times graphs in turns, the dense network's among them. A graph's time is its least: whatever another program does to
    caches and cores makes it longer, never shorter.

    Args:
        dense: the dense network's graph, serialised.
        image: (1, C, H, W).
        threads: of ONNX Runtime.
    """

    def __init__(self, dense: bytes, image: Tensor, threads: int) -> None:
        self._image, self._threads = image, threads
        self._dense = self._open(dense, (None,))
        self.dense = math.inf
        """Seconds of the dense network."""

    def measure(self, jobs: Sequence[Job], observer: Observer) -> list[list[Run]]:
        """For each graph and each of its operating points, what it gave."""
        observer.stage("timing graphs", len(jobs))
        results: list[list[Run]] = []
        opened: list[list[Callable[[], Tensor]]] = []
        size = 0
        for index, job in enumerate(jobs):
            content = job.build()
            opened.append(self._open(content, job.points))
            size += len(content)
            if size > _LARGEST or index == len(jobs) - 1:
                results += self._in_turns(opened)
                observer.advance(len(opened))
                opened, size = [], 0
        return results

    def _in_turns(self, opened: Sequence[Sequence[Callable[[], Tensor]]]) -> list[list[Run]]:
        measures = [lambda turn, runs=runs: least_seconds(runs, self._threads) for runs in [self._dense, *opened]]
        (dense,), *others = (list(map(min, *rounds)) for rounds in in_turns(measures, _ROUNDS, 1))
        self.dense = min(self.dense, dense)
        return [
            [(run(), least) for run, least in zip(runs, found, strict=True)]
            for runs, found in zip(opened, others, strict=True)
        ]

    def _open(self, content: bytes, points: Sequence[float | None]) -> list[Callable[[], Tensor]]:
        """Functions that run a graph at each of ``points``, and return the bitwidths that it chose."""
        import numpy as np

        from dfs_cli.export.network import BITS, IMAGES, LOGITS, OPERATING_POINT
        from dfs_cli.export.runtime import open_session

        session = open_session(content, self._threads)
        names = [output.name for output in session.get_outputs()]
        wanted = [LOGITS, BITS] if BITS in names else [LOGITS]

        def run(point: float | None) -> Tensor:
            inputs = {IMAGES: self._image.numpy()}
            if point is not None:
                inputs[OPERATING_POINT] = np.array(point)
            results = session.run(wanted, inputs)
            return torch.from_numpy(results[1]) if len(results) > 1 else torch.empty(0)

        return [functools.partial(run, point) for point in points]


def least_seconds(runs: Sequence[Callable[[], object]], threads: int) -> list[float]:
    """The least seconds of each of ``runs``, which take turns, once the caches hold what they need."""
    began = time.perf_counter()
    while True:
        for run in runs:
            run()
        if time.perf_counter() - began >= _UNTIMED:
            break
    rounds: list[list[float]] = []
    began = time.perf_counter()
    while len(rounds) < _RUNS or time.perf_counter() - began < _SECONDS:
        rounds.append([Lap(run, threads).seconds for run in runs])
    return [min(laps) for laps in zip(*rounds, strict=True)]
