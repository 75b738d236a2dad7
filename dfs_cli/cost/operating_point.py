"""The operating point: the number at which the mean cost of images meets a target."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

LOWEST_SHARE, HIGHEST_SHARE = 0.9, 1.01
"""The promise: the mean cost is at most the second of these shares of the budget (1% above it is for sampling); of a network
that is to spend its budget, at least the first."""


class OperatingPoint(NamedTuple):
    """A value of the operating point, and what it gives on the held-out images: their mean cost, and their top-1 in percent
    where it was looked at."""

    value: float
    cost: float
    top1: float | None = None


def keeps_budget(cost: float, budget: float, spend: bool) -> bool:
    """Whether a mean cost keeps what is promised."""
    return (LOWEST_SHARE * budget if spend else 0.0) <= cost <= HIGHEST_SHARE * budget


def cheapest_of_the_best(points: list[OperatingPoint]) -> OperatingPoint:
    """Of the points with the highest top-1 the one of least cost."""
    return min(points, key=lambda point: (-(point.top1 or 0.0), point.cost))


def target_cost(budget: float, deviation: float, calibration_images: int, validation_images: int) -> float:
    """The mean cost to aim at on held-out images, so that other images keep the budget too.

    Three standard errors of the difference between the two sample means below the highest cost allowed, at most the
    budget itself and at least 0.93 of it.

    Args:
        deviation: standard deviation of the cost between images.
    """
    error = sampling_error(deviation, calibration_images, validation_images)
    return min(budget, max(HIGHEST_SHARE * budget - 3 * error, 0.93 * budget))


def sampling_error(deviation: float, calibration_images: int, validation_images: int) -> float:
    """Standard error of the difference between the means of two samples."""
    return deviation * math.sqrt(1 / calibration_images + 1 / max(validation_images, 1))


def find_operating_point(
    cost_at: Callable[[float], Tensor],
    target: float,
    start: float = 0.0,
    tolerance: float = 0.002,
    max_evaluations: int = 60,
) -> OperatingPoint:
    """Bisection for a value at which the mean cost is at most ``target`` and as close to it as can be found.

    Args:
        cost_at: gives the cost of every calibration image, (N,), at a value. Its mean falls with the value, in steps.
        target: mean cost, in the units of ``cost_at``.
        start: where to look first.
        tolerance: how far below the target is good enough, relative to it.

    Returns:
        Of the values tried, the one with the largest mean cost not above the target; where all were above it, the one
        with the smallest.
    """
    tried: list[OperatingPoint] = []

    def too_dear(value: float) -> bool:
        tried.append(OperatingPoint(value, float(cost_at(value).mean())))
        return tried[-1].cost > target

    def done() -> bool:
        return len(tried) >= max_evaluations or target * (1 - tolerance) <= tried[-1].cost <= target

    # Bracket the target by steps that grow, away from the start; a negative multiplier rewards spending.
    dear = cheap = start
    stride = max(1.0, abs(start) / 8)
    if too_dear(start):
        cheap = start + stride
        while not done() and too_dear(cheap):
            stride *= 4
            dear, cheap = cheap, cheap + stride
    else:
        dear = start - stride
        while not done() and abs(dear) < 1e9 and not too_dear(dear):
            stride *= 4
            cheap, dear = dear, dear - stride
    while not done() and (middle := (dear + cheap) / 2) not in (dear, cheap):
        if too_dear(middle):
            dear = middle
        else:
            cheap = middle
    affordable = [point for point in tried if point.cost <= target]
    if affordable:
        return max(affordable, key=lambda point: point.cost)
    return min(tried, key=lambda point: point.cost)
