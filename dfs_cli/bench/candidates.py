"""The ways to run a network that are compared: dense and dynamic, in PyTorch and in ONNX Runtime."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from dfs_cli.artifact.packing import packed_tensors
from dfs_cli.bench.process import bytes_of
from dfs_cli.bench.workload import Workload
from dfs_cli.config import LARGE_BATCH
from dfs_cli.cost.decisions import Decisions
from dfs_cli.export.runtime import has_onnx
from dfs_cli.freeze.batchnorm import fold_norms
from dfs_cli.nn.network import Choose, DynamicResNet
from dfs_cli.nn.passes import Output, TuningTarget

DENSE_OF = {"pytorch-dfs": "pytorch-dense", "ort-dfs": "ort-fp32", "ort-int8-static": "ort-fp32"}
"""By the name of a candidate, the name of the dense network in the same runtime."""

Step = Callable[[Tensor], object]


class Candidate(NamedTuple):
    """One way to run the network.

    Args:
        name: name of its row.
        batch: images per run.
        build: returns the function that runs it; called once.
        size: size of its file, in bytes.
        cost: mean cost of an image, as a fraction of the dense network's.
        in_pytorch: whether it is a module, whose memory PyTorch counts.
    """

    name: str
    batch: int
    build: Callable[[], Step]
    size: int
    cost: float
    in_pytorch: bool = True


class ObservedNetwork(DynamicResNet):
    """A copy of a network that measures the time of its controller.

    ``deciding_seconds`` is the total time of runs outside the stem, the blocks and the head; it is valid on the CPU only.
    """

    def __init__(self, network: DynamicResNet) -> None:
        copied = copy.deepcopy(network)
        controller = cast(nn.Module, copied.controller)
        super().__init__(copied.backbone, copied.layout, copied.blocks, copied.fixed, copied.bits, controller)
        self.deciding_seconds = 0.0

    def run(self, images: Tensor, decisions: Decisions | None = None, target: TuningTarget | None = None) -> Output:
        """See :meth:`dfs_cli.nn.network.DynamicResNet.run`."""
        began = time.perf_counter()
        output = super().run(images, decisions, target)
        self.deciding_seconds += time.perf_counter() - began
        return output

    def run_pass(self, images: Tensor, choose: Choose, explored: float = 0.0) -> tuple[Tensor, Tensor]:
        """See :meth:`dfs_cli.nn.network.DynamicResNet.run_pass`."""

        def observed(block: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
            began = time.perf_counter()
            choice = choose(block, x)
            self.deciding_seconds += time.perf_counter() - began
            return choice

        began = time.perf_counter()
        result = super().run_pass(images, observed, explored)
        self.deciding_seconds -= time.perf_counter() - began
        return result


def list_candidates(workload: Workload, threads: int) -> tuple[list[Candidate], dict[str, Any] | None]:
    """All candidates that can run here, and facts about the dynamic network's graph; None without ONNX Runtime."""
    candidates = _in_pytorch(workload)
    if not has_onnx():
        return candidates, None
    others, graph = _in_onnxruntime(workload, threads)
    return candidates + others, graph


def _in_pytorch(workload: Workload) -> list[Candidate]:
    dense, network = workload.dense.eval(), workload.network
    weights, size = bytes_of(dense.state_dict().values()), workload.file_size
    if size is None:
        size = bytes_of(packed_tensors(network).values())

    def build_dynamic() -> Step:
        return fold_norms(ObservedNetwork(network).eval())

    build_dense = functools.partial(copy.deepcopy, dense)
    return [
        *(Candidate("pytorch-dense", batch, build_dense, weights, 1.0) for batch in (1, LARGE_BATCH)),
        Candidate("pytorch-dfs", 1, build_dynamic, size, workload.cost),
        Candidate("pytorch-dfs", LARGE_BATCH, build_dynamic, size, workload.batch_cost),
    ]


def _in_onnxruntime(workload: Workload, threads: int) -> tuple[list[Candidate], dict[str, Any]]:
    from dfs_cli.export.baselines import export_dense, quantize_dense
    from dfs_cli.export.network import IMAGES, LOGITS
    from dfs_cli.export.runtime import open_session

    def opened(model: bytes) -> Step:
        session = open_session(model, threads, spin=True)
        return lambda images: session.run([LOGITS], {IMAGES: images.numpy()})

    dense = export_dense(workload.dense, _size(workload.images))
    dynamic, graph = _dynamic_graph(workload)
    models = {
        "ort-fp32": (dense, 1.0),
        "ort-int8-static": (quantize_dense(dense, workload.images), workload.table.uniform_cost(8)),
        "ort-dfs": (dynamic, workload.cost),
    }
    candidates = [
        Candidate(name, 1, functools.partial(opened, model), len(model), cost, in_pytorch=False)
        for name, (model, cost) in models.items()
    ]
    return candidates, graph


def _dynamic_graph(workload: Workload) -> tuple[bytes, dict[str, Any]]:
    """The dynamic network's graph as ``dfs export`` writes it, and facts about it: the type of its features and, on real
    images, the comparison with the network."""
    from dfs_cli.export.part_writer import PartWriter
    from dfs_cli.export.parts import Parts
    from dfs_cli.export.write import make_graph, serialise

    size = _size(workload.images)
    if workload.known is not None:
        content, comparison = make_graph(workload.network, size, [workload.known], labelled=True)
        return content, comparison.to_dict() | {"holds": comparison.holds}
    writer = PartWriter(Parts(workload.network, size))
    return serialise(writer), {"features": writer.features}


def _size(images: Tensor) -> tuple[int, int, int]:
    """(C, H, W)."""
    _, channels, height, width = images.shape
    return channels, height, width


def deciding_seconds(step: Step) -> float:
    """Seconds that the controller of ``step`` has taken so far; 0 where it is not observed."""
    return step.deciding_seconds if isinstance(step, ObservedNetwork) else 0.0
