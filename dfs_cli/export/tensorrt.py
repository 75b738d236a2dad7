"""Quantized layers for TensorRT: signed 8-bit codes with zero points of 0.

TensorRT's importer takes quantize and dequantize nodes of int8 whose zero points are 0, weights with a scale per channel,
biases in floating point, and no integer convolutions. Other runtimes take that, too.
"""

from __future__ import annotations

import numpy as np
import onnx
import torch

from dfs_cli.export.lower import Affine, Lowering, pads_of
from dfs_cli.export.trace import MIDDLE, QuantizedLayer, RoundedFeatures
from dfs_cli.nn.integers import Folded, fold
from dfs_cli.nn.quantization import LARGEST_BYTE


class TensorRTLowering(Lowering):
    """Quantized layers become floating point layers between int8 quantize and dequantize nodes.

    Unsigned codes of 8 bits are lowered by 128. The code 0 then no longer stands for zero, so the borders are padded before.
    """

    def _on_codes(self, affine: Affine) -> str:
        return self._to_floats(affine)

    def _to_floats(self, affine: Affine) -> str:
        layer, x, graph = affine.layer, affine.x, self.graph
        # Some runtimes round the bias to an integer all the same: these codes give it finer units.
        folded = _folded(affine)
        codes, scale = folded.weight.numpy(), folded.scale.numpy()
        shift = affine.shift if layer.folded is None else folded.bias.numpy() * layer.step * scale
        if _is_lowered(layer):
            shift = shift + MIDDLE * layer.step * scale * codes.reshape(len(codes), -1).sum(axis=1)
        inputs = [self._codes(x, layer), self._dequantized(codes, scale, np.int8), graph.constant(shift, np.float32)]
        return self._apply(layer, inputs, pads=[0] * 4 if _is_lowered(layer) else None)

    def _round(self, node: onnx.NodeProto) -> None:
        features = self._reader(node)
        y = self._codes(node.input[0], features)
        if _is_lowered(features):
            y = self.graph.add("Add", [y, self.graph.constant(MIDDLE * features.step, np.float32)])
        self.names[node.output[0]] = y

    def _codes(self, x: str, layer: QuantizedLayer | RoundedFeatures) -> str:
        """The traced value ``x`` rounded to the layer's codes, in floating point."""
        graph = self.graph
        # Quantizers clip to a signed byte by themselves.
        y = self.name(x) if layer.low < -LARGEST_BYTE else self._clipped(x, layer)
        if _is_lowered(layer):
            if isinstance(layer, QuantizedLayer) and layer.geometry is not None and any(layer.geometry.padding):
                top, left, bottom, right = pads_of(layer.geometry)
                borders = [0, 0, top, left, 0, 0, bottom, right]
                y = graph.add("Pad", [y, graph.constant(borders, np.int64)])
            y = graph.add("Sub", [y, graph.constant(MIDDLE * layer.step, np.float32)])
        parameters = [graph.constant(layer.step, np.float32), graph.constant(0, np.int8)]
        return graph.add("DequantizeLinear", [graph.add("QuantizeLinear", [y, *parameters]), *parameters])


def _is_lowered(layer: QuantizedLayer | RoundedFeatures) -> bool:
    return layer.high > LARGEST_BYTE


def _folded(affine: Affine) -> Folded:
    """A quantized layer and the batch-norm behind it as integers, as the network computes them, if it does."""
    layer, factor, shift = affine.layer, torch.from_numpy(affine.factor), torch.from_numpy(affine.shift)
    if layer.folded is not None:
        return layer.folded
    codes, scale = torch.from_numpy(layer.codes), torch.from_numpy(layer.scale)
    return fold(codes, scale, layer.step, layer.bits, factor, shift)
