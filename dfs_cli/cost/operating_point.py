"""The operating point: the number at which the mean cost of images meets a target."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

LOWEST_SHARE, HIGHEST_SHARE = 0.9, 1.01
"""The promise: the mean cost is at most ``HIGHEST_SHARE`` of the budget (1% is for sampling) and, where the budget is to be
spent, at least ``LOWEST_SHARE``."""


class OperatingPoint(NamedTuple):
    """A value of the operating point, the mean cost of the held-out images at it, and their top-1 in percent, if measured."""

    value: float
    cost: float
    top1: float | None = None


def keeps_budget(cost: float, budget: float, spend: bool) -> bool:
    """Whether a mean cost keeps the promise."""
    return (LOWEST_SHARE * budget if spend else 0.0) <= cost <= HIGHEST_SHARE * budget


def cheapest_of_the_best(points: list[OperatingPoint]) -> OperatingPoint:
    """The cheapest of the points with the highest top-1."""
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
    """Find by bisection a value at which the mean cost is at most ``target``, and close to it.

    Args:
        cost_at: returns the costs (N,) of the held-out images at a value; their mean falls in steps as the value rises.
        target: mean cost, in the units of ``cost_at``.
        start: the first value tried.
        tolerance: how far below the target the cost may end, relative to it.
        max_evaluations: the most values tried.

    Returns:
        Of the values tried, the one with the largest mean cost not above the target; where all were above it, the one
        with the smallest.
    """
    tried: list[OperatingPoint] = []

    def is_too_expensive(value: float) -> bool:
        tried.append(OperatingPoint(value, float(cost_at(value).mean())))
        return tried[-1].cost > target

    def done() -> bool:
        return len(tried) >= max_evaluations or target * (1 - tolerance) <= tried[-1].cost <= target

    # Bracket the target by steps that grow, away from the start; a negative multiplier rewards spending.
    expensive = cheap = start
    stride = max(1.0, abs(start) / 8)
    if is_too_expensive(start):
        cheap = start + stride
        while not done() and is_too_expensive(cheap):
            stride *= 4
            expensive, cheap = cheap, cheap + stride
    else:
        expensive = start - stride
        while not done() and abs(expensive) < 1e9 and not is_too_expensive(expensive):
            stride *= 4
            cheap, expensive = expensive, expensive - stride
    while not done() and (middle := (expensive + cheap) / 2) not in (expensive, cheap):
        if is_too_expensive(middle):
            expensive = middle
        else:
            cheap = middle
    affordable = [point for point in tried if point.cost <= target]
    if affordable:
        return max(affordable, key=lambda point: point.cost)
    return min(tried, key=lambda point: point.cost)
