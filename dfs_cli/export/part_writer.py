"""Parts as nodes of a graph, and whole passes of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from onnx import TensorProto

from dfs_cli.export.graph import Graph, Test
from dfs_cli.export.groups import Choice, write_groups
from dfs_cli.export.int8_features import Int8Lowering, pool_codes
from dfs_cli.export.parts import Key, Parts
from dfs_cli.export.tensorrt import TensorRTLowering
from dfs_cli.export.trace import RoundedFeatures
from dfs_cli.nn.passes import View


class Pooled(NamedTuple):
    """The mean over the pixels of features, as ``scale`` times a value (N, 1, C) in single precision, by name."""

    name: str
    scale: float


Decide = Callable[[Graph, int, Pooled | None], Test]
"""From the graph, a block's index and the mean of its input to the test for options; see :meth:`Graph.choose`."""

Choose = Callable[[Graph, int, Pooled | None], Choice]
"""From the graph, a block's index and the mean of its input to the options of several images."""


class PartWriter:
    """Writes parts, with features as bytes between them where the network's are.

    Args:
        parts: of the network.
        tensorrt: write what TensorRT's importer takes, see :mod:`dfs_cli.export.tensorrt`.
        view: what a pass over the parts sees, of their scale; None: no more than that is done.
    """

    def __init__(self, parts: Parts, tensorrt: bool = False, view: View | None = None) -> None:
        self.parts, self.network = parts, parts.network
        self._tensorrt = tensorrt
        self.view = view or parts.view
        self._seeing: dict[View, PartWriter] = {self.view: self}
        stream = None if tensorrt else self.network.features
        self._formats = [
            None if stream is None else RoundedFeatures.of(stream.at(position))
            for position in range(len(parts.features))
        ]

    def seeing(self, view: View) -> PartWriter:
        """The writer of the same network's parts for what another pass sees."""
        if view not in self._seeing:
            has_parts = view.scale == self.parts.view.scale
            parts = (
                self.parts if has_parts else Parts(self.network, self.parts.input_size, self.parts.batch, view.scale)
            )
            self._seeing[view] = PartWriter(parts, self._tensorrt, view)
        return self._seeing[view]

    @property
    def features(self) -> str:
        """What blocks hand on: ``int8`` or ``float``."""
        return "float" if self._formats[0] is None else "int8"

    @property
    def batched(self) -> bool:
        """Whether there may be several images."""
        return self.parts.batch != 1

    def write(self, graph: Graph, key: Key, x: str) -> str:
        """Add a part to ``graph`` with ``x`` as its input; returns its output."""
        if isinstance(key, tuple) and self._keeps_input(*key):
            return x
        traced = self.parts.part(key)
        if self._tensorrt:
            return TensorRTLowering(graph, traced, x).run()
        return Int8Lowering(graph, traced, x, *self._formats_of(key), self.batched).run()

    def pool(self, graph: Graph, block: int, x: str) -> Pooled:
        """The mean over the pixels of ``x``, the input of a block, or of the head where ``block`` is L."""
        if (given := self._formats[block]) is None:
            mean = graph.add("ReduceMean", [x], axes=[2, 3], keepdims=0)
            mean = graph.add("Unsqueeze", [mean, graph.constant([1], np.int64)])
        else:
            sums = pool_codes(graph, x, given.zero, *self.parts.features[block].shape[1:])
            mean = graph.add("Cast", [sums], to=TensorProto.FLOAT)
        return Pooled(mean, self._mean_scale(block))

    def write_pass(self, graph: Graph, images: str, policy: Sequence[int]) -> tuple[str, str]:
        """Add one pass over what is seen of ``images``, with fixed options.

        Args:
            policy: (L,), option indices.

        Returns:
            The logits, and the features before the head.
        """
        x = self.write(graph, "stem", self._write_view(graph, images))
        for block, option in enumerate(policy):
            x = self.write(graph, (block, option), x)
        return self.write(graph, "head", x), x

    def write_deciding_pass(self, graph: Graph, images: str, decide: Decide, pools: bool) -> str:
        """Add one pass over what is seen of ``images``, with an ``If`` for every decision; returns the logits.

        Args:
            decide: gives the test for a block's options.
            pools: whether ``decide`` needs the mean of a block's input; otherwise it gets None.
        """
        x = self.write(graph, "stem", self._write_view(graph, images))
        pooled = self.pool(graph, 0, x) if pools else None
        options, last = range(len(self.network.bits)), len(self.network.blocks) - 1
        for block in range(last + 1):
            is_before = decide(graph, block, pooled)
            mean = "" if pooled is None else pooled.name

            def run(inner: Graph, option: int, block: int = block, x: str = x, mean: str = mean) -> list[str]:
                y = self.write(inner, (block, option), x)
                if not pools or block == last:
                    return [y]
                # A block that hands on its input hands on its mean, too.
                return [y, mean if self._keeps_input(block, option) else self.pool(inner, block + 1, y).name]

            branches = [lambda inner, option=option, run=run: run(inner, option) for option in options]
            x, *means = graph.choose(is_before, branches)
            pooled = Pooled(means[0], self._mean_scale(block + 1)) if means else None
        return self.write(graph, "head", x)

    def _write_view(self, graph: Graph, images: str) -> str:
        """What a pass sees of ``images`` (N, C, H, W)."""
        view = self.view
        if view.scale != 1:
            images = self._resize(graph, images, *view.size_of(*self.parts.input_size[1:]))
        if view.mirrored:
            numbers = [graph.constant([i], np.int64) for i in (-1, np.iinfo(np.int64).min, 3)]
            images = graph.add("Slice", [images, *numbers, numbers[0]])
        return images

    def _resize(self, graph: Graph, images: str, height: int, width: int) -> str:
        """``images`` (N, C, H, W), interpolated."""
        channels = self.parts.input_size[0]
        if not self.batched:
            size = graph.constant([1, channels, height, width], np.int64)
        else:
            images_and_channels = graph.add("Shape", [images], end=2)
            size = graph.add("Concat", [images_and_channels, graph.constant([height, width], np.int64)], axis=0)
        return graph.add("Resize", [images, "", "", size], mode="linear")

    def write_grouped_pass(self, graph: Graph, images: str, choose: Choose, pools: bool) -> str:
        """Add one pass over what is seen of several ``images``, each with options of its own; returns the logits (N, classes).

        Args:
            choose: gives the options of a block.
            pools: whether ``choose`` needs the mean of a block's input; otherwise it gets None.
        """
        x = self.write(graph, "stem", self._write_view(graph, images))
        means = [self.pool(graph, 0, x).name] if pools else []
        for block in range(last := len(self.network.blocks)):
            pooled = Pooled(means[0], self._mean_scale(block)) if means else None

            def run(inner: Graph, values: list[str], option: int, block: int = block) -> list[str]:
                y = self.write(inner, (block, option), values[0])
                if not pools or block + 1 == last:
                    return [y]
                return [y, values[1] if self._keeps_input(block, option) else self.pool(inner, block + 1, y).name]

            runs = [functools.partial(run, option=option) for option in range(len(self.network.bits))]
            none = self._none_of(block + 1)[: 1 if block + 1 == last else 1 + len(means)]
            x, *means = write_groups(graph, choose(graph, block, pooled), [x, *means], runs, none)
        return self.write(graph, "head", x)

    def _none_of(self, block: int) -> list[np.ndarray]:
        """The inputs of a block, or of the head, for no image, and what :meth:`pool` makes of them."""
        channels, *size = self.parts.features[block].shape[1:]
        shape, dtype = (
            ((channels, *size), np.float32) if self._formats[block] is None else ((*size, channels), np.uint8)
        )
        return [np.zeros((0, *shape), dtype), np.zeros((0, 1, channels), np.float32)]

    def _mean_scale(self, block: int) -> float:
        """The factor that turns the result of :meth:`pool` into a mean."""
        given = self._formats[block]
        return 1.0 if given is None else given.step / self.parts.features[block][0, 0].numel()

    def _keeps_input(self, block: int, option: int) -> bool:
        """Whether an option of a block hands on its input, in the same format."""
        return self._formats[block] == self._formats[block + 1] and self.parts.is_identity(block, option)

    def _formats_of(self, key: Key) -> tuple[RoundedFeatures | None, RoundedFeatures | None]:
        """The formats of a part's input and output; None: floating point."""
        if isinstance(key, tuple):
            return self._formats[key[0]], self._formats[key[0] + 1]
        return (None, self._formats[0]) if key == "stem" else (self._formats[-1], None)
