"""Traced parts for batches of any size.

torch's exporter fixes the size of the batch in the constants that it writes. Traced for one image and for two, these constants
differ, and nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from dfs_cli.errors import ExportError
from dfs_cli.export.trace import Traced, trace


@torch.no_grad()
def trace_batched(module: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> tuple[Traced, Tensor]:
    """As :func:`dfs_cli.export.trace.trace`, for batches of any size.

    Args:
        x: (1, C, H, W).

    Raises:
        ExportError: ONNX has no operator for what the module computes, or it depends on the size of the batch.
    """
    traced, y = trace(module, run, x)
    other, _ = trace(module, run, x.expand(2, -1, -1, -1))
    ones, twos = (
        {tensor.name: numpy_helper.to_array(tensor) for tensor in part.graph.initializer} for part in (traced, other)
    )
    kinds, others = ([node.op_type for node in part.graph.node] for part in (traced, other))
    if kinds != others or ones.keys() != twos.keys():
        raise _refused(module)
    for node in traced.graph.node:
        for place, name in enumerate(node.input):
            if name not in ones or np.array_equal(ones[name], twos[name]):
                continue
            shape = _without_batch(node, place, ones[name], twos[name])
            if shape is None:
                raise _refused(module)
            node.input[place] = f"{name}.{node.op_type}"
            traced.graph.initializer.append(numpy_helper.from_array(shape, node.input[place]))
    return traced, y


def _refused(module: nn.Module) -> ExportError:
    return ExportError(f"a {type(module).__name__} cannot be written for several images: leave out --batch")


def _without_batch(node: onnx.NodeProto, place: int, one: np.ndarray, two: np.ndarray) -> np.ndarray | None:
    """The shape that a node takes for batches of any size.

    Args:
        place: of the shape among the node's inputs.
        one, two: the shape for batches of one and of two images.

    Returns:
        None where there is no such shape.
    """
    if place != 1 or one.ndim != 1 or one.shape != two.shape:
        return None
    (differs,) = np.nonzero(one != two)
    shape: np.ndarray = one.copy()
    if node.op_type == "Expand" and (one[differs] == 1).all():
        return shape  # 1 keeps the size that there is
    if node.op_type != "Reshape" or len(differs) != 1:
        return None
    if -1 not in one:
        shape[differs] = -1  # what is left
    elif differs[0] == 0 and one[0] == 1:
        shape[0] = 0  # as it is
    else:
        return None
    return shape
