"""Int8 features between the blocks: faster, and nearly what the network computes.

In the network, blocks hand on floating point numbers. Where they hand on unsigned 8-bit codes, additions run on integers and a
skipped block copies a quarter of the memory. The codes' scales come from sample images, see :mod:`dfs_cli.export.scales`. Codes
lie channels-last, as integer kernels want them, so that no layout changes at a branch's boundary.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
from onnx import TensorProto

from dfs_cli.export.graph import Graph
from dfs_cli.export.lower import Affine, Lowering
from dfs_cli.export.scales import LARGEST_CODE, LEAST_RANGE, Ranges
from dfs_cli.export.trace import QuantizedLayer, Traced
from dfs_cli.nn.quantization import BYTE_BITS

_TO_FIRST, _TO_LAST = [0, 3, 1, 2], [0, 2, 3, 1]


class Int8Lowering(Lowering):
    """Lowers a part whose input, output, or both are int8 features: unsigned codes (1, H, W, C).

    Args:
        ranges: of the part's intermediate results.
        input_scale, output_scale: of the codes; None: floating point (1, C, H, W).
    """

    def __init__(
        self,
        graph: Graph,
        traced: Traced,
        x: str,
        ranges: Ranges,
        input_scale: float | None,
        output_scale: float | None,
    ) -> None:
        super().__init__(graph, traced, x)
        self.ranges, self.input_scale, self.output_scale, self.x = ranges, input_scale, output_scale, x
        self.planar: str | None = None
        if input_scale is not None:
            del self.names[self.source]

    def run(self) -> str:
        y = super().run()
        if self.output_scale is None:
            return y
        return self.graph.add("Transpose", [self._quantize(y, self.output_scale, 0)], perm=_TO_LAST)

    def name(self, traced_name: str) -> str:
        if traced_name == self.source and traced_name not in self.names:
            self.names[traced_name] = self._restore(self._planar(), self.input_scale or 1.0, 0)
        return super().name(traced_name)

    def _planar(self) -> str:
        """The input's codes as (1, C, H, W)."""
        if self.planar is None:
            self.planar = self.graph.add("Transpose", [self.x], perm=_TO_FIRST)
        return self.planar

    def _copy(self, node: onnx.NodeProto) -> None:
        if self.input_scale is None or node.op_type != "GlobalAveragePool" or node.input[0] != self.source:
            super()._copy(node)
            return
        _, channels, height, width = self.shape
        sums = pool_codes(self.graph, self.x, channels, height, width)
        mean = self.graph.add("Mul", [sums, self.graph.constant(self.input_scale / (height * width), np.float32)])
        shape = self.graph.constant([1, channels, 1, 1], np.int64)
        self.names[node.output[0]] = self.graph.add("Reshape", [mean, shape])

    def _layer_of(self, node: onnx.NodeProto) -> QuantizedLayer:
        layer = super()._layer_of(node)
        if self.input_scale is None or not self._reads_input_codes(node.input[0], layer):
            return layer
        # A layer of 8 bits reads the codes as they are, instead of rounding once more.
        return replace(layer, step=self.input_scale)

    def _reads_input_codes(self, x: str, layer: QuantizedLayer) -> bool:
        return self.input_scale is not None and x == self.source and layer.bits == BYTE_BITS and layer.low == 0

    def _codes(self, x: str, layer: QuantizedLayer) -> str:
        return self._planar() if self._reads_input_codes(x, layer) else super()._codes(x, layer)

    def _needs_no_relu(self, node: onnx.NodeProto) -> bool:
        is_last = self.output_scale is not None and node.output[0] == self.result
        return is_last or super()._needs_no_relu(node)

    def _to_floats(self, affine: Affine) -> str:
        if affine.layer.geometry is None:
            return super()._to_floats(affine)
        y, output = self._on_codes(affine), affine.output
        readers = self.readers[output]
        if len(readers) == 1 and readers[0].op_type == "Relu" and output != self.result:
            relu = readers[0]
            if self._needs_no_relu(relu):
                return y
            self.done.add(id(relu))
            output = relu.output[0]
            scale = self.ranges[output][1] / LARGEST_CODE
            if self._is_pooled_to_the_end(output):
                scale = self.output_scale or scale
            self.names[output] = self._restore(self._quantize(y, scale, 0), scale, 0)
            return self.names[output]
        low, high = (min(0.0, self.ranges[output][0]), max(LEAST_RANGE, self.ranges[output][1]))
        scale = (high - low) / LARGEST_CODE
        zero = round(-low / scale)
        return self._restore(self._quantize(y, scale, zero), scale, zero)

    def _is_pooled_to_the_end(self, name: str) -> bool:
        readers = self.readers[name]
        return len(readers) == 1 and readers[0].op_type == "MaxPool" and readers[0].output[0] == self.result

    def _quantize(self, x: str, scale: float, zero: int) -> str:
        return self.graph.add("QuantizeLinear", [x, *self._parameters(scale, zero)])

    def _restore(self, x: str, scale: float, zero: int) -> str:
        return self.graph.add("DequantizeLinear", [x, *self._parameters(scale, zero)])

    def _parameters(self, scale: float, zero: int) -> list[str]:
        return [self.graph.constant(scale, np.float32), self.graph.constant(zero, np.uint8)]


def pool_codes(graph: Graph, codes: str, channels: int, height: int, width: int) -> str:
    """The sums (1, 1, C) over the pixels of ``codes`` (1, H, W, C), as floating point numbers, exact up to 2**24."""
    rows = graph.add("Reshape", [codes, graph.constant([1, height * width, channels], np.int64)])
    sums = graph.add("MatMulInteger", [graph.constant(np.ones((1, 1, height * width)), np.uint8), rows])
    return graph.add("Cast", [sums], to=TensorProto.FLOAT)
