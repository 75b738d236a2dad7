import pytest
import torch

from dfs_cli.cost.operating_point import (
    OperatingPoint,
    cheapest_of_the_best,
    find_operating_point,
    keeps_budget,
    sampling_error,
    target_cost,
)


def cost_at(value: float) -> torch.Tensor:
    """A thousand images that each switch from 1 to 0.1 at a value of their own, between 5 and 15."""
    switches = torch.linspace(5, 15, 1000, dtype=torch.float64)
    return torch.where(switches > value, 1.0, 0.1).double()


@pytest.mark.parametrize("target", [0.15, 0.4, 0.77, 0.99])
@pytest.mark.parametrize("start", [0.0, 9.0, 500.0])
def test_bisection_meets_the_target(target: float, start: float) -> None:
    point = find_operating_point(cost_at, target, start=start)
    assert target * 0.995 <= point.cost <= target
    assert cost_at(point.value).mean().item() == point.cost


def test_bisection_reports_the_nearest_where_the_target_is_out_of_reach() -> None:
    assert find_operating_point(cost_at, 0.05).cost == pytest.approx(0.1)
    assert find_operating_point(cost_at, 2.0).cost == pytest.approx(1.0)


def test_bisection_ends_below_a_jump() -> None:
    def jump(value: float) -> torch.Tensor:
        return torch.full((10,), 0.5 if value < 3 else 0.2, dtype=torch.float64)

    assert find_operating_point(jump, 0.4).cost == pytest.approx(0.2)


def test_target_leaves_room_for_sampling() -> None:
    assert target_cost(0.4, 0.0, 100, 100) == 0.4
    # Three standard errors of a difference of means: 3 * 0.02 * sqrt(2 / 100) = 0.00849.
    assert sampling_error(0.02, 100, 100) == pytest.approx(0.02 * 2**0.5 / 10)
    assert target_cost(0.4, 0.02, 100, 100) == pytest.approx(0.404 - 0.00849, abs=1e-5)
    assert target_cost(0.4, 10.0, 100, 100) == pytest.approx(0.93 * 0.4), "never below 0.93 of the budget"


@pytest.mark.parametrize(
    ("cost", "spend", "kept"),
    [(0.0, False, True), (0.4039, False, True), (0.4041, False, False), (0.361, True, True), (0.359, True, False)],
)
def test_what_is_promised_of_a_budget(cost: float, spend: bool, kept: bool) -> None:
    assert keeps_budget(cost, 0.4, spend) is kept


def test_of_the_most_accurate_points_the_cheapest_is_taken() -> None:
    points = [OperatingPoint(1, 0.4, 90.0), OperatingPoint(2, 0.3, 91.0), OperatingPoint(3, 0.2, 91.0)]
    assert cheapest_of_the_best(points).value == 3
