"""Setting the operating point on images held out of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dfs_cli.cost.operating_point import (
    HIGHEST_SHARE,
    LOWEST_SHARE,
    OperatingPoint,
    find_operating_point,
    target_cost,
)
from dfs_cli.cost.table import CostTable
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.probe import NOBODY_IS_SURE, ProbedResNet, doubt

# The middle of the interval that the budget promises: what the gate is sure of on held-out images, it need not be as sure of on
# new ones.
_AIM = (LOWEST_SHARE + HIGHEST_SHARE) / 2


def calibrate(
    network: DynamicResNet,
    table: CostTable,
    batches: Sequence[Tensor],
    budget: float,
    validation_images: int,
    on_evaluation: Callable[[float, float], None] = lambda price, cost: None,
) -> OperatingPoint:
    """Set ``network.operating_point`` so that the mean cost of the held-out images meets ``budget``.

    Where images differ in cost, the aim is a little below the budget, so that the mean over ``validation_images`` other
    images keeps it too (see :func:`target_cost`).

    Args:
        batches: the held-out images, each (N, C, H, W), on the network's device.
        on_evaluation: called with price and mean cost after each pass over them.
    """

    @torch.inference_mode()
    def cost_at(price: float) -> Tensor:
        network.operating_point = price
        cost = torch.cat([table.cost(network.run(images).decisions).cpu() for images in batches])
        on_evaluation(price, float(cost.mean()))
        return cost

    network.eval()
    if isinstance(network, ProbedResNet):
        return _calibrate_threshold(network, table, batches, budget, on_evaluation)
    images = sum(len(b) for b in batches)
    point = find_operating_point(cost_at, budget, start=network.operating_point)
    deviation = float(cost_at(point.value).std(unbiased=False))
    target = target_cost(budget, deviation, images, validation_images)
    if target < budget:
        point = find_operating_point(cost_at, target, start=point.value)
    network.operating_point = point.value
    return point


@torch.inference_mode()
def _calibrate_threshold(
    network: ProbedResNet,
    table: CostTable,
    batches: Sequence[Tensor],
    budget: float,
    on_evaluation: Callable[[float, float], None],
) -> OperatingPoint:
    """Set the threshold of doubt; where all images may enter the second pass, its price."""

    def run_all(price: float) -> tuple[Tensor, Tensor]:
        """Doubts and costs (N,) of the held-out images, all of them in both passes."""
        network.price, network.operating_point = price, NOBODY_IS_SURE
        outputs = [network.run(images) for images in batches]
        costs = torch.cat([table.cost(output.decisions) for output in outputs]).cpu()
        on_evaluation(price, float(costs.mean()))
        return torch.cat([doubt(output.first) for output in outputs if output.first is not None]).cpu(), costs

    doubts, costs = run_all(float(network.tuned_price))
    target = _AIM * budget
    if float(costs.mean()) <= target:
        point = find_operating_point(lambda price: run_all(price)[1], target, start=network.price)
        network.price, network.operating_point = point.value, NOBODY_IS_SURE
        return OperatingPoint(NOBODY_IS_SURE, point.cost)
    first = float(table.cost(torch.cat([network.policy, torch.full_like(network.policy, -1)])[None].cpu()))

    def cost_at(threshold: float) -> Tensor:
        return torch.where(doubts > threshold, costs, first)

    def threshold_for(target: float) -> float:
        # The most doubtful images whose second passes can be paid.
        order = doubts.argsort(descending=True)
        mean_cost = first + (costs[order] - first).cumsum(0) / len(costs)
        affordable = int((mean_cost <= target).sum())
        return float(doubts[order[affordable]]) if affordable < len(order) else NOBODY_IS_SURE

    network.operating_point = threshold_for(target)
    point = OperatingPoint(network.operating_point, float(cost_at(network.operating_point).mean()))
    on_evaluation(*point)
    return point
