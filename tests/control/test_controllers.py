"""What all controllers have in common: one interface."""

import copy
from functools import cache
from typing import NamedTuple

import pytest
import torch
from common import SIZE, spread_gate, tiny_resnet
from torch import nn

from dfs_cli.config import DynamicConfig, GateKind
from dfs_cli.control.base import Controller, HeldOut, Need, Request, controller_of
from dfs_cli.cost.decisions import Decisions
from dfs_cli.cost.table import CostTable
from dfs_cli.errors import ConfigError
from dfs_cli.nn.layers import FractionalLayer
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.passes import TuningTarget
from dfs_cli.presets import FULL_BITS
from dfs_cli.surgery.initialise import fit_steps
from dfs_cli.surgery.plan import plan_costs, plan_surgery
from dfs_cli.surgery.swap import make_dynamic
from dfs_cli.tuning.sensitivity import measure

BITS = (0, 3, 4, 6, 8, 32)
BUDGET = 0.15
MODEL = tiny_resnet()
GATES: tuple[GateKind, ...] = ("rnn", "ff", "probe", "static")
all_gates = pytest.mark.parametrize("gate", GATES)
all_gates_of_which_one_is_slow = pytest.mark.parametrize(
    "gate", ["rnn", pytest.param("ff", marks=pytest.mark.slow), "probe", "static"]
)


class Started(NamedTuple):
    """A network that is ready to be tuned, with what it was started from."""

    network: DynamicResNet
    controller: Controller
    table: CostTable
    request: Request
    target: TuningTarget
    config: DynamicConfig


def start(gate: GateKind, budget: float = BUDGET, spend: bool = False) -> Started:
    """A network of its own, as a conversion starts it."""
    started = copy.deepcopy(start_once(gate, budget, spend))
    return started._replace(controller=controller_of(started.network))


@cache
def start_once(gate: GateKind, budget: float, spend: bool) -> Started:
    torch.manual_seed(0)
    config = DynamicConfig(bits=BITS, gate=gate)
    plan = plan_surgery(MODEL)
    table = plan_costs(MODEL, config, SIZE, plan)
    sample = torch.randn(32, *SIZE)
    network = make_dynamic(MODEL, config, table, plan).network
    fit_steps(network, sample)
    controller = controller_of(network)
    sensitivity = measure(controller.needs, network, plan, table, sample[:16])
    request = Request(budget, spend, 100, 100)
    (table, *_) = controller.candidates(table, sensitivity, request)
    network = make_dynamic(MODEL, config, table, plan).network
    fit_steps(network, sample)
    controller = controller_of(network)
    target = controller.start(network, table, sensitivity, request, sample)
    return Started(network, controller, table, request, target, config)


def held_out_images() -> HeldOut:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(100, *SIZE, generator=generator)
    return HeldOut(images.split(60), torch.randint(5, (100,), generator=generator))


def undecided(started: Started) -> Started:
    """The same, deciding differently for different images."""
    if started.config.gate == "probe":
        spread_gate(started.network)
        started.controller.cost_multiplier, started.controller.operating_point = 0.0, -1.5
    elif started.config.gate != "static":
        spread_gate(started.network)
        started.controller.operating_point = 3.0
    return started


@all_gates
def test_what_is_decided_can_be_followed_and_costs_what_the_table_says(gate: GateKind) -> None:
    started = undecided(start(gate))
    network = started.network
    images = torch.randn(24, *SIZE)
    with torch.no_grad():
        output = network.run(images)
        followed = network.run(images, output.decisions)
        # A decision in the first pass alone can be followed as well.
        first = network.run(images, Decisions.of_pass(output.decisions.in_pass(0)))
    assert (output.decisions.distinct() > 3) == (gate != "static"), "the test needs images that decide differently"
    assert bool(followed.decisions.equal(output.decisions).all())
    torch.testing.assert_close(followed.logits, output.logits)
    assert output.decisions.options.shape == (24, started.table.passes, 5)
    assert first.decisions.passes == 1 and torch.equal(first.logits, output.answers[0].logits)
    assert output.answers[0].rows is None and len(output.answers) == (2 if gate == "probe" else 1)
    costs = started.table.cost(output.decisions)
    low, high = started.controller.movable(started.table)
    assert (costs >= low - 1e-9).all() and (costs <= high + 1e-9).all()


@all_gates
def test_the_policies_run_every_layer_at_each_of_its_bitwidths(gate: GateKind) -> None:
    network, controller, table, *_ = start(gate)
    ran: dict[nn.Module, set[int]] = {}

    def record(layer: nn.Module, _: object) -> None:
        assert isinstance(layer, FractionalLayer)
        ran.setdefault(layer, set()).add(layer.precision.bits)

    for layer in network.backbone.modules():
        if isinstance(layer, FractionalLayer):
            layer.register_forward_pre_hook(record)
    with torch.no_grad():
        for policy in controller.policies():
            assert policy.shape == (5,)
            network.run(torch.randn(1, *SIZE), Decisions.alike(policy, 1))
    skipped = {name for name, bits in table.layer_bits.items() if not bits}
    for name, layer in network.backbone.named_modules():
        if isinstance(layer, FractionalLayer) and name not in skipped and layer.precision.bits != FULL_BITS:
            assert ran[layer] == set(layer.bitwidths), name


@all_gates
def test_a_forced_policy_is_what_every_image_gets(gate: GateKind) -> None:
    network, controller, *_ = undecided(start(gate))
    policy = torch.tensor([0, 2, 1, 5, 0])
    controller.force(policy)
    with torch.no_grad():
        decisions = network.run(torch.randn(6, *SIZE)).decisions
    assert decisions.in_pass(0).tolist() == [policy.tolist()] * 6
    assert not decisions.ran[:, 1:].any()


@all_gates
def test_a_frozen_controller_fits_into_half_precision_and_hardly_changes(gate: GateKind) -> None:
    controller = undecided(start(gate)).controller
    before = copy.deepcopy(controller.state_dict())
    controller.freeze()
    for name, parameter in controller.named_parameters():
        assert torch.equal(parameter, parameter.half().float())
        torch.testing.assert_close(parameter.detach(), before[name], rtol=1e-3, atol=1e-6)


@all_gates
def test_the_state_gives_the_same_decisions_in_another_network(gate: GateKind) -> None:
    network, controller, table, _, _, config = undecided(start(gate))
    again = make_dynamic(MODEL, config, table).network
    again.load_state_dict(network.state_dict())
    again.controller.operating_point = controller.operating_point
    if gate in ("rnn", "ff"):
        assert again.controller.cost_multiplier == controller.cost_multiplier == 3.0
    images = torch.randn(16, *SIZE)
    with torch.no_grad():
        expected, found = network.run(images), again.run(images)
    assert bool(found.decisions.equal(expected.decisions).all()) and torch.equal(found.logits, expected.logits)


@all_gates_of_which_one_is_slow
@pytest.mark.parametrize("spend", [False, True])
@pytest.mark.medium
def test_the_operating_point_keeps_the_budget_and_says_what_it_gives(gate: GateKind, spend: bool) -> None:
    network, controller, table, request, *_ = start(gate, spend=spend)
    held_out = held_out_images()
    told: list[tuple[float, float]] = []
    point = controller.set_operating_point(network, table, held_out, request, lambda *pair: told.append(pair))
    with torch.no_grad():
        outputs = [network.run(images) for images in held_out.batches]
    cost = table.cost(Decisions.join(output.decisions for output in outputs)).mean().item()
    answers = torch.cat([output.logits.argmax(dim=1) for output in outputs])
    assert controller.operating_point == point.value and told
    assert cost == pytest.approx(point.cost, rel=1e-6)
    assert cost <= BUDGET * (1 + 1e-9)
    if spend:
        assert cost >= 0.9 * BUDGET
    elif point.top1 is not None:
        assert held_out.targets is not None
        assert point.top1 == pytest.approx(100 * answers.eq(held_out.targets).double().mean().item())
    low, high = controller.movable(table)
    assert low - 1e-9 <= point.cost <= high + 1e-9


@all_gates_of_which_one_is_slow
def test_less_is_spent_where_more_gains_nothing(gate: GateKind) -> None:
    """All images are of the class that every answer gives: any cost does."""
    network, controller, table, request, *_ = start(gate)
    nn.init.zeros_(network.backbone.get_submodule("fc").weight)  # type: ignore[arg-type]
    nn.init.constant_(network.backbone.get_submodule("fc").bias[:1], 1.0)  # type: ignore[index]
    batches = held_out_images().batches
    point = controller.set_operating_point(network, table, HeldOut(batches, torch.zeros(100)), request)
    low, _ = controller.movable(table)
    assert point.top1 == 100
    if gate in ("rnn", "ff"):
        assert low <= point.cost < 0.45 * BUDGET
    else:
        assert point.cost == pytest.approx(low), "the first pass alone"


@pytest.mark.medium
def test_targets_are_within_the_budget() -> None:
    for gate in ("rnn", "ff"):
        started = start(gate, spend=True)
        assert started.target.cost == BUDGET
    started = start("rnn", budget=1.0, spend=True)
    assert started.target.cost == pytest.approx(min(1.0, started.table.dearest))
    static = start("static", spend=True)
    assert 0.9 * BUDGET < static.target.cost <= BUDGET
    probe = start("probe", spend=True)
    first = probe.table.cost(Decisions.of_pass(probe.network.run(torch.randn(1, *SIZE)).decisions.in_pass(0))).item()
    assert first + probe.target.share * probe.target.cost == pytest.approx(BUDGET)


@all_gates
@pytest.mark.medium
def test_a_budget_that_is_too_large_to_be_of_use_is_started_as_a_smaller_one(gate: GateKind) -> None:
    """The very same network: its accuracy cannot fall as the budget grows."""
    large, larger = start(gate, 0.5), start(gate, 0.9)
    assert large.target == larger.target and large.target.cost < 0.5
    assert all(torch.equal(v, larger.network.state_dict()[k]) for k, v in large.network.state_dict().items())


def test_what_each_needs_to_have_measured() -> None:
    needs = {gate: start(gate).controller.needs for gate in GATES}
    assert needs == {"rnn": Need.BLOCKS, "ff": Need.BLOCKS, "probe": Need.BLOCKS, "static": Need.BLOCKS_AND_LAYERS}


@all_gates
def test_what_a_network_can_be_moved_to(gate: GateKind) -> None:
    network, controller, table, *_ = start(gate)
    low, high = controller.movable(table)
    if gate == "static":
        assert low == high == pytest.approx(start(gate).target.cost)
        with pytest.raises(ConfigError, match="no operating point"):
            controller.operating_point = 1.0
        controller.operating_point = 0.0
    elif gate == "probe":
        first = network.run(torch.randn(1, *SIZE)).decisions
        assert low == pytest.approx(table.cost(first).item())
        assert high == pytest.approx(low + table.dearest_pass(1))
    else:
        assert (low, high) == (table.cheapest, table.dearest)
