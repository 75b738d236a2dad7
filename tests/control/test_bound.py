"""Where no image may cost more than the budget, none does, whatever it shows."""

import pytest
import torch
from common import SIZE, spread_gate, tiny_resnet

from dfs_cli.config import DynamicConfig, GateKind
from dfs_cli.control.base import Ceiling, Controller, HeldOut, Request, Sensitivity, controller_of
from dfs_cli.control.static import mix_within
from dfs_cli.cost.decisions import Decisions
from dfs_cli.cost.device import DeviceCosts
from dfs_cli.cost.table import CostTable
from dfs_cli.errors import ConfigError
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.surgery.initialise import fit_steps
from dfs_cli.surgery.plan import plan_costs
from dfs_cli.surgery.swap import make_dynamic

BITS = (0, 2, 4, 6, 8)
MODEL = tiny_resnet()
GATES: tuple[GateKind, ...] = ("rnn", "ff", "probe", "static")
all_gates = pytest.mark.parametrize("gate", GATES)


def table_of(gate: GateKind) -> CostTable:
    return plan_costs(MODEL, DynamicConfig(bits=BITS, gate=gate), SIZE)


def sensitivity_of(table: CostTable, harm: float = 0.1) -> Sensitivity:
    """Harms that fall by half with each wider option; the later blocks are more sensitive."""
    falling = harm * 0.5 ** torch.arange(len(BITS), dtype=torch.float64)
    falling[-1] = 0
    layers = sum(layer.block is not None for layer in table.layers)
    of_layers = falling.repeat(layers, 1)
    of_layers[:, 0] = torch.inf
    return Sensitivity(torch.outer(torch.arange(1.0, len(table.blocks) + 1).double(), falling), of_layers)


def start(gate: GateKind, budget: float, harm: float = 0.1) -> tuple[DynamicResNet, Controller, CostTable]:
    """A network as a conversion without images leaves it, whose gates have opinions of their own."""
    torch.manual_seed(0)
    table, config = table_of(gate), DynamicConfig(bits=BITS, gate=gate, mirror=gate == "probe")
    request, sensitivity = Request(budget, False, 32, 32, is_bound=True), sensitivity_of(table, harm)
    table = controller_of(make_dynamic(MODEL, config, table).network).candidates(table, sensitivity, request)[0]
    network = make_dynamic(MODEL, config, table).network.eval().requires_grad_(False)
    sample = torch.randn(32, *SIZE)
    fit_steps(network, sample)
    controller = controller_of(network)
    controller.start(network, table, sensitivity, request, sample)
    controller.freeze()
    if gate != "static":
        spread_gate(network)
    controller.set_operating_point(network, table, HeldOut([sample]), request)
    return network, controller, table


@all_gates
@pytest.mark.parametrize("budget", [0.06, 0.09, 0.4])
def test_no_image_costs_more_than_the_budget(gate: GateKind, budget: float) -> None:
    network, controller, table = start(gate, budget)
    assert controller.largest_cost(table) <= budget + 1e-9
    for scale in (0.0, 0.1, 1.0, 30.0):
        images = scale * torch.randn(32, *SIZE, generator=torch.Generator().manual_seed(int(scale)))
        costs = table.cost(network.run(images).decisions)
        assert float(costs.max()) <= controller.largest_cost(table) + 1e-9
    if gate == "probe":  # nor where every image takes both passes, if any may
        both = controller.movable(table)[1]
        assert controller.largest_cost(table) in (both, controller.movable(table)[0])


@all_gates
def test_a_gate_may_choose_less_and_its_largest_cost_can_occur(gate: GateKind) -> None:
    network, controller, table = start(gate, 0.1, harm=0.01)
    if gate == "probe":  # this untrained network is sure of nothing
        controller.operating_point = -0.5
    costs = table.cost(network.run(torch.randn(256, *SIZE)).decisions)
    assert (len(costs.unique()) > 1) == (gate != "static")
    assert controller.largest_cost(table) > 0.06


@pytest.mark.parametrize(("harm", "passes"), [(0.01, 2), (3.0, 1)])
def test_a_second_pass_is_taken_where_half_of_the_budget_does_little_harm(harm: float, passes: int) -> None:
    table = table_of("probe")
    mix, has_second = mix_within(table, sensitivity_of(table, harm).blocks, 0.1)
    assert (not has_second) == (passes == 1)
    total = sum(float(table.pass_cost(mix[None], i)) for i in range(passes))
    assert total <= 0.1
    _, controller, _ = start("probe", 0.1, harm)
    sure = controller.operating_point >= 1e9
    assert sure == (passes == 1)


def test_two_passes_keep_the_bound_where_deciding_costs_more_for_each_block_of_the_second() -> None:
    table = table_of("probe")
    blocks: dict[str, tuple[float, ...]] = dict.fromkeys(table.blocks, (0.0, 1.0, 2.0, 3.0, 4.0))
    costs = DeviceCosts(
        "tiny", SIZE, "mJ", False, {}, BITS, blocks, 1.0, 40.0, deciding={"probe": ((0.1, 0), (0.2, 1.5))}
    )
    table = table.on_device(costs, "probe")
    for budget in (0.4, 0.7, 1.0):
        mix, has_second = mix_within(table, sensitivity_of(table, 0.001).blocks, budget)
        assert has_second
        both = [float(table.pass_cost(mix[None], i)) for i in range(2)]
        assert 0.8 * budget < sum(both) <= budget + 1e-9
        assert both[1] > both[0] + 0.03


def test_too_small_a_budget_is_refused() -> None:
    table = table_of("probe")
    with pytest.raises(ConfigError):
        mix_within(table, sensitivity_of(table).blocks, table.cheapest / 2)


def test_a_ceiling_forbids_what_is_dearer() -> None:
    ceiling = Ceiling(blocks=2, options=3)
    scores = torch.tensor([[[0.0, 1.0, 2.0], [2.0, 1.0, 3.0]]])
    assert torch.equal(scores.masked_fill(ceiling.forbidden(), -torch.inf), scores)
    ceiling.highest.copy_(torch.tensor([1, 0]))
    assert scores.masked_fill(ceiling.forbidden(), -torch.inf).argmax(dim=2).tolist() == [[1, 0]]
    assert scores[:, 1].masked_fill(ceiling.forbidden()[0], -torch.inf).argmax(dim=1).tolist() == [0]
    assert ceiling.forbidden().tolist() == [[False, False, True], [False, True, True]]
    ceiling.check()
    ceiling.highest[0] = 3
    with pytest.raises(ValueError, match="ceiling"):
        ceiling.check()


def test_a_ceiling_costs_what_its_options_cost() -> None:
    table = table_of("rnn")
    ceiling = Ceiling(len(table.blocks), len(BITS))
    assert ceiling.cost(table, 0) == pytest.approx(table.dearest)
    ceiling.highest.fill_(2)
    policy = torch.full((len(table.blocks),), 2)
    assert ceiling.cost(table, 0) == pytest.approx(float(table.cost(Decisions.alike(policy, 1))))
