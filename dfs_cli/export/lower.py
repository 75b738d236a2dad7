"""From traced parts to ONNX: opaque quantized layers become convolutions between quantize and dequantize nodes.

ONNX Runtime and others recognise that pattern and run it on integers. Batch-norm is folded into the convolution, and what is
read by nothing but quantizers of unsigned codes needs no ReLU: they clip at zero anyway.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx
from onnx import numpy_helper

from dfs_cli.export.graph import Graph
from dfs_cli.export.layers import DOMAIN, QuantizedLayer, Traced

_BYTE = 8
# Biases are 32-bit integers in units of weight scale times input step; more than this would overflow with the sums.
_LARGEST_BIAS = 2.0**30
_LARGEST_CODE = 127


def inline(graph: Graph, traced: Traced, x: str) -> str:
    """Add the nodes of ``traced`` to ``graph``, with ``x`` as their input; returns their output."""
    return _Lowering(graph, traced, x).run()


class _Lowering:
    """One traced part on its way into a graph."""

    def __init__(self, graph: Graph, traced: Traced, x: str) -> None:
        self.graph, self.layers = graph, traced.layers
        self.nodes = list(traced.graph.node)
        self.result = traced.graph.output[0].name
        self.names = {traced.graph.input[0].name: x, "": ""}
        self.values = {tensor.name: tensor for tensor in traced.graph.initializer}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)
        self.done: set[int] = set()
        self.codes: dict[tuple[str, float, int], str] = {}

    def run(self) -> str:
        for node in self.nodes:
            if id(node) in self.done:
                continue
            if node.domain == DOMAIN:
                self._layer(node)
            elif node.op_type == "Relu" and self._only_unsigned_codes_of(node.output[0]):
                self.names[node.output[0]] = self.name(node.input[0])
            else:
                self._copy(node)
        return self.name(self.result)

    def name(self, traced_name: str) -> str:
        """The name in the graph of a value of the traced part."""
        if traced_name not in self.names:
            self.names[traced_name] = self.graph.constant(numpy_helper.to_array(self.values[traced_name]))
        return self.names[traced_name]

    def _copy(self, node: onnx.NodeProto) -> None:
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        inputs, outputs = (
            [self.name(n) for n in node.input],
            [self.graph.name(node.op_type.lower()) for _ in node.output],
        )
        del copied.input[:], copied.output[:]
        copied.input.extend(inputs)
        copied.output.extend(outputs)
        copied.name = self.graph.name(node.op_type)
        self.graph.nodes.append(copied)
        self.names.update(zip(node.output, outputs, strict=True))

    def _layer_of(self, node: onnx.NodeProto) -> QuantizedLayer:
        return self.layers[node.attribute[0].s.decode()]

    def _only_unsigned_codes_of(self, name: str) -> bool:
        return name != self.result and all(
            reader.domain == DOMAIN and self._layer_of(reader).low == 0 and self._layer_of(reader).bits <= _BYTE
            for reader in self.readers[name]
        )

    def _layer(self, node: onnx.NodeProto) -> None:
        layer = self._layer_of(node)
        output = node.output[0]
        factor, shift = np.ones(len(layer.scale)), np.zeros(len(layer.scale)) if layer.bias is None else layer.bias
        readers = self.readers[output]
        if output != self.result and len(readers) == 1 and readers[0].op_type == "BatchNormalization":
            norm = readers[0]
            self.done.add(id(norm))
            weight, bias, mean, variance = (numpy_helper.to_array(self.values[n]).astype(float) for n in norm.input[1:])
            epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
            factor = weight / np.sqrt(variance + epsilon)
            shift = (shift - mean) * factor + bias
            output = norm.output[0]
        x = self.name(node.input[0])
        if layer.bits > _BYTE:
            self.names[output] = self._on_floats(layer, x, factor, shift)
        else:
            self.names[output] = self._on_bytes(layer, x, factor, shift, to_codes=self._feeds_codes(output))

    def _feeds_codes(self, name: str) -> bool:
        """Whether a value is read, perhaps after a ReLU, by nothing but layers that round it to bytes."""
        readers = self.readers[name]
        if len(readers) == 1 and readers[0].op_type == "Relu":
            return self._only_unsigned_codes_of(readers[0].output[0])
        return name != self.result and all(
            reader.domain == DOMAIN and self._layer_of(reader).bits <= _BYTE for reader in readers
        )

    def _on_floats(self, layer: QuantizedLayer, x: str, factor: np.ndarray, shift: np.ndarray) -> str:
        """More bits than a byte has: floating point, with the input clipped where the codes would be."""
        limits = [self.graph.constant(code * layer.step, np.float32) for code in (layer.low, layer.high)]
        weight = layer.codes * (layer.scale * factor).reshape(-1, *[1] * (layer.codes.ndim - 1))
        inputs = [self.graph.add("Clip", [x, *limits]), self.graph.constant(weight, np.float32)]
        return self._apply(layer, [*inputs, self.graph.constant(shift, np.float32)])

    def _on_bytes(self, layer: QuantizedLayer, x: str, factor: np.ndarray, shift: np.ndarray, to_codes: bool) -> str:
        codes, scale, bias = fold(layer, factor, shift)
        graph = self.graph
        weight = graph.add(
            "DequantizeLinear",
            [
                graph.constant(codes, np.int8),
                graph.constant(scale, np.float32),
                graph.constant(np.zeros(len(scale)), np.int8),
            ],
            axis=0,
        )
        if not to_codes:
            y = self._apply(layer, [self._quantized(x, layer), weight])
            shape = [1, -1, *[1] * (codes.ndim - 2)]
            return graph.add("Add", [y, graph.constant(shift.reshape(shape), np.float32)])
        offset = graph.add(
            "DequantizeLinear",
            [
                graph.constant(bias, np.int32),
                graph.constant(scale * np.float32(layer.step), np.float32),
                graph.constant(np.zeros(len(scale)), np.int32),
            ],
            axis=0,
        )
        return self._apply(layer, [self._quantized(x, layer), weight, offset])

    def _quantized(self, x: str, layer: QuantizedLayer) -> str:
        """``x`` rounded to the layer's codes, dequantized again."""
        graph, dtype = self.graph, np.uint8 if layer.low == 0 else np.int8
        parameters = [graph.constant(layer.step, np.float32), graph.constant(0, dtype)]
        key = (x, layer.step, layer.high)
        if key not in self.codes:
            codes = graph.add("QuantizeLinear", [x, *parameters])
            limits = np.iinfo(dtype)
            if (layer.low, layer.high) != (limits.min, limits.max):
                codes = graph.add("Clip", [codes, *(graph.constant(c, dtype) for c in (layer.low, layer.high))])
            self.codes[key] = codes
        return graph.add("DequantizeLinear", [self.codes[key], *parameters])

    def _apply(self, layer: QuantizedLayer, inputs: list[str]) -> str:
        if (geometry := layer.geometry) is None:
            return self.graph.add("Gemm", inputs, transB=1)
        pads = [*geometry.padding, *geometry.padding]
        return self.graph.add(
            "Conv",
            inputs,
            kernel_shape=list(layer.codes.shape[2:]),
            strides=list(geometry.stride),
            pads=pads,
            dilations=list(geometry.dilation),
            group=geometry.groups,
        )


def fold(layer: QuantizedLayer, factor: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``factor * convolution + shift`` per channel, on integers.

    The bias is an integer, too, in units that grow as the bitwidth falls. Codes of few bits leave room in their bytes: they
    are multiplied by the factor with which the bias comes closest to an integer.

    Returns:
        Weight codes (C_out, ...), their positive scales (C_out,), and the bias (C_out,) in units of scale times step.
    """
    rows = layer.codes.reshape(len(layer.codes), -1) * np.sign(factor)[:, None]
    scale = layer.scale.astype(float) * np.abs(factor)
    # A channel that is almost nothing but its bias would need a bias beyond 32 bits: its weight is put into coarser units.
    coarser = np.maximum(scale, np.maximum(np.abs(shift) / (_LARGEST_BIAS * layer.step), np.finfo(np.float32).tiny))
    rows = np.round(rows * (scale / coarser)[:, None])
    bias = shift / (coarser * layer.step)
    multiples = np.arange(1, _LARGEST_CODE // max(1, int(np.abs(rows).max())) + 1)[:, None]
    fits = np.abs(bias * multiples) <= _LARGEST_BIAS
    error = np.where(fits | (multiples == 1), np.abs(np.round(bias * multiples) / multiples - bias), np.inf)
    best = multiples[error.argmin(axis=0), 0]
    return (rows * best[:, None]).reshape(layer.codes.shape), coarser / best, np.round(bias * best)
