"""From traced parts to ONNX: opaque quantized layers become convolutions between quantize and dequantize nodes.

ONNX Runtime and others recognise that pattern and run it on integers. Batch-norm is folded into the convolution. A ReLU whose
result is read only by quantizers of unsigned codes is left out: they clip at zero anyway.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import numpy_helper

from dfs_cli.export.graph import Graph
from dfs_cli.export.space_to_depth import merge_pixels, on_merged_pixels
from dfs_cli.export.trace import DOMAIN, MIDDLE, ROUNDED, QuantizedLayer, RoundedFeatures, Traced, key_of
from dfs_cli.nn.quantization import BYTE_BITS, Convolution


class Affine(NamedTuple):
    """A quantized layer and the batch-norm behind it: ``output = factor * layer(x) + shift``.

    Args:
        x: a traced name.
        factor, shift: (C_out,).
    """

    layer: QuantizedLayer
    x: str
    factor: np.ndarray
    shift: np.ndarray


class Lowering:
    """Adds a traced part to a graph.

    Args:
        x: name of its input in the graph.
    """

    def __init__(self, graph: Graph, traced: Traced, x: str) -> None:
        self.graph, self.layers = graph, traced.layers
        self.nodes = list(traced.graph.node)
        self.result = traced.graph.output[0].name
        self.source = traced.graph.input[0].name
        self.shape = [d.dim_value for d in traced.graph.input[0].type.tensor_type.shape.dim]
        self.names = {self.source: x, "": ""}
        self.values = {tensor.name: tensor for tensor in traced.graph.initializer}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)
        self.done: set[int] = set()
        self.codes: dict[tuple[str, float, int, int], str] = {}
        self.restored: set[str] = set()  # traced values that come from codes
        self.unsigned: set[str] = set()  # of these, those that come from unsigned ones
        self.rounded: dict[str, tuple[str, QuantizedLayer | RoundedFeatures]] = {}  # their codes; restored when needed

    def run(self) -> str:
        """Add the nodes; returns the name of the output."""
        self.lower()
        return self.name(self.result)

    def lower(self) -> None:
        """Add the nodes."""
        for node in self.nodes:
            if id(node) in self.done:
                continue
            if node.domain == DOMAIN and node.op_type == ROUNDED:
                self._round(node)
            elif node.domain == DOMAIN:
                self._layer(node)
            elif node.op_type == "Relu" and self._needs_no_relu(node):
                self.names[node.output[0]] = self.name(node.input[0])
                for values in (self.restored, self.unsigned):
                    if node.input[0] in values:
                        values.add(node.output[0])
            else:
                self._copy(node)

    def name(self, traced_name: str) -> str:
        """The name in the graph of a traced value."""
        if traced_name not in self.names and traced_name in self.rounded:
            codes, features = self.rounded[traced_name]
            self.names[traced_name] = self._restored(codes, features.step, features.zero)
        elif traced_name not in self.names:
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
        if node.op_type == "Pad" and any(reader.op_type == "MaxPool" for reader in self.readers[node.output[0]]):
            # ONNX Runtime up to 1.29 would fuse them, and then pad with the lowest number in place of zero.
            outputs = [self.graph.add("Max", [outputs[0], self.graph.constant(np.finfo(np.float32).min, np.float32)])]
        self.names.update(zip(node.output, outputs, strict=True))

    def _reader(self, node: onnx.NodeProto) -> QuantizedLayer | RoundedFeatures:
        return self.layers[key_of(node)]

    def _round(self, node: onnx.NodeProto) -> None:
        features, output = self._reader(node), node.output[0]
        codes = self._codes(node.input[0], features)
        self.codes[_key(output, features)] = codes
        self.restored.add(output)
        if features.low == 0:
            self.unsigned.add(output)
        self.rounded[output] = codes, features

    def _restored(self, codes: str, step: float, zero: int) -> str:
        """``codes`` in floating point."""
        parameters = [self.graph.constant(step, np.float32), self.graph.constant(zero, np.uint8)]
        return self.graph.add("DequantizeLinear", [codes, *parameters])

    def _needs_no_relu(self, node: onnx.NodeProto) -> bool:
        """Whether the readers of a ReLU clip at zero themselves."""
        return self._only_unsigned_codes_of(node.output[0])

    def _only_unsigned_codes_of(self, name: str) -> bool:
        return name != self.result and all(
            reader.domain == DOMAIN and self._reader(reader).low == 0 and self._reader(reader).bits <= BYTE_BITS
            for reader in self.readers[name]
        )

    def _layer(self, node: onnx.NodeProto) -> None:
        layer = self._reader(node)
        assert isinstance(layer, QuantizedLayer)
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
        build = self._on_floats if layer.bits > BYTE_BITS else self._to_floats
        if layer.folded is not None and self._feeds_codes(output):
            build = self._on_codes
        self.names[output] = build(Affine(layer, node.input[0], factor, shift))

    def _feeds_codes(self, name: str) -> bool:
        """Whether a value is read, perhaps after a ReLU, only by layers that round it to 8-bit codes or fewer bits."""
        readers = self.readers[name]
        if len(readers) == 1 and readers[0].op_type == "Relu":
            return self._only_unsigned_codes_of(readers[0].output[0])
        return name != self.result and all(
            reader.domain == DOMAIN and self._reader(reader).bits <= BYTE_BITS for reader in readers
        )

    def _on_floats(self, affine: Affine) -> str:
        """A layer of more than 8 bits: in floating point, with the input clipped to the range of its codes."""
        layer, x, factor, shift = affine
        weight = layer.codes * (layer.scale * factor).reshape(-1, *[1] * (layer.codes.ndim - 1))
        weight = self.graph.constant(weight, np.float32)
        return self._apply(layer, [self._clipped(x, layer), weight, self.graph.constant(shift, np.float32)])

    def _clipped(self, x: str, layer: QuantizedLayer | RoundedFeatures) -> str:
        """The traced value ``x`` clipped to the range of the layer's codes, in floating point."""
        limits = [self.graph.constant(code * layer.step, np.float32) for code in (layer.low, layer.high)]
        return self.graph.add("Clip", [self.name(x), *limits])

    def _apply(self, layer: QuantizedLayer, inputs: list[str], pads: Sequence[int] | None = None) -> str:
        """The layer in floating point; ``inputs`` are its input, weight and bias."""
        if layer.geometry is None:
            return self.graph.add("Gemm", inputs, transB=1)
        return self._convolve("Conv", layer, inputs, pads)

    def _on_codes(self, affine: Affine) -> str:
        """From codes to codes: runtimes fuse it with the quantizer that reads the result into one integer kernel."""
        layer, x = affine.layer, affine.x
        given, folded = self._codes(x, layer), layer.folded
        assert folded is not None
        scale = folded.scale.numpy()
        layer = replace(layer, codes=folded.weight.numpy())
        if x == self.source and (merged := on_merged_pixels(layer, *self.shape[2:])):
            given, layer = merge_pixels(self.graph, given, *self.shape[1:]), merged
        given = self._restored(given, layer.step, self._zero_of(x, layer))
        weight = self._dequantized(layer.codes, scale, np.int8)
        bias = self._dequantized(folded.bias.numpy(), scale * np.float32(layer.step), np.int32)
        return self._convolve("Conv", layer, [given, weight, bias])

    def _to_floats(self, affine: Affine) -> str:
        """From codes to floating point: scaled integer sums, exactly as the network computes them.

        Without a quantizer behind it a convolution between dequantize nodes would run in floating point.
        """
        layer, x, factor, shift = affine
        graph, zero = self.graph, self.graph.constant(self._zero_of(x, layer), np.uint8)
        given, scale = self._codes(x, layer), layer.scale.astype(float) * factor * layer.step
        if layer.geometry is None:
            y = graph.add("MatMulInteger", [given, graph.constant(layer.codes.T, np.int8), zero])
            y = graph.add("DequantizeLinear", [y, graph.constant(scale, np.float32)], axis=1)
            return graph.add("Add", [y, graph.constant(shift, np.float32)])
        # Kernels for unsigned weights are much faster.
        weight = graph.constant(layer.codes + MIDDLE, np.uint8)
        y = self._convolve("ConvInteger", layer, [given, weight, zero, graph.constant(MIDDLE, np.uint8)])
        y = graph.add("Cast", [y], to=onnx.TensorProto.FLOAT)
        y = graph.add("Mul", [y, graph.constant(scale.reshape(1, -1, 1, 1), np.float32)])
        return graph.add("Add", [y, graph.constant(shift.reshape(1, -1, 1, 1), np.float32)])

    def _dequantized(self, codes: np.ndarray, scale: np.ndarray, dtype: Any) -> str:
        """An initializer of integers with a scale per channel."""
        zeros = np.zeros(len(scale))
        inputs = ((codes, dtype), (scale, np.float32), (zeros, dtype))
        return self.graph.add("DequantizeLinear", [self.graph.constant(*given) for given in inputs], axis=0)

    def _codes(self, x: str, layer: QuantizedLayer | RoundedFeatures) -> str:
        """The traced value ``x`` as the layer's codes in unsigned bytes, shifted by :meth:`_zero_of`."""
        graph, zero = self.graph, self._zero_of(x, layer)
        low, high = layer.low + zero, layer.high + zero
        key = _key(x, layer)
        if key not in self.codes:
            given = self.name(x)
            if x in self.restored:
                # From codes to codes: one look-up. ONNX Runtime would make one rounding of two that follow each other.
                given = graph.add("LeakyRelu", [given], alpha=0.0 if layer.low == 0 else 1.0)
            codes = graph.add(
                "QuantizeLinear", [given, graph.constant(layer.step, np.float32), graph.constant(zero, np.uint8)]
            )
            if (low, high) != (0, 255) and not (x in self.unsigned and high == 255):
                codes = graph.add("Clip", [codes, graph.constant(low, np.uint8), graph.constant(high, np.uint8)])
            self.codes[key] = codes
        return self.codes[key]

    def _zero_of(self, x: str, layer: QuantizedLayer | RoundedFeatures) -> int:
        """The unsigned byte that stands for zero in the codes of the traced value ``x``.

        Few unsigned bits of what has no negative values lie at the upper end, where the runtime clips without a node for it.
        """
        return 255 - layer.high if x in self.unsigned and layer.low == 0 else layer.zero

    def _convolve(self, op: str, layer: QuantizedLayer, inputs: list[str], pads: Sequence[int] | None = None) -> str:
        """Add a convolution.

        Args:
            pads: (top, left, bottom, right); None: the layer's.
        """
        geometry = layer.geometry
        assert geometry is not None
        return self.graph.add(
            op,
            inputs,
            kernel_shape=list(layer.codes.shape[2:]),
            strides=list(geometry.stride),
            pads=pads_of(geometry) if pads is None else pads,
            dilations=list(geometry.dilation),
            group=geometry.groups,
        )


def pads_of(geometry: Convolution) -> tuple[int, ...]:
    """The padding as (top, left, bottom, right)."""
    return geometry.padding * (4 // len(geometry.padding))


def _key(x: str, layer: QuantizedLayer | RoundedFeatures) -> tuple[str, float, int, int]:
    """Names the codes of a traced value as a layer reads them."""
    return x, layer.step, layer.low, layer.high
