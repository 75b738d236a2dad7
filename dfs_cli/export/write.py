"""Writing a graph, once a comparison has shown that it computes what the network computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]
from torch import Tensor

from dfs_cli.atomic import File
from dfs_cli.cost.decisions import Decisions
from dfs_cli.data.images import Batch
from dfs_cli.errors import DataError, ExportError
from dfs_cli.export.check import Comparison, check_holds, compare
from dfs_cli.export.network import export_network, export_static, fixed_decisions, options_of
from dfs_cli.export.part_writer import PartWriter
from dfs_cli.export.parts import Parts
from dfs_cli.export.scales import measure_scales
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.outputs import reserve

_SCALE_IMAGES = 8


def write_onnx(
    path: Path,
    network: DynamicResNet,
    input_size: tuple[int, int, int],
    batches: Iterable[Batch],
    labelled: bool,
    static: bool = False,
    tensorrt: bool = False,
    force: bool = False,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> Comparison:
    """Write ``network`` as an ONNX graph, atomically, once the two have been compared.

    Args:
        network: in evaluation mode, on the CPU.
        input_size: (C, H, W) of the images.
        batches: give the same images whenever they are iterated.
        labelled: whether the batches' targets are the images' classes.
        static: write the most common policy on ``batches`` for every image, without gate and control flow. A static network is
            written so in any case.
        tensorrt: as ``static``, with what TensorRT's importer takes, see :mod:`dfs_cli.export.tensorrt`.
        force: overwrite the file.
        on_batch: called with each batch before it is compared.

    Raises:
        OutputError: the file exists (unless ``force``) or cannot be written.
        ExportError: the graph decides or answers otherwise than the network, or is too large for ONNX; nothing is written.
        DataError: there is no image.
    """
    with reserve([path], force) as outputs:
        is_plain = (static or tensorrt) and fixed_decisions(network) is None
        decisions = common_decisions(network, batches) if is_plain else None
        content, comparison = make_graph(network, input_size, batches, labelled, decisions, tensorrt, on_batch)
        check_holds(comparison)
        outputs.write([File(path, content)])
    return comparison


def make_graph(
    network: DynamicResNet,
    input_size: tuple[int, int, int],
    batches: Iterable[Batch],
    labelled: bool,
    decisions: Decisions | None = None,
    tensorrt: bool = False,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> tuple[bytes, Comparison]:
    """The fastest graph of ``network`` that passes the comparison, serialised: with int8 features, or else with features in
    floating point, whether or not these pass it.

    Args:
        decisions: (for one image) write them for every image; None: the controller's.

    Raises:
        ExportError: the graph is too large for ONNX.
        DataError: there is no image.
    """
    images = next((batch.images for batch in batches if len(batch.targets)), None)
    if images is None:
        raise DataError("there is no image to compare the graph on")

    def attempt(writer: PartWriter) -> tuple[bytes, Comparison]:
        content = serialise(writer, decisions)
        comparison = compare(content, network, batches, labelled, decisions, on_batch)
        return content, replace(comparison, features=writer.features)

    parts = Parts(network, input_size)
    if tensorrt:
        return attempt(PartWriter(parts, tensorrt=True))
    writer = _fastest(parts, images, decisions)
    content, comparison = attempt(writer)
    if comparison.holds or writer.scales is None:
        return content, comparison
    return attempt(PartWriter(parts))


def make_unchecked_graph(network: DynamicResNet, input_size: tuple[int, int, int], images: Tensor) -> tuple[bytes, str]:
    """The fastest graph of ``network``, serialised, without a comparison.

    Args:
        images: (N, C, H, W), of which the first set the scales of int8 features.

    Returns:
        The graph, and whether its features are ``int8`` or ``float``.

    Raises:
        ExportError: the graph is too large for ONNX.
    """
    writer = _fastest(Parts(network, input_size), images, None)
    return serialise(writer, None), writer.features


def graph_writer(
    network: DynamicResNet, input_size: tuple[int, int, int], images: Tensor
) -> Callable[[Decisions | None], bytes]:
    """A function that writes one graph after the other, of different decisions for every image, or the controller's (None), and
    compares none of them; arguments as for :func:`make_unchecked_graph`."""
    writer = _fastest(Parts(network, input_size), images, None)
    return lambda decisions: serialise(writer, decisions)


def _fastest(parts: Parts, images: Tensor, decisions: Decisions | None) -> PartWriter:
    """A writer of int8 features where that is possible, otherwise of floating point."""
    options = options_of(parts.network, decisions)
    return PartWriter(parts, measure_scales(parts, options, images[:_SCALE_IMAGES].numpy()))


def serialise(writer: PartWriter, decisions: Decisions | None = None) -> bytes:
    """The graph that ``writer`` writes, without a comparison.

    Args:
        decisions: (for one image) write them for every image; None: the controller's.

    Raises:
        ExportError: it is too large for ONNX.
    """
    try:
        model = export_network(writer) if decisions is None else export_static(writer, decisions)
        content: bytes = model.SerializeToString()
    except (ValueError, EncodeError):  # which of them depends on the version of protobuf
        raise ExportError("the graph is larger than the 2 GiB that an ONNX file holds: give fewer --bits") from None
    return content


@torch.inference_mode()
def common_decisions(network: DynamicResNet, batches: Iterable[Batch]) -> Decisions:
    """The decisions, for one image, that most images get.

    Raises:
        DataError: there is no image.
    """
    parts = [network.run(batch.images).decisions for batch in batches if len(batch.targets)]
    if not parts:
        raise DataError("there is no image to find the most common policy on")
    return Decisions.join(parts).most_common()


def random_batches(input_size: tuple[int, int, int], images: int, seed: int = 0) -> list[Batch]:
    """Batches of random images, for networks whose data is not at hand.

    Args:
        input_size: (C, H, W).
        images: how many.
        seed: random seed.
    """
    noise = torch.randn(images, *input_size, generator=torch.Generator().manual_seed(seed))
    return [Batch(part, torch.zeros(len(part), dtype=torch.long), ()) for part in noise.split(16)]
