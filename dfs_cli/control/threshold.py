"""The two numbers of a second pass: the uncertainty above which images take it, and the multiplier of its costs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dfs_cli.control.base import HeldOut, join_batches
from dfs_cli.cost.operating_point import OperatingPoint, cheapest_of_the_best, find_operating_point
from dfs_cli.cost.table import CostTable
from dfs_cli.nn.passes import Output, uncertainty

ALWAYS_REFINE, NEVER_REFINE = -1e9, 1e9
"""Thresholds below and above every uncertainty; finite, so that they can be written as JSON."""

LEAST_MULTIPLIER = 1e-3
"""So low, a multiplier changes no decision."""

# How many shares of refined images are compared where less may be spent than the budget.
_TRIED_SHARES = 100


def best_threshold(
    outputs: Sequence[Output], costs: Tensor, first_cost: float, target: float, held_out: HeldOut, spend: bool
) -> OperatingPoint:
    """The threshold at which the most uncertain images are refined, as many as can be paid, or as do any good.

    Args:
        outputs: of the held-out images, all of them in both passes.
        costs: (N,), of both passes.
        first_cost: of the first one alone.
        target: the mean cost that is not to be exceeded.
        spend: refine as many as can be paid, even where fewer do as well.
    """
    first_answers, answers = (
        join_batches([output.answers[i].logits.argmax(dim=1) for output in outputs]) for i in (0, 1)
    )
    uncertain = join_batches([uncertainty(output.answers[0].logits) for output in outputs])
    order = uncertain.argsort(descending=True)
    # The most uncertain images whose second passes can be paid.
    mean_cost = first_cost + (costs[order] - first_cost).cumsum(0) / len(costs)
    affordable = int((mean_cost <= target).sum())

    def point_of(refined: int) -> OperatingPoint:
        value = float(uncertain[order[refined]]) if refined < len(order) else ALWAYS_REFINE
        is_refined = uncertain > value
        cost = torch.where(is_refined, costs, first_cost).mean()
        return OperatingPoint(value, float(cost), held_out.top1(torch.where(is_refined, answers, first_answers)))

    point = point_of(affordable)
    if not spend and held_out.targets is not None:
        # The same shares for every budget: a larger one can choose from all that a smaller one can.
        tried = (round(len(order) * i / _TRIED_SHARES) for i in range(_TRIED_SHARES + 1))
        point = cheapest_of_the_best([point_of(refined) for refined in tried if refined <= affordable])
    return point


def multiplier_for(preference: Tensor, table: CostTable, cost: float) -> float:
    """The multiplier, positive, at which a second pass by the gate's ``preference`` (L, K) alone costs at most ``cost``."""
    preference = preference.detach().double().cpu()

    def cost_at(multiplier: float) -> Tensor:
        return table.pass_cost((preference - multiplier * table.option_costs[1]).argmax(dim=1)[None], 1)

    return max(find_operating_point(cost_at, cost).value, LEAST_MULTIPLIER)
