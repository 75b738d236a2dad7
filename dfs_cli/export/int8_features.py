"""Parts whose blocks hand on 8-bit codes.

Codes are unsigned bytes; where features have negative values, 128 stands for zero. They lie channels-last, as integer kernels
want them, so that no layout changes at a branch's boundary. A skipped block copies them, or nothing.
"""

from __future__ import annotations

import numpy as np
import onnx

from dfs_cli.export.graph import Graph
from dfs_cli.export.lower import Lowering
from dfs_cli.export.trace import QuantizedLayer, RoundedFeatures, Traced

_TO_FIRST, _TO_LAST = [0, 3, 1, 2], [0, 2, 3, 1]


class Int8Lowering(Lowering):
    """Lowers a part whose input, output, or both are codes (N, H, W, C).

    Args:
        given, wanted: what the codes of input and output are; None: floating point (N, C, H, W).
        batched: whether N may be larger than 1.
    """

    def __init__(
        self,
        graph: Graph,
        traced: Traced,
        x: str,
        given: RoundedFeatures | None,
        wanted: RoundedFeatures | None,
        batched: bool = False,
    ) -> None:
        super().__init__(graph, traced, x)
        self.given, self.wanted, self.x, self.batched = given, wanted, x, batched
        self.planar: str | None = None
        if given is not None:
            del self.names[self.source]
            self.restored.add(self.source)
            if given.low == 0:
                self.unsigned.add(self.source)

    def run(self) -> str:
        if self.wanted is None:
            return super().run()
        self.lower()
        return self.graph.add("Transpose", [self._codes(self.result, self.wanted)], perm=_TO_LAST)

    def name(self, traced_name: str) -> str:
        if traced_name == self.source and traced_name not in self.names:
            assert self.given is not None
            self.names[traced_name] = self._restored(self._planar(), self.given.step, self.given.zero)
        return super().name(traced_name)

    def _planar(self) -> str:
        """The input's codes as (N, C, H, W)."""
        if self.planar is None:
            self.planar = self.graph.add("Transpose", [self.x], perm=_TO_FIRST)
        return self.planar

    def _codes(self, x: str, layer: QuantizedLayer | RoundedFeatures) -> str:
        given = self.given
        if x == self.source and given and (layer.step, layer.low, layer.high) == (given.step, given.low, given.high):
            return self._planar()
        return super()._codes(x, layer)

    def _copy(self, node: onnx.NodeProto) -> None:
        if self.given is None or node.op_type != "GlobalAveragePool" or node.input[0] != self.source:
            super()._copy(node)
            return
        _, channels, height, width = self.shape
        sums = pool_codes(self.graph, self.x, self.given.zero, channels, height, width, axes=3 if self.batched else 2)
        if self.batched:
            sums = self.graph.add("Reshape", [sums, self.graph.constant([-1, channels], np.int64)])
        scale = self.graph.constant(self.given.step / (height * width), np.float32)
        readers, output = self.readers[node.output[0]], node.output[0]
        if output != self.result and [reader.op_type for reader in readers] == ["Flatten"]:  # it is flat already
            self.done.add(id(readers[0]))
            self.names[readers[0].output[0]] = self.graph.add("DequantizeLinear", [sums, scale])
            return
        # Not dequantized: ONNX Runtime would compute what follows on integers, and round otherwise.
        mean = self.graph.add("Mul", [self.graph.add("Cast", [sums], to=onnx.TensorProto.FLOAT), scale])
        shape = self.graph.constant([-1, channels, 1, 1], np.int64)
        self.names[output] = self.graph.add("Reshape", [mean, shape])


def pool_codes(graph: Graph, codes: str, zero: int, channels: int, height: int, width: int, axes: int = 3) -> str:
    """The sums over the pixels of ``codes`` (N, H, W, C), of which ``zero`` stands for zero, as integers of 32 bits: (N, 1, C)
    or, of one image and with two axes, (1, C)."""
    rows = graph.add("Reshape", [codes, graph.constant([-1] * (axes - 2) + [height * width, channels], np.int64)])
    ones = graph.constant(np.ones([1] * (axes - 1) + [height * width]), np.uint8)
    zeros = [graph.constant(value, np.uint8) for value in (0, zero)] if zero else []
    return graph.add("MatMulInteger", [ones, rows, *zeros])
