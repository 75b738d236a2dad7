import pytest
import timm
import torch
from conftest import tiny_resnet
from timm.models.resnet import BasicBlock
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dfs_cli.models  # noqa: F401  (registers the CIFAR networks)
from dfs_cli.config import DynamicConfig
from dfs_cli.cost.count import count_macs
from dfs_cli.cost.operating_point import find_operating_point, target_cost
from dfs_cli.cost.table import CostTable, relative_cost
from dfs_cli.errors import ConfigError
from dfs_cli.surgery.convert import plan_costs


def test_relative_cost_by_hand() -> None:
    assert [relative_cost(b) for b in (0, 4, 8, 16, 32)] == [0, 1 / 64, 1 / 16, 1 / 4, 1]


def test_counts_of_a_hand_counted_network() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 2, stride=2, groups=2), nn.Flatten(),
        nn.Linear(8 * 4 * 4, 5),
    )  # fmt: skip
    count = count_macs(network.train(), (3, 8, 8))
    assert count.layers == {"0": 4 * 8 * 8 * 3 * 9, "2": 8 * 4 * 4 * 2 * 4, "4": 128 * 5}
    assert "batch_norm" in count.not_counted
    assert network.training


def test_table_of_a_hand_counted_toy_network() -> None:
    """A ResNet-20 on 1x8x8 images, counted by hand."""
    model = timm.create_model("resnet20_cifar", in_chans=1)
    config = DynamicConfig(bits=(0, 8, 32), edge_bits=8, gate="rnn", embedding=2, hidden=3)
    table = plan_costs(model, config, (1, 8, 8))
    stage1 = 2 * 16 * 16 * 9 * 64
    stage2_first = (16 * 32 * 9 + 32 * 32 * 9) * 16
    stage2 = 2 * 32 * 32 * 9 * 16
    stage3_first = (32 * 64 * 9 + 64 * 64 * 9) * 4
    stage3 = 2 * 64 * 64 * 9 * 4
    assert table.block_macs == (stage1,) * 3 + (stage2_first, stage2, stage2) + (stage3_first, stage3, stage3)
    edges = 1 * 16 * 9 * 64 + 16 * 32 * 16 + 32 * 64 * 4 + 64 * 10
    dense = sum(table.block_macs) + edges
    assert table.dense_macs == dense
    # Embedding, LSTM of width 3 on 2 inputs, three options.
    gate = [c * 2 + 4 * 3 * (2 + 3) + 3 * 3 for c in (16, 16, 16, 16, 32, 32, 32, 64, 64)]
    assert table.gate_macs == tuple(gate)
    assert table.fixed == pytest.approx((edges / 16 + sum(gate)) / dense)
    decisions = torch.tensor([[0] * 9, [2] * 9, [1, 0, 0, 2, 0, 0, 0, 0, 0]])
    expected = [0, sum(table.block_macs), stage1 / 16 + stage2_first]
    found = table.cost(decisions)
    assert found.tolist() == pytest.approx([table.fixed + e / dense for e in expected])
    assert table.cheapest == pytest.approx(found[0].item()) and table.dearest == pytest.approx(found[1].item())


@pytest.mark.parametrize("name", ["resnet18", "seresnet50", "resnetblur50", "ecaresnet26t", "resnetrs50", "resnet50c"])
def test_full_cost_plus_gate_agrees_with_torch(name: str) -> None:
    model = timm.create_model(name).eval()
    table = plan_costs(model, DynamicConfig(edge_bits=32, gate="rnn"), (3, 64, 64))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    assert 2 * table.dense_macs == counter.get_total_flops()
    assert table.dearest * table.dense_macs == pytest.approx(table.dense_macs + sum(table.gate_macs))


def test_attention_is_in_the_fixed_part() -> None:
    table = plan_costs(timm.create_model("seresnet50"), DynamicConfig(), (3, 64, 64))
    attention = [layer for layer in table.layers if ".se." in layer.name]
    assert attention and all(layer.block is None and layer.bits == 32 for layer in attention)
    shortcuts = [layer for layer in table.layers if "downsample" in layer.name]
    assert shortcuts and all(layer.block is None and layer.bits == 8 for layer in shortcuts)


def test_expected_cost_of_certain_decisions_is_their_cost() -> None:
    table = plan_costs(tiny_resnet(BasicBlock), DynamicConfig(gate="rnn"), (3, 32, 32))
    decisions = torch.randint(0, 5, (7, 5), generator=torch.Generator().manual_seed(0))
    probs = torch.nn.functional.one_hot(decisions, 5).double()
    torch.testing.assert_close(table.expected_cost(probs), table.cost(decisions))


def test_table_goes_to_json_and_back() -> None:
    table = plan_costs(tiny_resnet(BasicBlock), DynamicConfig(gate="rnn"), (3, 32, 32))
    assert CostTable.from_dict(table.to_dict()) == table


def test_unreachable_budgets_are_refused_with_the_reachable_one() -> None:
    table = plan_costs(tiny_resnet(BasicBlock), DynamicConfig(gate="rnn"), (3, 32, 32))
    with pytest.raises(ConfigError, match="smallest reachable one is") as caught:
        table.check_budget(table.cheapest * 0.99)
    named = float(str(caught.value).split()[-1])
    table.check_budget(named)
    low = plan_costs(tiny_resnet(BasicBlock), DynamicConfig(bits=(0, 4)), (3, 32, 32))
    with pytest.raises(ConfigError, match="at most"):
        low.check_budget(0.4)


def cost_of_threshold(price: float) -> torch.Tensor:
    """A thousand images that each switch from 1 to 0.1 at a price of their own, between 5 and 15."""
    switches = torch.linspace(5, 15, 1000, dtype=torch.float64)
    return torch.where(switches > price, 1.0, 0.1).double()


@pytest.mark.parametrize("target", [0.15, 0.4, 0.77, 0.99])
@pytest.mark.parametrize("start", [0.0, 9.0, 500.0])
def test_bisection_meets_the_target(target: float, start: float) -> None:
    point = find_operating_point(cost_of_threshold, target, start=start)
    assert target * 0.995 <= point.cost <= target
    assert cost_of_threshold(point.value).mean().item() == point.cost


def test_bisection_reports_the_nearest_where_the_target_is_out_of_reach() -> None:
    assert find_operating_point(cost_of_threshold, 0.05).cost == pytest.approx(0.1)
    assert find_operating_point(cost_of_threshold, 2.0).cost == pytest.approx(1.0)


def test_bisection_settles_below_a_jump() -> None:
    def jump(price: float) -> torch.Tensor:
        return torch.full((10,), 0.5 if price < 3 else 0.2, dtype=torch.float64)

    assert find_operating_point(jump, 0.4).cost == pytest.approx(0.2)


def test_target_leaves_room_for_sampling() -> None:
    assert target_cost(0.4, 0.0, 100, 100) == 0.4
    # Three standard errors of a difference of means: 3 * 0.02 * sqrt(2 / 100) = 0.00849.
    assert target_cost(0.4, 0.02, 100, 100) == pytest.approx(0.404 - 0.00849, abs=1e-5)
    assert 0.9 * 0.4 < target_cost(0.4, 10.0, 100, 100) < 1.01 * 0.4
