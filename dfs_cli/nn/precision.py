"""The current bitwidth of layers, and the view that they see: set here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from dfs_cli.presets import FULL_BITS


@dataclass(frozen=True)
class Routing:
    """What the layers of a block need to give the gate its gradient in training.

    Args:
        probs: (N, K), the gate's probabilities for the images that run.
        bits: the K options.
    """

    probs: Tensor
    bits: tuple[int, ...]


class Viewpoint:
    """Which size of the images the layers that share this object see.

    Args:
        sizes: how many there are; the first one is the full size.
    """

    def __init__(self, sizes: int = 1) -> None:
        self.sizes = sizes
        self.index = 0

    @contextmanager
    def at(self, index: int) -> Iterator[None]:
        """See the images at a size within the context; the previous setting is restored after it."""
        before, self.index = self.index, index
        try:
            yield
        finally:
            self.index = before


class Precision:
    """The bitwidth that the layers sharing this object run at.

    Args:
        options: the bitwidths that may be set, 2..16 or 32; outside :meth:`at` it is the widest.
        viewpoint: of the network; None: all views have the same size.
    """

    def __init__(self, options: tuple[int, ...], viewpoint: Viewpoint | None = None) -> None:
        self.options = options
        self.viewpoint = viewpoint or Viewpoint()
        self.bits = max(options)
        self.routing: Routing | None = None

    @property
    def quantized(self) -> tuple[int, ...]:
        """The options that are not floating point."""
        return tuple(bits for bits in self.options if bits != FULL_BITS)

    @property
    def may_be_full(self) -> bool:
        """Whether floating point is an option."""
        return FULL_BITS in self.options

    @contextmanager
    def at(self, bits: int, routing: Routing | None = None) -> Iterator[None]:
        """Run at ``bits`` within the context; the previous setting is restored after it."""
        before = self.bits, self.routing
        self.bits, self.routing = bits, routing
        try:
            yield
        finally:
            self.bits, self.routing = before
