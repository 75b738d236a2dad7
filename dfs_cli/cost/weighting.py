"""What a multiply-accumulate costs at a bitwidth, and in which unit: defined only here."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from dfs_cli.presets import FULL_BITS

UNIT = "bit-weighted MACs, as a fraction of the dense 32-bit network's MACs"
"""The unit of every cost and every budget."""

RULE = "A b-bit MAC costs (b/32)^2 of a 32-bit one; costs are fractions of the dense 32-bit network's MACs."
"""The definition of the unit, for reports."""

_STEPS = 2.0**44
"""Costs are multiples of one over this: their sums are exact then, in whatever order, and so is a limit."""


def mac_cost(bits: int) -> float:
    """Cost of a ``bits``-bit multiply-accumulate relative to a 32-bit one, ``(bits/32)**2`` (DFS, Shen et al., 2020)."""
    return (bits / FULL_BITS) ** 2


@overload
def in_steps(cost: float) -> float: ...


@overload
def in_steps(cost: Tensor) -> Tensor: ...


def in_steps(cost: float | Tensor) -> float | Tensor:
    """``cost``, of any shape, rounded so that sums of costs are exact."""
    return (cost * _STEPS).round() / _STEPS if isinstance(cost, Tensor) else round(cost * _STEPS) / _STEPS
