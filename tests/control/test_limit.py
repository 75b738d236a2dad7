"""No image costs more than the limit, exactly, whatever it shows."""

import copy
import math
from functools import cache

import pytest
import torch
from common import SIZE, make_dynamic, spread_gate, tiny_resnet
from torch import Tensor

from dfs_cli.config import DynamicConfig, GateKind
from dfs_cli.control.base import Ceiling, Controller, HeldOut, Request, Sensitivity, controller_of
from dfs_cli.control.division import divide_by_rule
from dfs_cli.control.ladder import affordable_scores, charges
from dfs_cli.control.probe import ProbeController
from dfs_cli.control.static import within
from dfs_cli.control.threshold import ALWAYS_REFINE, NEVER_REFINE
from dfs_cli.cost.decisions import Decisions
from dfs_cli.cost.table import CostTable
from dfs_cli.errors import ConfigError
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.passes import TuningTarget
from dfs_cli.surgery.initialise import fit_steps
from dfs_cli.surgery.plan import plan_costs

BITS = (0, 2, 4, 8, 32)
MODEL = tiny_resnet()
GATES: tuple[GateKind, ...] = ("rnn", "ff", "probe")
deciding_gates = pytest.mark.parametrize("gate", GATES)
all_gates = pytest.mark.parametrize("gate", [*GATES, "static"])


def settings(gate: GateKind) -> DynamicConfig:
    return DynamicConfig(bits=BITS, gate=gate, mirror=gate == "probe")


def table_of(gate: GateKind) -> CostTable:
    return plan_costs(MODEL, settings(gate), SIZE)


def pictures(count: int = 48) -> Tensor:
    """Of very different contrast."""
    noise = torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(3))
    return noise * torch.linspace(0.2, 5.0, count).reshape(-1, 1, 1, 1)


@cache
def undecided(gate: GateKind) -> DynamicResNet:
    network = make_dynamic(MODEL, settings(gate))
    spread_gate(network, 2.0)
    if gate == "probe":
        controller_of(network).get_buffer("policy").copy_(torch.tensor([1, 2, 1, 2, 2]))
        network.controller.operating_point = -1.0
    return network.eval().requires_grad_(False)


def make(gate: GateKind) -> tuple[DynamicResNet, Controller, CostTable]:
    """A network whose images get decisions of very different cost."""
    network = copy.deepcopy(undecided(gate))
    return network, controller_of(network), table_of(gate)


def limits_between(low: float, high: float, count: int) -> list[float]:
    shares = torch.rand(count, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return [low, *(low + (high - low) * shares).tolist()]


@deciding_gates
def test_no_image_costs_more_than_any_limit_alone_or_in_a_batch(gate: GateKind) -> None:
    network, controller, table = make(gate)
    images = pictures()
    low = controller.movable(table)[0]
    means = []
    for limit in sorted(limits_between(low, float(table.cost(network.run(images).decisions).max()), 12)):
        controller.limit = limit
        together = network.run(images).decisions
        costs = table.cost(together)
        assert float(costs.max()) <= limit
        assert float(costs.max()) <= controller.largest_cost(table) <= limit
        alone = Decisions.join(network.run(part).decisions for part in images.split(1))
        assert bool(alone.equal(together).all())
        means.append(float(costs.mean()))
    assert len(set(means)) > 3 and means[0] == pytest.approx(low)


@deciding_gates
def test_a_limit_as_large_as_the_dearest_decision_changes_nothing(gate: GateKind) -> None:
    network, controller, table = make(gate)
    images = pictures()
    free, (low, high) = network.run(images), controller.movable(table)
    for limit in (high, float(table.cost(free.decisions).max()), 1e6):
        controller.limit = limit
        limited = network.run(images)
        assert bool(limited.decisions.equal(free.decisions).all()) and torch.equal(limited.logits, free.logits)
    assert controller.movable(table) == (low, high)
    controller.limit = high / 2
    assert controller.movable(table) == (low, high / 2)


@deciding_gates
def test_images_keep_the_limit_in_tuning_too(gate: GateKind) -> None:
    network, controller, table = make(gate)
    low, high = controller.movable(table)
    network.requires_grad_(True).train()
    for limit in limits_between(low, high, 4):
        controller.limit = limit
        output = network.run(pictures(20), target=TuningTarget(0.1, share=0.5))
        assert float(table.cost(output.decisions).max()) <= limit
        probs = output.answers[-1].probs
        if probs is not None:
            assert bool(probs.isfinite().all())
            loss = output.logits.square().mean() + table.expected_pass_cost(probs, table.passes - 1).mean()
            loss.backward()
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    assert grads and all(bool(grad.isfinite().all()) for grad in grads)


@deciding_gates
def test_decisions_are_followed_and_forced_whatever_the_limit(gate: GateKind) -> None:
    network, controller, table = make(gate)
    images = pictures(8)
    free = network.run(images).decisions
    controller.limit = controller.movable(table)[0]
    assert bool(network.run(images, free).decisions.equal(free).all())
    controller.force(torch.full((5,), 3))
    assert network.run(images).decisions.in_pass(0).tolist() == [[3] * 5] * 8


def test_a_gate_chooses_among_what_leaves_enough_for_the_blocks_behind() -> None:
    network, controller, table = make("rnn")
    costs = table.option_costs[0]
    # The gate wants the widest option everywhere.
    for parameter in controller.parameters():
        parameter.zero_()
    controller.get_parameter("gate.preference").copy_(torch.arange(5.0).repeat(5, 1))
    policy = torch.tensor([4, 4, 1, 0, 0])
    controller.limit = float(table.cost(Decisions.alike(policy, 1)))
    assert network.run(pictures(2)).decisions.in_pass(0).tolist() == [policy.tolist()] * 2
    # A little less, and the second block has 8 bits; what is saved goes to the blocks behind.
    controller.limit -= float(costs[2, 1]) + 2**-44
    chosen = network.run(pictures(1)).decisions.in_pass(0)[0].tolist()
    assert chosen[:2] == [4, 3] and sum(chosen[2:]) > 1


def test_a_second_pass_is_chosen_cheaper_or_not_at_all() -> None:
    network, controller, table = make("probe")
    assert isinstance(controller, ProbeController)
    controller.operating_point = ALWAYS_REFINE
    images = pictures()
    first = controller.movable(table)[0]
    free = network.run(images).decisions
    costs = table.cost(free)
    controller.limit = float(costs.median())
    kept = network.run(images).decisions
    can_be_paid = costs <= controller.limit
    assert 0 < int(can_be_paid.sum()) < len(costs) and bool(kept.ran.all())
    assert bool(kept.equal(free)[can_be_paid].all()) and not kept.equal(free)[~can_be_paid].any()
    least = first + table.cheapest_pass(1)
    controller.limit = least
    assert table.cost(network.run(images).decisions).tolist() == [least] * len(images)
    controller.limit = least - 2**-44
    alone = network.run(images).decisions
    assert not controller.can_refine and not alone.ran[:, 1].any()
    assert controller.movable(table) == (first, first) and controller.largest_cost(table) == first
    point = controller.set_operating_point(network, table, HeldOut([images]), Request(0.1, False, 48, 48))
    assert point.value == NEVER_REFINE and point.cost == pytest.approx(first)


def test_the_ladder_by_hand() -> None:
    costs, ceiling = torch.tensor([[0.0, 1.0, 4.0]] * 2, dtype=torch.float64), Ceiling(2, 3)
    rungs = charges(torch.tensor(0.5, dtype=torch.float64), costs, ceiling)
    assert rungs.shape == (18, 2, 3)
    assert rungs[0].tolist() == [[0, 0.5, 2]] * 2
    # In units of a quarter: from the present multiplier, where that is more than a sixteenth of it, to 256 of them.
    multipliers = rungs[1:-1, 0, 1]
    assert float(multipliers[0]) == pytest.approx(0.5) and float(multipliers[-1]) == pytest.approx(64)
    torch.testing.assert_close(
        multipliers[1:] / multipliers[:-1], torch.full((15,), 128 ** (1 / 15), dtype=torch.float64)
    )
    assert rungs[-1].flatten().tolist() == pytest.approx([0, 1e30, 1e30] * 2)
    scores = torch.tensor([[[0.0, 2.0, 5.0], [0.0, 1.0, 1.5]], [[5.0, 0.0, 0.0], [5.0, 0.0, 0.0]]], dtype=torch.float64)

    def chosen(most: float) -> list[list[int]]:
        found = affordable_scores(scores, torch.tensor(0.0).double(), costs, ceiling, torch.tensor(most).double())
        return found.argmax(dim=2).tolist()

    assert chosen(8.0) == [[2, 2], [0, 0]]
    # The second block's widest option is worth 0.5 for a cost of 3, the first one's 3: at 0.25 the second gives its up.
    assert chosen(7.9) == chosen(5.0) == [[2, 1], [0, 0]]
    # From 1 on the first block takes the narrow one, which costs 1 and is worth 2, and the second none, from 2 on both none.
    assert chosen(4.9) == chosen(1.0) == [[1, 0], [0, 0]] and chosen(0.5) == [[0, 0], [0, 0]]
    ceiling.highest.copy_(torch.tensor([1, 2]))
    assert chosen(8.0) == [[1, 2], [0, 0]]


@all_gates
@pytest.mark.parametrize(
    ("budget", "limit", "is_bound"),
    [(0.1, 0.12, False), (0.1, 0.1, False), (0.2, 0.08, False), (0.06, 0.2, False), (0.2, 0.1, True)],
)
def test_a_start_plans_what_the_limit_allows(gate: GateKind, budget: float, limit: float, is_bound: bool) -> None:
    torch.manual_seed(0)
    table = table_of(gate)
    harm = torch.outer(torch.arange(1.0, 6.0), 0.3 * 0.5 ** torch.arange(5.0))
    layers = 0.3 * 0.5 ** torch.arange(5.0).repeat(sum(layer.block is not None for layer in table.layers), 1)
    layers[:, 0] = torch.inf
    sensitivity, request = Sensitivity(harm, layers), Request(budget, False, 48, 48, is_bound, limit)
    tables = controller_of(make_dynamic(MODEL, settings(gate), table=table)).candidates(table, sensitivity, request)
    for candidate in tables:
        network = make_dynamic(MODEL, settings(gate), table=candidate).eval().requires_grad_(False)
        controller, images = controller_of(network), pictures()
        fit_steps(network, images)
        target = controller.start(network, candidate, sensitivity, request, images)
        assert controller.limit == limit and target.cost <= limit
        controller.freeze()
        controller.set_operating_point(network, candidate, HeldOut([images]), request)
        assert controller.movable(candidate)[0] <= controller.largest_cost(candidate) <= limit
        if gate != "static":
            spread_gate(network)
        costs = candidate.cost(network.run(images).decisions)
        assert float(costs.max()) <= limit
        if gate == "probe" and target.share:
            assert controller.movable(candidate)[0] + target.cost <= limit + 1e-12


def test_where_the_limit_pays_for_one_pass_the_first_has_all_of_it() -> None:
    table = table_of("probe")
    harm = torch.outer(torch.arange(1.0, 6.0), 0.3 * 0.5 ** torch.arange(5.0))
    limit = 1.9 * table.cheapest
    division = divide_by_rule(table, harm, Request(0.5, False, 1000, 1000, limit=limit))
    cost = float(table.pass_cost(division.first[None], 0))
    assert division.share == 0 and table.cheapest < cost <= limit < table.cheapest + table.cheapest_pass(1)


def test_a_plan_is_repeated_for_a_little_less_where_it_costs_too_much() -> None:
    asked: list[float] = []

    def plan(cost: float) -> float:
        asked.append(cost)
        if cost < 0.1:
            raise ConfigError("no mix")
        return 0.5 if cost > 0.4999999 else 0.3

    assert within(math.inf, plan, 0.6, float) == 0.5 and asked == [0.6]
    assert within(0.49999999, plan, 0.6, float) == 0.3 and asked[1] == 0.49999999
    with pytest.raises(ConfigError, match="no mix"):
        within(0.2, plan, 0.6, float)
