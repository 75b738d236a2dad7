"""Writing a graph that has proved to do what the network does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]
from torch import Tensor

from dfs_cli.artifact.files import check_writable, write_atomically
from dfs_cli.data.images import Batch
from dfs_cli.errors import DataError, ExportError
from dfs_cli.evaluation.dynamics import most_common_policy
from dfs_cli.export.check import Comparison, check_holds, compare
from dfs_cli.export.network import Parts, export_dynamic, export_static
from dfs_cli.nn.network import DynamicResNet

SCALE_IMAGES = 8


def write_onnx(
    path: Path,
    network: DynamicResNet,
    input_size: tuple[int, int, int],
    batches: Iterable[Batch],
    labelled: bool,
    static: bool = False,
    portable: bool = False,
    force: bool = False,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> Comparison:
    """Write ``network`` as an ONNX graph, atomically, once it has been compared with it.

    Args:
        network: in evaluation mode, on the CPU.
        batches: give the same images whenever they are iterated.
        labelled: whether their targets mean anything.
        static: the most common policy on ``batches``, without gate and control flow.
        portable: as ``static``, of what other runtimes' importers take, see :mod:`dfs_cli.export.portable`.

    Raises:
        OutputError: the file exists (unless ``force``) or cannot be written.
        ExportError: the graph decides or answers otherwise than the network, or is too large for ONNX; nothing is written.
    """
    check_writable([path], force)
    policy = common_decisions(network, batches).tolist() if static or portable else None
    content, comparison = make_graph(network, input_size, batches, labelled, policy, portable, on_batch)
    check_holds(comparison)
    write_atomically(path, content)
    return comparison


def make_graph(
    network: DynamicResNet,
    input_size: tuple[int, int, int],
    batches: Iterable[Batch],
    labelled: bool,
    policy: Sequence[int] | None = None,
    portable: bool = False,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> tuple[bytes, Comparison]:
    """The fastest graph that does what ``network`` does, serialised: features are bytes where that makes no difference
    beyond what is promised, else floating point, whether that keeps the promise or not.

    Raises:
        ExportError: the graph is too large for ONNX.
    """
    samples = next((batch.images for batch in batches if len(batch.targets)), None)
    if samples is None:
        raise DataError("there is no image to compare the graph on")
    parts = Parts(network, input_size, None if portable else samples[:SCALE_IMAGES].numpy(), portable)

    def attempt() -> tuple[bytes, Comparison]:
        content = serialise(parts, policy)
        return content, compare(content, network, batches, labelled, policy, on_batch)

    content, comparison = attempt()
    if not comparison.holds and parts.scales is not None:
        parts.scales = None
        content, comparison = attempt()
    return content, replace(comparison, features=parts.features)


def serialise(parts: Parts, policy: Sequence[int] | None) -> bytes:
    """The graph, unchecked.

    Raises:
        ExportError: it is too large for ONNX.
    """
    try:
        model = export_dynamic(parts) if policy is None else export_static(parts, policy)
        content: bytes = model.SerializeToString()
    except (ValueError, EncodeError):  # which of them depends on the version of protobuf
        raise ExportError("the graph is larger than the 2 GiB that an ONNX file holds: give fewer --bits") from None
    return content


@torch.inference_mode()
def common_decisions(network: DynamicResNet, batches: Iterable[Batch]) -> Tensor:
    """The decisions (P * L,) that most images get.

    Raises:
        DataError: there is no image.
    """
    taken = [network.run(batch.images).decisions for batch in batches if len(batch.targets)]
    if not taken:
        raise DataError("there is no image to find the most common policy on")
    return most_common_policy(torch.cat(taken))


def random_batches(input_size: tuple[int, int, int], images: int, seed: int = 0) -> list[Batch]:
    """Batches of noise, for networks whose data is not at hand."""
    noise = torch.randn(images, *input_size, generator=torch.Generator().manual_seed(seed))
    return [Batch(part, torch.zeros(len(part), dtype=torch.long), ()) for part in noise.split(16)]
