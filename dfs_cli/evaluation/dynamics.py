"""How much a network's decisions depend on the image."""

from __future__ import annotations

from dfs_cli.cost.decisions import Decisions
from dfs_cli.cost.table import CostTable


def choice_entropy(decisions: Decisions) -> float:
    """Mean over blocks and passes of the entropy, in bits, of the choice over images; not taking a pass is a choice."""
    entropies = []
    for column in decisions.options.flatten(1).T:
        shares = column.unique(return_counts=True)[1].double() / len(column)
        entropies.append(float(-(shares * shares.log2()).sum()))
    return sum(entropies) / len(entropies)


def variance_between_images(table: CostTable, decisions: Decisions) -> float:
    """Share of the variance of block costs (N, L) that lies between images, as in an analysis of variance.

    The variance of the images' means over blocks, over the variance of all values. Zero for a static network.
    """
    costs = table.block_costs(decisions)
    total = float(costs.var(correction=0))
    return float(costs.mean(dim=1).var(correction=0)) / total if total > 0 else 0.0
