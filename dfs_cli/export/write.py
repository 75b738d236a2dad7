"""Writing a graph that has proved to do what the network does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from dfs_cli.artifact.files import check_writable, write_atomically
from dfs_cli.data.images import Batch
from dfs_cli.errors import DataError, ExportError
from dfs_cli.evaluation.dynamics import most_common_policy
from dfs_cli.export.check import Comparison, check_holds, compare
from dfs_cli.export.network import export_dynamic, export_static
from dfs_cli.nn.network import DynamicResNet


def write_onnx(
    path: Path,
    network: DynamicResNet,
    input_size: tuple[int, int, int],
    batches: Iterable[Batch],
    labelled: bool,
    static: bool = False,
    force: bool = False,
    on_batch: Callable[[int], None] = lambda images: None,
) -> Comparison:
    """Write ``network`` as an ONNX graph, atomically, once it has been compared with it.

    Args:
        network: in evaluation mode, on the CPU.
        batches: give the same images whenever they are iterated.
        labelled: whether their targets mean anything.
        static: the most common policy on ``batches``, without gate and control flow.

    Raises:
        OutputError: the file exists (unless ``force``) or cannot be written.
        ExportError: the graph decides or answers otherwise than the network, or is too large for ONNX; nothing is written.
    """
    check_writable([path], force)
    policy = common_decisions(network, batches).tolist() if static else None
    model = export_dynamic(network, input_size) if policy is None else export_static(network, policy, input_size)
    try:
        content = model.SerializeToString()
    except ValueError:
        raise ExportError("the graph is larger than the 2 GiB that an ONNX file holds: give fewer --bits") from None
    made: list[Comparison] = []

    def check(written: Path) -> None:
        made.append(compare(written, network, batches, labelled, policy, on_batch))
        check_holds(made[0])

    write_atomically(path, content, check)
    return made[0]


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
