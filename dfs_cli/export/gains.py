"""Gains of quantized inputs as nodes: a multiplication that goes into the batch-norm before it, where that is possible.

A gain is a power of two for each channel. Multiplying by it commutes with a ReLU and with every rounding, so that the graph
computes what the network computes. Where the input comes from elsewhere (what blocks hand on), the multiplication stays.
"""

from __future__ import annotations

from collections import Counter

import onnx
from onnx import numpy_helper
from torch import Tensor, nn

_NAME = "input_gain"


class Gain(nn.Module):
    """Multiplies channels, as a node of its own.

    Args:
        gain: (C,).
        shape: with which it multiplies the input.
    """

    def __init__(self, gain: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer(_NAME, gain.detach().reshape(shape))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x * self.get_buffer(_NAME)
        return y


def fold_gains(graph: onnx.GraphProto) -> onnx.GraphProto:
    """``graph`` with the gains moved, in place, into the batch-norms whose results they alone read, perhaps behind a ReLU."""
    values = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    reads = Counter([name for node in graph.node for name in node.input] + [value.name for value in graph.output])
    kept = []
    renamed: dict[str, str] = {}
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
        if norm := _norm_before(node, makers, reads):
            gain = numpy_helper.to_array(values[node.input[1]]).reshape(-1)
            for place in (1, 2):  # weight and bias, which other nodes may share
                changed = numpy_helper.to_array(values[norm.input[place]]) * gain
                norm.input[place] = f"{node.output[0]}.{place}"
                graph.initializer.append(numpy_helper.from_array(changed, norm.input[place]))
            renamed[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    return graph


def _norm_before(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto], reads: Counter[str]) -> onnx.NodeProto | None:
    """The batch-norm whose result ``node``, if it is a gain, alone reads."""
    if node.op_type != "Mul" or not node.input[1].endswith(f".{_NAME}"):
        return None
    maker = makers.get(node.input[0])
    if maker is not None and maker.op_type == "Relu" and reads[maker.output[0]] == 1:
        maker = makers.get(maker.input[0])
    is_norm = maker is not None and maker.op_type == "BatchNormalization" and reads[maker.output[0]] == 1
    return maker if is_norm else None
