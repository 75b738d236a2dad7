"""The parts of a network as traced nodes: stem, every block with every option, head."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from dfs_cli.export.batched import trace_batched
from dfs_cli.export.trace import Traced, trace
from dfs_cli.nn.features import ByteFeatures
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.passes import View
from dfs_cli.presets import BatchSize

Key = str | tuple[int, int]
"""Names a part: ``stem``, ``head``, or a block's index with an option's index."""


class Parts:
    """The parts of a network, each traced when it is first needed.

    Args:
        network: in evaluation mode, on the CPU.
        input_size: (C, H, W) of the images.
        batch: how many of them the graph takes at once.
        scale: of what a pass over these parts sees of them, see :class:`dfs_cli.nn.passes.View`.
    """

    def __init__(
        self, network: DynamicResNet, input_size: tuple[int, int, int], batch: BatchSize = 1, scale: float = 1.0
    ) -> None:
        self.network, self.input_size, self.batch, self.view = network, input_size, batch, View(scale=scale)
        self._trace = trace if batch == 1 else trace_batched
        stem = _Part(network.backbone, None if network.features is None else network.features.at(0))
        with network.seeing(self.view):
            self._stem, x = self._trace(stem, _running(network.layout.stem), self.view.of(torch.zeros(1, *input_size)))
            features = [x]
            for block in network.blocks:
                with torch.no_grad():
                    x = block.skip(block.module, x)
                features.append(x)
            self._head, logits = self._trace(network.backbone, network.layout.head, x)
        self.features: tuple[Tensor, ...] = tuple(features)
        """L + 1 samples (1, C, H, W) of the shapes that enter each block and the head."""
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

    def _trace_option(self, block: int, option: int) -> Traced:
        part, x = self.network.blocks[block], self.features[block]
        if (bits := self.network.bits[option]) == 0:
            output = None if part.keeps_input else part.output
            with self.network.seeing(self.view):
                return self._trace(_Part(part.module, output), _running(part.skip), x)[0]
        with self.network.seeing(self.view), part.precision.at(bits):
            return self._trace(_Part(part.module, part.output), _running(lambda module, x: module(x)), x)[0]


class _Part(nn.Module):
    """A module, and what rounds its result, so that both are traced."""

    def __init__(self, module: nn.Module, features: ByteFeatures | None) -> None:
        super().__init__()
        self.module, self.features = module, features or nn.Identity()


def _running(run: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    """Runs a :class:`_Part` whose module is run by ``run``."""
    return lambda part, x: part.get_submodule("features")(run(part.get_submodule("module"), x))
