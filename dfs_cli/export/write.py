"""Writing a graph, once a comparison has shown that it computes what the network computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]

from dfs_cli.atomic import File
from dfs_cli.cost.decisions import Decisions
from dfs_cli.data.images import Batch
from dfs_cli.errors import DataError, ExportError
from dfs_cli.export.check import Comparison, check_holds, compare
from dfs_cli.export.network import export_network, export_static, fixed_decisions
from dfs_cli.export.part_writer import PartWriter
from dfs_cli.export.parts import Parts
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.outputs import reserve
from dfs_cli.presets import BatchSize


def write_onnx(
    path: Path,
    network: DynamicResNet,
    input_size: tuple[int, int, int],
    batches: Iterable[Batch],
    labelled: bool,
    static: bool = False,
    tensorrt: bool = False,
    batch: BatchSize = 1,
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
        batch: how many images the graph takes at once.
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
        content, comparison = make_graph(network, input_size, batches, labelled, decisions, tensorrt, batch, on_batch)
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
    batch: BatchSize = 1,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> tuple[bytes, Comparison]:
    """The graph of ``network``, serialised, and its comparison with it.

    Args:
        decisions: (for one image) write them for every image; None: the controller's.
        batch: how many images the graph takes at once.

    Raises:
        ExportError: the graph is too large for ONNX.
        DataError: there is no image.
    """
    writer = PartWriter(Parts(network, input_size, batch), tensorrt)
    content = serialise(writer, decisions)
    comparison = compare(content, network, batches, labelled, decisions, on_batch)
    return content, replace(comparison, features=writer.features)


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
