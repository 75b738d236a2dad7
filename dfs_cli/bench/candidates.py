"""The ways to run a network that are compared: dense and dynamic, in PyTorch and in ONNX Runtime."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from dfs_cli.artifact.packing import packed_tensors
from dfs_cli.bench.process import bytes_of
from dfs_cli.bench.workload import Workload, size_of_images
from dfs_cli.cost.decisions import Decisions
from dfs_cli.export.runtime import has_onnx
from dfs_cli.freeze.batchnorm import fold_norms
from dfs_cli.nn.network import Choose, DynamicResNet
from dfs_cli.nn.passes import FULL_VIEW, Output, TuningTarget, View
from dfs_cli.presets import BatchSize
from dfs_cli.ranges import BATCH_SIZES, LARGE_BATCH

OWN, INT8 = "ort-dfs", "ort-int8-static"
"""The names of the network that is measured, and of static int8, in ONNX Runtime."""

Step = Callable[[Tensor], Tensor]
"""From images (N, C, H, W) to logits (N, classes)."""


class Candidate(NamedTuple):
    """One way to run a network.

    Args:
        name: name of its row.
        batch: images per run.
        build: returns the function that runs it; called once.
        size: size of its file, in bytes.
        cost: mean cost of an image, as a fraction of the dense network's.
        workload: whose images it runs on.
        has_answers: whether its weights are meaningful, so that its answers are.
        in_pytorch: whether it is a module, whose memory PyTorch counts.
    """

    name: str
    batch: int
    build: Callable[[], Step]
    size: int
    cost: float
    workload: Workload
    has_answers: bool = True
    in_pytorch: bool = True


class ObservedNetwork(DynamicResNet):
    """A copy of a network that measures the time of its controller.

    ``deciding_seconds`` is the total time of runs outside the stem, the blocks and the head; it is valid on the CPU only.
    """

    def __init__(self, network: DynamicResNet) -> None:
        copied = copy.deepcopy(network)
        controller = cast(nn.Module, copied.controller)
        super().__init__(
            copied.backbone, copied.layout, copied.blocks, copied.fixed, copied.bits, controller, copied.features
        )
        self.deciding_seconds = 0.0

    def run(self, images: Tensor, decisions: Decisions | None = None, target: TuningTarget | None = None) -> Output:
        """See :meth:`dfs_cli.nn.network.DynamicResNet.run`."""
        began = time.perf_counter()
        output = super().run(images, decisions, target)
        self.deciding_seconds += time.perf_counter() - began
        return output

    def run_pass(
        self, images: Tensor, choose: Choose, explored: float = 0.0, view: View = FULL_VIEW
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`dfs_cli.nn.network.DynamicResNet.run_pass`."""

        def observed(block: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
            began = time.perf_counter()
            choice = choose(block, x)
            self.deciding_seconds += time.perf_counter() - began
            return choice

        began = time.perf_counter()
        result = super().run_pass(images, observed, explored, view)
        self.deciding_seconds -= time.perf_counter() - began
        return result


def list_candidates(
    workload: Workload,
    threads: int,
    rivals: Mapping[str, Workload] | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> tuple[list[Candidate], dict[str, Any] | None]:
    """All candidates that can run here, and facts about the dynamic network's graph; None without ONNX Runtime.

    Args:
        rivals: by name, other networks that are compared in ONNX Runtime.
        batch_sizes: images per run in ONNX Runtime, besides single ones.
    """
    candidates = _in_pytorch(workload)
    if not has_onnx():
        return candidates, None
    others, graph = _in_onnxruntime(workload, threads, rivals or {}, batch_sizes)
    return candidates + others, graph


def _in_pytorch(workload: Workload) -> list[Candidate]:
    dense, network = workload.dense.eval(), workload.network
    weights, size = bytes_of(dense.state_dict().values()), workload.file_size
    if size is None:
        size = bytes_of(packed_tensors(network).values())

    def build_dynamic() -> Step:
        return fold_norms(ObservedNetwork(network).eval())

    build_dense, known = functools.partial(copy.deepcopy, dense), workload.is_original
    return [
        *(Candidate("pytorch-dense", b, build_dense, weights, 1.0, workload, known) for b in (1, LARGE_BATCH)),
        Candidate("pytorch-dfs", 1, build_dynamic, size, workload.cost, workload),
        Candidate("pytorch-dfs", LARGE_BATCH, build_dynamic, size, workload.batch_cost, workload),
    ]


def _in_onnxruntime(
    workload: Workload, threads: int, rivals: Mapping[str, Workload], batch_sizes: Sequence[int]
) -> tuple[list[Candidate], dict[str, Any]]:
    from dfs_cli.export.baselines import export_dense, quantize_dense

    def candidate(name: str, model: bytes, cost: float, of: Workload = workload, known: bool = True) -> Candidate:
        build = functools.partial(open_step, model, threads)
        return Candidate(name, 1, build, len(model), cost, of, known, in_pytorch=False)

    size = size_of_images(workload.images)

    def candidates(batch: BatchSize, dynamic: bytes) -> list[Candidate]:
        """Those whose graphs take ``batch`` images at once."""
        dense = export_dense(workload.dense, size, batch)
        int8 = quantize_dense(dense, workload.calibration)
        own = [
            candidate("ort-fp32", dense, 1.0, known=workload.is_original),
            candidate(INT8, int8, workload.table.uniform_cost(8), known=workload.is_original),
            candidate(OWN, dynamic, workload.cost),
        ]
        return own + [candidate(name, _graph(rival, batch), rival.cost, rival) for name, rival in rivals.items()]

    dynamic, graph = dynamic_graph(workload)
    alone, sizes = candidates(1, dynamic), sorted({*batch_sizes} - {1})
    together = candidates("dynamic", _graph(workload, "dynamic")) if sizes else []
    return alone + [one._replace(batch=batch) for batch in sizes for one in together], graph


def _graph(workload: Workload, batch: BatchSize) -> bytes:
    """The dynamic network's graph for ``batch`` images at once."""
    from dfs_cli.export.part_writer import PartWriter
    from dfs_cli.export.parts import Parts
    from dfs_cli.export.write import serialise

    return serialise(PartWriter(Parts(workload.network, size_of_images(workload.images), batch)))


def open_step(model: bytes, threads: int) -> Step:
    """The function that runs a serialised graph."""
    from dfs_cli.export.network import IMAGES, LOGITS
    from dfs_cli.export.runtime import open_session

    session = open_session(model, threads)

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run([LOGITS], {IMAGES: images.numpy()})
        return torch.from_numpy(logits)

    return run


def dynamic_graph(workload: Workload) -> tuple[bytes, dict[str, Any]]:
    """The dynamic network's graph as ``dfs export`` writes it, and facts about it: the type of its features and, on real
    images, the comparison with the network."""
    from dfs_cli.export.part_writer import PartWriter
    from dfs_cli.export.parts import Parts
    from dfs_cli.export.write import make_graph, serialise

    size = size_of_images(workload.images)
    if workload.targets is not None:
        content, comparison = make_graph(workload.network, size, workload.batches(), labelled=True)
        return content, comparison.to_dict() | {"holds": comparison.holds}
    writer = PartWriter(Parts(workload.network, size))
    return serialise(writer), {"features": writer.features}


def deciding_seconds(step: Step) -> float:
    """Seconds that the controller of ``step`` has taken so far; 0 where it is not observed."""
    return step.deciding_seconds if isinstance(step, ObservedNetwork) else 0.0
