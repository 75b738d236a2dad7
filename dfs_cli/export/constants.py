"""The constants of a traced part: what is the same for every image is computed here, once.

torch's exporter writes shapes, axes and pads as nodes that compute them. Runtimes would compute them again, and TensorRT's
importer takes many of them as initializers only.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator


def fold_constants(model: onnx.ModelProto) -> onnx.GraphProto:
    """The graph of ``model``, with initializers in place of all nodes whose results are constant.

    Args:
        model: its input has a fixed shape. The shapes of what operators of other domains return stand in ``value_info``.
    """
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {value.name: shape for value in (*graph.input, *graph.value_info) if (shape := _fixed_shape(value))}
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    kept = []
    for node in graph.node:
        feeds = {name: values[name] for name in node.input if name in values}
        if node.op_type == "Shape" and node.input[0] in shapes:
            feeds = {node.input[0]: np.broadcast_to(np.float32(0), shapes[node.input[0]])}
        if node.domain or len(feeds) < len({*node.input} - {""}):
            kept.append(node)
            continue
        results = ReferenceEvaluator(node).run(None, feeds)
        values.update(zip(node.output, map(np.asarray, results), strict=True))
        graph.initializer.extend(numpy_helper.from_array(values[name], name) for name in node.output)
    del graph.node[:]
    graph.node.extend(kept)
    return graph


def _fixed_shape(value: onnx.ValueInfoProto) -> list[int] | None:
    """The shape of a tensor; None where a size is unknown, or there is none."""
    dims = value.type.tensor_type.shape.dim
    return [d.dim_value for d in dims] if dims and all(d.dim_value for d in dims) else None
