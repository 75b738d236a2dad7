"""Setting the operating point on images held out of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dfs_cli.cost.operating_point import OperatingPoint, find_operating_point, target_cost
from dfs_cli.cost.table import CostTable
from dfs_cli.nn.network import DynamicResNet


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
    images = sum(len(b) for b in batches)
    point = find_operating_point(cost_at, budget, start=network.operating_point)
    deviation = float(cost_at(point.value).std(unbiased=False))
    target = target_cost(budget, deviation, images, validation_images)
    if target < budget:
        point = find_operating_point(cost_at, target, start=point.value)
    network.operating_point = point.value
    return point
