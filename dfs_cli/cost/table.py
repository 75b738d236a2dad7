"""The cost table: the one source of every figure about cost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dfs_cli.config import FULL_BITS
from dfs_cli.errors import ConfigError


def relative_cost(bits: int) -> float:
    """Cost of a ``bits``-bit multiply-accumulate relative to a 32-bit one, ``(bits/32)**2`` (DFS, Shen et al., 2020)."""
    return (bits / FULL_BITS) ** 2


@dataclass(frozen=True)
class LayerCost:
    """One layer's MACs for one image.

    Args:
        name: module path.
        macs: multiply-accumulates.
        block: index of the residual block whose option it follows; None: it always runs, at ``bits``.
        bits: bitwidth of a layer that always runs.
    """

    name: str
    macs: int
    block: int | None = None
    bits: int | None = None


@dataclass(frozen=True)
class CostTable:
    """Bit-weighted cost of the whole network, as fractions of the dense 32-bit network's MACs.

    Args:
        options: the K bitwidths, ascending.
        blocks: names of the L blocks.
        layers: every layer with MACs, in the order of the network.
        gate_macs: the gate's MACs per block; they always run, at 32 bits, and the dense network does not have them.
        not_counted: operations that have no MACs, and how often they occur.
    """

    options: tuple[int, ...]
    blocks: tuple[str, ...]
    layers: tuple[LayerCost, ...]
    gate_macs: tuple[int, ...]
    not_counted: dict[str, int]

    @cached_property
    def dense_macs(self) -> int:
        """MACs of the dense network for one image."""
        return sum(layer.macs for layer in self.layers)

    @cached_property
    def block_macs(self) -> tuple[int, ...]:
        """MACs of each block's residual branch, (L,)."""
        totals = [0] * len(self.blocks)
        for layer in self.layers:
            if layer.block is not None:
                totals[layer.block] += layer.macs
        return tuple(totals)

    @cached_property
    def prices(self) -> Tensor:
        """Cost of each option of each block, (L, K) in float64."""
        share = torch.tensor(self.block_macs, dtype=torch.float64) / self.dense_macs
        return share[:, None] * torch.tensor([relative_cost(b) for b in self.options], dtype=torch.float64)

    @cached_property
    def fixed(self) -> float:
        """Cost of what always runs, the gate included."""
        always = sum(layer.macs * relative_cost(layer.bits) for layer in self.layers if layer.bits is not None)
        return (always + sum(self.gate_macs)) / self.dense_macs

    @property
    def cheapest(self) -> float:
        """The smallest cost that any decision can have."""
        return self.fixed + float(self.prices.min(dim=1).values.sum())

    @property
    def dearest(self) -> float:
        """The largest cost that any decision can have."""
        return self.fixed + float(self.prices.max(dim=1).values.sum())

    def cost(self, decisions: Tensor) -> Tensor:
        """Cost of each image, (N,) in float64, for ``decisions`` (N, L) as option indices."""
        prices = self.prices.to(decisions.device)
        return self.fixed + prices.gather(1, decisions.T).sum(dim=0)

    def expected_cost(self, probs: Tensor) -> Tensor:
        """Cost of each image, (N,), under option probabilities (N, L, K); differentiable."""
        prices = self.prices.to(device=probs.device, dtype=probs.dtype)
        return self.fixed + (probs * prices).sum(dim=(1, 2))

    def uniform_cost(self, bits: int) -> float:
        """Cost of the static network, without a gate, that runs everything at ``bits`` bits."""
        return relative_cost(bits)

    def check_budget(self, budget: float) -> None:
        """Raises ConfigError where no decision can cost ``budget``; the message names the reachable range."""
        options = ",".join(map(str, self.options))
        if budget < self.cheapest:
            raise ConfigError(
                f"budget {budget:g} cannot be reached with options {options}: "
                f"the smallest reachable one is {_round_up(self.cheapest):.4f}"
            )
        if 0.9 * budget > self.dearest:
            raise ConfigError(
                f"budget {budget:g} cannot be spent with options {options}: they cost at most {self.dearest:.4f}; "
                f"pass a smaller --budget or wider --bits"
            )

    def to_dict(self) -> dict[str, Any]:
        return {
            "options": list(self.options),
            "blocks": list(self.blocks),
            "layers": [[layer.name, layer.macs, layer.block, layer.bits] for layer in self.layers],
            "gate_macs": list(self.gate_macs),
            "not_counted": self.not_counted,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CostTable:
        return cls(
            options=tuple(values["options"]),
            blocks=tuple(values["blocks"]),
            layers=tuple(LayerCost(*row) for row in values["layers"]),
            gate_macs=tuple(values["gate_macs"]),
            not_counted=dict(values["not_counted"]),
        )


def _round_up(cost: float, digits: int = 4) -> float:
    unit = 10.0**-digits
    return -(-cost // unit) * unit
