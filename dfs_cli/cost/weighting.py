"""What a multiply-accumulate costs at a bitwidth, and in which unit: defined only here."""

from __future__ import annotations

from dfs_cli.presets import FULL_BITS

UNIT = "bit-weighted MACs, as a fraction of the dense 32-bit network's MACs"
"""The unit of every cost and every budget."""

RULE = "A b-bit MAC costs (b/32)^2 of a 32-bit one; costs are fractions of the dense 32-bit network's MACs."
"""The definition of the unit, for reports."""


def mac_cost(bits: int) -> float:
    """Cost of a ``bits``-bit multiply-accumulate relative to a 32-bit one, ``(bits/32)**2`` (DFS, Shen et al., 2020)."""
    return (bits / FULL_BITS) ** 2
