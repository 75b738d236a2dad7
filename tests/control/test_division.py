"""How a budget is divided where costs are those of a device."""

import math

import pytest
import torch
from common import SIZE, make_dynamic, tiny_resnet

from dfs_cli.config import DynamicConfig
from dfs_cli.control.base import Request, Sensitivity, controller_of
from dfs_cli.control.division import Division, divide, regret
from dfs_cli.cost.decisions import Decisions
from dfs_cli.cost.device import DeviceCosts
from dfs_cli.cost.table import CostTable
from dfs_cli.nn.passes import View
from dfs_cli.surgery.initialise import fit_steps
from dfs_cli.surgery.plan import plan_costs

pytestmark = pytest.mark.medium

CONFIG = DynamicConfig(bits=(0, 4, 8), gate="probe", mirror=True)
MODEL = tiny_resnet()
# What each option does to the predictions, the later blocks more.
HARM = torch.outer(torch.arange(1.0, 6.0), torch.tensor([0.4, 0.05, 0.0]))


def costs_of(blocks: tuple[float, ...]) -> CostTable:
    """Each of five blocks costs so much, all that always runs 1, the dense network 40; deciding 0.2 and 0.5."""
    table = plan_costs(MODEL, CONFIG, SIZE)
    costs = DeviceCosts(
        "tiny", SIZE, "ms", True, {}, CONFIG.bits, dict.fromkeys(table.blocks, blocks), 1.0, 40.0,
        deciding={"probe": ((0.2, 0.0), (0.5, 0.1))}, crowding=0.25,
    )  # fmt: skip
    return table.on_device(costs, "probe")


def divided(table: CostTable, budget: float, mirrored: bool = True, limit: float = math.inf) -> Division:
    torch.manual_seed(0)
    network, images = make_dynamic(MODEL, CONFIG), torch.randn(64, *SIZE)
    fit_steps(network, images)
    return divide(network.eval(), table, HARM, budget, images, (View(), View(mirrored=mirrored)), limit)


def test_a_division_costs_what_it_says() -> None:
    table = costs_of((0.0, 4.0, 4.0))
    division = divided(table, 0.8)
    assert division.again is not None
    first, again = ([int(option > 0) for option in mix.tolist()] for mix in (division.first, division.again))
    looked = (1 + 0.2 + 4.0 * sum(first)) / 40
    # A block that runs again costs a quarter more, and each block that runs is decided about.
    crowded = sum(1 + 0.25 * before for before, runs in zip(first, again, strict=True) if runs)
    second = (1 + 0.5 + 4.0 * crowded + 0.1 * sum(again)) / 40
    assert division.second == pytest.approx(second)
    assert division.share == pytest.approx(min(1.0, (0.8 - looked) / second))


def test_regret_by_hand() -> None:
    wanted = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.4, 0.3], [0.0, 0.0, 1.0]])
    right, doubtful, wrong = torch.eye(3)[[0, 1, 2]], torch.eye(3)[[0, 0, 2]], torch.eye(3)[[1, 1, 0]]
    assert regret(right, wanted) == 0
    assert regret(doubtful, wanted) == pytest.approx(0.1 / 3)
    assert regret(100 * wrong, wanted) == regret(wrong, wanted) == pytest.approx((0.5 + 1.0) / 3)


def test_where_bits_save_a_second_pass_may_have_its_share() -> None:
    table = costs_of((0.0, 1.0, 4.0))
    for budget in (0.3, 0.45, 0.6):
        division = divided(table, budget)
        first = table.cost(Decisions.alike(division.first, 1)).item()
        assert 0 < division.share <= 1 and first + division.share * division.second <= budget + 1e-9


def test_both_passes_together_cost_no_more_than_the_limit() -> None:
    table = costs_of((0.0, 1.0, 4.0))
    for limit in (0.6, 0.45, 0.3):
        division = divided(table, 0.45, limit=limit)
        # Where one pass for all is best, nothing is decided, and the network becomes a static one.
        costs = table if division.share else table.without_deciding()
        assert costs.cost(Decisions.alike(division.first, 1)).item() + division.second <= limit
    assert divided(table, 0.45, limit=0.6).share > 0


def test_the_probe_starts_with_the_division_and_its_costs_are_those_after_the_first_pass() -> None:
    table = costs_of((0.0, 1.0, 4.0))
    torch.manual_seed(0)
    network, images = make_dynamic(MODEL, CONFIG, table=table), torch.randn(64, *SIZE)
    fit_steps(network, images)
    controller = controller_of(network.eval())
    target = controller.start(network, table, Sensitivity(HARM), Request(0.3, True, 64, 64), images)
    settled = controller.settle(table)
    low, high = controller.movable(settled)
    assert low + target.share * target.cost == pytest.approx(0.3)
    assert high == pytest.approx(low + settled.dearest_pass(1))
    assert torch.equal(controller.option_costs, settled.option_costs)
    controller.check(settled)
    with pytest.raises(ValueError, match="not the first pass"):
        controller.check(table.after(torch.zeros(5, dtype=torch.long)))
