"""The parts of a network as traced nodes: stem, every block with every option, head."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from dfs_cli.export.trace import Traced, trace
from dfs_cli.nn.layers import FractionalLayer
from dfs_cli.nn.network import DynamicResNet

Key = str | tuple[int, int]
"""Names a part: ``stem``, ``head``, or a block's index with an option's index."""


class Parts:
    """The parts of a network, each traced when it is first needed.

    Args:
        network: in evaluation mode, on the CPU.
        input_size: (C, H, W) of the images.
    """

    def __init__(self, network: DynamicResNet, input_size: tuple[int, int, int]) -> None:
        self.network, self.input_size = network, input_size
        self._stem, x = trace(network.backbone, network.layout.stem, torch.zeros(1, *input_size))
        features = [x]
        for block in network.blocks:
            with torch.no_grad():
                x = block.skip(block.module, x)
            features.append(x)
        self.features: tuple[Tensor, ...] = tuple(features)
        """L + 1 samples (1, C, H, W) of the shapes that enter each block and the head."""
        self._head, logits = trace(network.backbone, network.layout.head, x)
        self.classes = int(logits.shape[1])
        self._option = cache(self._trace_option)

    def part(self, key: Key) -> Traced:
        """The nodes of a part."""
        if isinstance(key, tuple):
            return self._option(*key)
        return self._stem if key == "stem" else self._head

    def is_identity(self, block: int, option: int) -> bool:
        """Whether an option of a block hands on its input unchanged."""
        return all(node.op_type == "Identity" for node in self.part((block, option)).graph.node)

    def layer_bits(self, block: int, option: int) -> set[int]:
        """The bitwidths at which layers of a block run with an option; none where it is skipped."""
        part, bits = self.network.blocks[block], self.network.bits[option]
        if bits == 0:
            return set()
        with part.precision.at(bits):
            layers = (layer for layer in part.module.modules() if isinstance(layer, FractionalLayer))
            return {layer.precision.bits for layer in layers}

    def _trace_option(self, block: int, option: int) -> Traced:
        part, x = self.network.blocks[block], self.features[block]
        if (bits := self.network.bits[option]) == 0:
            return trace(part.module, part.skip, x)[0]
        with part.precision.at(bits):
            return trace(part.module, lambda module, x: module(x), x)[0]
