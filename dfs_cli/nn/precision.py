"""The current bitwidth of a residual block: set here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from dfs_cli.config import FULL_BITS


@dataclass(frozen=True)
class Routing:
    """What the layers of a block need to give the gate its gradient in training.

    Args:
        probs: (N, K), the gate's probabilities for the images that run.
        bits: the K options.
    """

    probs: Tensor
    bits: tuple[int, ...]


class Precision:
    """The bitwidth that the layers sharing this object run at; the default outside :meth:`at`."""

    def __init__(self, default: int = FULL_BITS) -> None:
        self.bits = default
        self.routing: Routing | None = None

    @contextmanager
    def at(self, bits: int, routing: Routing | None = None) -> Iterator[None]:
        """Run at ``bits`` within the context; what was set before is restored, whatever happens."""
        before = self.bits, self.routing
        self.bits, self.routing = bits, routing
        try:
            yield
        finally:
            self.bits, self.routing = before
