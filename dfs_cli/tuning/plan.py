"""How a budget is divided between the two passes of a probed network."""

from __future__ import annotations

import torch
from torch import Tensor

from dfs_cli.cost.operating_point import find_operating_point, sampling_error
from dfs_cli.cost.table import CostTable
from dfs_cli.nn.probe import ProbedResNet
from dfs_cli.tuning.loop import LEAST_PRICE, Goal
from dfs_cli.tuning.static_mix import best_static_mix

# Of the budget, what the first pass costs, unless the cheapest mix costs more.
_FIRST_SHARE = 0.65
# More than this for all images is wasted on the first pass: six bits lose next to nothing.
_FIRST_LIMIT = 0.04
# The share of images planned for the second pass; more where each would cost more than eight bits do.
_SECOND_SHARE, _SECOND_LIMIT = 0.2, 0.0625
# A second pass costs at least this share of the first: a much poorer look has nothing to add.
_SECOND_LEAST = 0.6
# Left for the second pass at least, where the first can cost no less than the budget.
_LEAST_REST = 1e-3
# Largest share of the budget that the mean cost of two samples may differ by (one standard error), as planned.
_PLANNED_ERROR = 0.02


@torch.no_grad()
def plan_passes(
    network: ProbedResNet, table: CostTable, damage: Tensor, budget: float, calibration_images: int, images: int
) -> Goal:
    """Set the first pass's policy and the price of the second, and tell what to tune for.

    The first pass gets the best static mix for its part of the budget, the second the mix that the gate's preferences
    give for what remains, for a share of the images. The fewer images the operating point is calibrated on, the larger that
    share and the cheaper the second pass: the mean cost of few images says less about others' the more the images differ.

    Args:
        damage: (L, K), from :func:`dfs_cli.tuning.sensitivity.measure_damage`.
        calibration_images, images: how many the operating point is set on, and how many it is to hold for.
    """
    cheapest = table.edges_cost + float(table.prices.min(dim=1).values.sum())
    dearest = table.last_pass_fixed + float(table.prices.max(dim=1).values.sum())
    # No more than what the budget's part allows, no less than what the second pass cannot spend.
    first = max(min(_FIRST_SHARE * budget, _FIRST_LIMIT), min(cheapest, budget), budget - dearest)
    network.policy.copy_(best_static_mix(table, damage, first))
    rest = max(budget - table.cost(network.policy[None].cpu()).item(), _LEAST_REST * budget)
    share = _SECOND_SHARE
    # The deviation of the cost between images is rest * sqrt((1 - share) / share).
    allowed = _PLANNED_ERROR * budget / (rest * sampling_error(1.0, calibration_images, images))
    share = max(share, 1 / (1 + allowed**2))
    share = min(1.0, max(share, rest / min(dearest, _SECOND_LIMIT)))
    second = max(rest / share, _SECOND_LEAST * (budget - rest))
    network.price = price_for(network, table, second)
    return Goal(second, min(1.0, rest / second))


def price_for(network: ProbedResNet, table: CostTable, cost: float) -> float:
    """The price, positive, at which the gate's preferences alone make the second pass cost at most ``cost``."""
    preference = network.gate.preference.detach().double().cpu()

    def cost_at(price: float) -> Tensor:
        return table.pass_cost((preference - price * table.prices).argmax(dim=1)[None])

    return max(find_operating_point(cost_at, cost).value, LEAST_PRICE)
