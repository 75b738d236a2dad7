"""The cost table: the one source of every figure about cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dfs_cli.config import FULL_BITS
from dfs_cli.cost.operating_point import LOWEST_SHARE
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
        gate_macs: the gate's MACs per block, at 32 bits; the dense network does not have them. With one pass they always
            run, with two for the images that enter the second.
        not_counted: operations that have no MACs, and how often they occur.
        passes: how often an image may run through the network, 1 or 2.
    """

    options: tuple[int, ...]
    blocks: tuple[str, ...]
    layers: tuple[LayerCost, ...]
    gate_macs: tuple[int, ...]
    not_counted: dict[str, int]
    passes: int = 1

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
    def gate_cost(self) -> float:
        """Cost of the gate."""
        return sum(self.gate_macs) / self.dense_macs

    @cached_property
    def edges_cost(self) -> float:
        """Cost of what always runs in a pass, besides the gate."""
        always = sum(layer.macs * relative_cost(layer.bits) for layer in self.layers if layer.bits is not None)
        return always / self.dense_macs

    @property
    def fixed(self) -> float:
        """Cost that every image pays whatever is decided."""
        return self.edges_cost + (self.gate_cost if self.passes == 1 else 0.0)

    @property
    def last_pass_fixed(self) -> float:
        """Cost of the gate's own pass besides its blocks: of the only pass, or of the second."""
        return self.edges_cost + self.gate_cost

    @property
    def cheapest(self) -> float:
        """The smallest cost that any decision can have."""
        return self.fixed + float(self.prices.min(dim=1).values.sum())

    @property
    def dearest(self) -> float:
        """The largest cost that any decision can have."""
        widest = float(self.prices.max(dim=1).values.sum())
        return self.passes * (self.edges_cost + widest) + self.gate_cost

    def block_costs(self, decisions: Tensor) -> Tensor:
        """Cost of each block over all passes, (N, L) in float64, for ``decisions`` (N, P * L)."""
        blocks = len(self.blocks)
        prices = self.prices.to(decisions.device)
        total = torch.zeros(len(decisions), blocks, dtype=torch.float64, device=decisions.device)
        for choice in decisions.split(blocks, dim=1):
            total += prices.gather(1, choice.clamp_min(0).T).T * (choice >= 0)
        return total

    def cost(self, decisions: Tensor) -> Tensor:
        """Cost of each image, (N,) in float64.

        Args:
            decisions: (N, P * L) option indices, pass after pass; -1 in a pass that was not run.
        """
        total = self.fixed + self.block_costs(decisions).sum(dim=1)
        for choice in decisions.split(len(self.blocks), dim=1)[1:]:
            total = total + self.last_pass_fixed * (choice[:, 0] >= 0)
        return total

    def expected_cost(self, probs: Tensor) -> Tensor:
        """Cost (N,) of the pass that the gate decides on, under option probabilities (N, L, K); differentiable."""
        prices = self.prices.to(device=probs.device, dtype=probs.dtype)
        return self.last_pass_fixed + (probs * prices).sum(dim=(1, 2))

    def pass_cost(self, choice: Tensor) -> Tensor:
        """Cost (N,) of the pass that the gate decides on, under options ``choice`` (N, L)."""
        return self.last_pass_fixed + self.block_costs(choice).sum(dim=1)

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
        if LOWEST_SHARE * budget > self.dearest:
            raise ConfigError(
                f"budget {budget:g} cannot be spent with options {options}: they cost at most {self.dearest:.4f}; "
                f"pass a smaller --budget or wider --bits"
            )

    def with_layer_bits(self, bits: Mapping[str, int]) -> CostTable:
        """The costs of the static network whose blocks' layers, by name, run at ``bits``; 0: their block is skipped."""
        layers = tuple(
            layer if layer.block is None else replace(layer, block=None, bits=bits[layer.name]) for layer in self.layers
        )
        return replace(self, layers=layers)

    def to_dict(self) -> dict[str, Any]:
        return {
            "options": list(self.options),
            "blocks": list(self.blocks),
            "layers": [[layer.name, layer.macs, layer.block, layer.bits] for layer in self.layers],
            "gate_macs": list(self.gate_macs),
            "not_counted": self.not_counted,
            "passes": self.passes,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CostTable:
        return cls(
            options=tuple(values["options"]),
            blocks=tuple(values["blocks"]),
            layers=tuple(LayerCost(*row) for row in values["layers"]),
            gate_macs=tuple(values["gate_macs"]),
            not_counted=dict(values["not_counted"]),
            passes=int(values["passes"]),
        )


def _round_up(cost: float, digits: int = 4) -> float:
    unit = 10.0**-digits
    return -(-cost // unit) * unit
