"""Features as bytes between the blocks: faster, and only nearly what the network computes.

In the network blocks hand on floating point numbers. Where they hand on 8-bit codes, additions run on integers and a block
that is skipped copies a quarter of the bytes; the codes' scales come from sample images. Codes lie channels-last, as
integer kernels want them, so that no layout changes at a branch's edges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from dfs_cli.export.graph import Graph
from dfs_cli.export.layers import DOMAIN, OPSET, QuantizedLayer, Traced
from dfs_cli.export.lower import Affine, Lowering
from dfs_cli.export.runtime import open_session
from dfs_cli.nn.quantization import BYTE_BITS

if TYPE_CHECKING:
    from dfs_cli.export.network import Parts

_CODES = 255
_TO_FIRST, _TO_LAST = [0, 3, 1, 2], [0, 2, 3, 1]

Key = str | tuple[int, int]
Ranges = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class ByteScales:
    """What a sample of images says about the features.

    Args:
        streams: L + 1 scales, of the codes that enter each block, and the head.
        ranges: by part, the least and the largest value of what is computed in it, by traced name.
    """

    streams: tuple[float, ...]
    ranges: Mapping[Key, Ranges]

    def edges(self, key: Key) -> tuple[float | None, float | None]:
        """The scales of a part's input and output; None: floating point."""
        if isinstance(key, tuple):
            return self.streams[key[0]], self.streams[key[0] + 1]
        return (None, self.streams[0]) if key == "stem" else (self.streams[-1], None)


def measure_scales(parts: Parts, images: np.ndarray) -> ByteScales | None:
    """Scales from ``images`` (N, C, H, W); None where the network does not fit: an option of more than 8 bits, or blocks
    whose output is negative in places."""
    network = parts.network
    if max(*network.config.bits, network.config.edge_bits) > BYTE_BITS:
        return None
    ranges: dict[Key, Ranges] = {}
    ranges["stem"], samples = _observe(parts.part("stem"), images)
    largest = [_largest([samples])]
    links = []
    for block in range(len(network.blocks)):
        outputs = []
        for option in range(len(network.config.bits)):
            ranges[block, option], found = _observe(parts.part((block, option)), samples)
            outputs.append(found)
        if min(float(samples.min()), *(float(o.min()) for o in outputs)) < 0:
            return None
        links.append(any(is_identity(parts.part((block, option))) for option in range(len(network.config.bits))))
        largest.append(_largest(outputs))
        samples = outputs[-1]
    # Blocks that may hand on what they got share a scale.
    for i, linked in enumerate(links):
        if linked:
            largest[i + 1] = max(largest[i : i + 2])
    for i in reversed(range(len(links))):
        if links[i]:
            largest[i] = largest[i + 1]
    return ByteScales(tuple(value / _CODES for value in largest), ranges)


def _largest(samples: list[np.ndarray]) -> float:
    return max([1e-6, *(float(s.max()) for s in samples)])


def is_identity(traced: Traced) -> bool:
    """Whether a part gives what it is given."""
    return all(node.op_type == "Identity" for node in traced.graph.node)


def _observe(traced: Traced, images: np.ndarray) -> tuple[Ranges, np.ndarray]:
    """Ranges of what a part computes for ``images`` (N, C, H, W), and its output (N, C', H', W')."""
    graph = Graph()
    lowering = Lowering(graph, traced, "x")
    result = lowering.run()
    kinds = ("BatchNormalization", "Relu")
    named = {
        node.output[0]: lowering.names[node.output[0]]
        for node in traced.graph.node
        if (node.op_type in kinds or node.domain == DOMAIN) and node.output[0] in lowering.names
    }
    graph.add("Identity", [result], ["y"])
    wanted = ["y", *dict.fromkeys(named.values())]
    shape = [1, *images.shape[1:]]
    made = helper.make_graph(
        graph.nodes,
        "part",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in wanted],
        graph.initializers,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    session = open_session(model.SerializeToString())
    found = [session.run(wanted, {"x": image[None]}) for image in images]
    columns = dict(zip(wanted, zip(*found, strict=True), strict=True))
    ranges = {
        traced_name: (min(float(v.min()) for v in columns[name]), max(float(v.max()) for v in columns[name]))
        for traced_name, name in named.items()
    }
    return ranges, np.concatenate(columns["y"])


class ByteLowering(Lowering):
    """A part whose input, output, or both are bytes (1, H, W, C), unsigned codes of the scales given."""

    def __init__(
        self, graph: Graph, traced: Traced, x: str, ranges: Ranges, enters: float | None, leaves: float | None
    ) -> None:
        super().__init__(graph, traced, x)
        self.ranges, self.enters, self.leaves, self.x = ranges, enters, leaves, x
        self.planar: str | None = None
        if enters is not None:
            del self.names[self.source]

    def run(self) -> str:
        y = super().run()
        if self.leaves is None:
            return y
        return self.graph.add("Transpose", [self._quantize(y, self.leaves, 0)], perm=_TO_LAST)

    def name(self, traced_name: str) -> str:
        if traced_name == self.source and traced_name not in self.names:
            self.names[traced_name] = self._restore(self._planar(), self.enters or 1.0, 0)
        return super().name(traced_name)

    def _planar(self) -> str:
        """The codes that enter, (1, C, H, W)."""
        if self.planar is None:
            self.planar = self.graph.add("Transpose", [self.x], perm=_TO_FIRST)
        return self.planar

    def _copy(self, node: onnx.NodeProto) -> None:
        if self.enters is None or node.op_type != "GlobalAveragePool" or node.input[0] != self.source:
            super()._copy(node)
            return
        _, channels, height, width = self.shape
        sums = pool_codes(self.graph, self.x, channels, height, width)
        mean = self.graph.add("Mul", [sums, self.graph.constant(self.enters / (height * width), np.float32)])
        shape = self.graph.constant([1, channels, 1, 1], np.int64)
        self.names[node.output[0]] = self.graph.add("Reshape", [mean, shape])

    def _layer_of(self, node: onnx.NodeProto) -> QuantizedLayer:
        layer = super()._layer_of(node)
        # A layer of 8 bits takes the codes as they are, in place of rounding once more.
        return replace(layer, step=self.enters) if self._takes_codes(node.input[0], layer) else layer  # type: ignore[arg-type]

    def _takes_codes(self, x: str, layer: QuantizedLayer) -> bool:
        return self.enters is not None and x == self.source and layer.bits == BYTE_BITS and layer.low == 0

    def _codes(self, x: str, layer: QuantizedLayer) -> str:
        return self._planar() if self._takes_codes(x, layer) else super()._codes(x, layer)

    def _needs_no_relu(self, node: onnx.NodeProto) -> bool:
        is_last = self.leaves is not None and node.output[0] == self.result
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
            scale = self.ranges[output][1] / _CODES
            if self._is_pooled_to_the_end(output):
                scale = self.leaves or scale
            self.names[output] = self._restore(self._quantize(y, scale, 0), scale, 0)
            return self.names[output]
        low, high = (min(0.0, self.ranges[output][0]), max(1e-6, self.ranges[output][1]))
        scale = (high - low) / _CODES
        zero = round(-low / scale)
        return self._restore(self._quantize(y, scale, zero), scale, zero)

    def _is_pooled_to_the_end(self, name: str) -> bool:
        readers = self.readers[name]
        return len(readers) == 1 and readers[0].op_type == "MaxPool" and readers[0].output[0] == self.result

    def _quantize(self, x: str, scale: float, zero: int) -> str:
        return self.graph.add("QuantizeLinear", [x, *self._parameters(scale, zero)])

    def _restore(self, x: str, scale: float, zero: int) -> str:
        return self.graph.add("DequantizeLinear", [x, *self._parameters(scale, zero)])

    def _parameters(self, scale: float, zero: int) -> list[Any]:
        return [self.graph.constant(scale, np.float32), self.graph.constant(zero, np.uint8)]


def pool_codes(graph: Graph, codes: str, channels: int, height: int, width: int) -> str:
    """The sums (1, 1, C) over the pixels of ``codes`` (1, H, W, C), as floating point numbers, exact up to 2**24."""
    rows = graph.add("Reshape", [codes, graph.constant([1, height * width, channels], np.int64)])
    sums = graph.add("MatMulInteger", [graph.constant(np.ones((1, 1, height * width)), np.uint8), rows])
    return graph.add("Cast", [sums], to=TensorProto.FLOAT)
