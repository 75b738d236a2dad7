import math

import pytest
import torch
from common import make_dynamic, spread_gate, tiny_resnet
from dfs_cli.surgery.convert import plan_costs
from dfs_cli.tuning.calibration import calibrate
from dfs_cli.tuning.plan import plan_passes
from timm.models.resnet import BasicBlock
from torch import nn

from dfs_cli.config import DynamicConfig
from dfs_cli.control.probe import EVERYBODY_IS_SURE, NOBODY_IS_SURE, ProbedResNet, doubt
from dfs_cli.cost.table import CostTable
from dfs_cli.nn.normalisation import FractionalBatchNorm2d, match_statistics, moments
from dfs_cli.nn.precision import Precision
from dfs_cli.tuning.state import parameter_groups

MIRRORED = DynamicConfig(mirror=True)


def probed(config: DynamicConfig = MIRRORED, first: int = 1) -> ProbedResNet:
    """A network whose first pass runs option ``first`` everywhere, and whose second depends on the image."""
    network = make_dynamic(tiny_resnet(BasicBlock), config)
    assert isinstance(network, ProbedResNet)
    network.policy.fill_(first)
    network.fit_gate(torch.randn(32, 3, 32, 32))
    spread_gate(network)
    return network


def table_of(config: DynamicConfig = MIRRORED) -> CostTable:
    return plan_costs(tiny_resnet(BasicBlock), config, (3, 32, 32))


def some_unsure(network: ProbedResNet, images: torch.Tensor, share: float = 0.4) -> None:
    with torch.no_grad():
        network.operating_point = EVERYBODY_IS_SURE
        network.operating_point = float(doubt(network.run(images).logits).quantile(1 - share))


def test_doubt_is_minus_the_log_odds() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 1.0]])
    p = logits.softmax(1).amax(1)
    assert doubt(logits).tolist() == pytest.approx([-math.log(v / (1 - v)) for v in p.tolist()], rel=1e-5)
    sure = torch.tensor([[60.0, 0.0], [61.0, 0.0]])
    assert doubt(sure)[0] > doubt(sure)[1], "where the confidence rounds to one, doubt still tells images apart"


def test_sure_images_end_after_the_first_pass_and_the_others_add_up_both() -> None:
    network = probed()
    x = torch.randn(20, 3, 32, 32)
    some_unsure(network, x)
    with torch.no_grad():
        network.evidence.copy_(torch.tensor([0.3, 0.9]))
        output = network.run(x)
        first = network.run(x, torch.full((20, 5), 1)).logits
        unsure = doubt(first) > network.operating_point
        assert 0 < int(unsure.sum()) < 20
        assert torch.equal(output.decisions[:, :5], torch.full((20, 5), 1))
        assert (output.decisions[~unsure, 5:] == -1).all() and (output.decisions[unsure, 5:] >= 0).all()
        torch.testing.assert_close(output.logits[~unsure], first[~unsure])
        second = network.run(x[unsure].flip(-1), output.decisions[unsure, 5:]).logits
    torch.testing.assert_close(output.logits[unsure], 0.3 * first[unsure] + 0.9 * second, rtol=1e-5, atol=1e-6)


def test_without_mirror_the_second_pass_sees_the_image_as_it_is() -> None:
    network = probed(DynamicConfig())
    x = torch.randn(4, 3, 32, 32)
    decisions = torch.full((4, 10), 1)
    with torch.no_grad():
        torch.testing.assert_close(network.run(x, decisions).logits, network.run(x, decisions[:, :5]).logits)
        mirrored = probed().run(x, decisions).logits
        assert not torch.allclose(mirrored, network.run(x, decisions).logits, atol=1e-3)


def test_same_answer_alone_and_in_any_batch() -> None:
    network = probed()
    x = torch.randn(24, 3, 32, 32)
    some_unsure(network, x, 0.6)
    with torch.no_grad():
        together = network.run(x)
        assert len(together.decisions.unique(dim=0)) > 5, "the test needs images that decide differently"
        for size in (1, 5, 23):
            parts = [network.run(part) for part in x.split(size)]
            assert torch.equal(torch.cat([p.decisions for p in parts]), together.decisions)
            torch.testing.assert_close(torch.cat([p.logits for p in parts]), together.logits, rtol=1e-5, atol=1e-6)
        assert network.run(x[:0]).logits.shape == (0, 5)


def test_decisions_can_be_followed() -> None:
    network = probed()
    x = torch.randn(12, 3, 32, 32)
    some_unsure(network, x)
    with torch.no_grad():
        own = network.run(x)
        network.operating_point = EVERYBODY_IS_SURE
        followed = network.run(x, own.decisions)
    assert torch.equal(followed.decisions, own.decisions)
    torch.testing.assert_close(followed.logits, own.logits)


def test_both_passes_are_paid() -> None:
    table = table_of()
    decisions = torch.full((2, 10), 1)
    decisions[1, 5:] = -1
    decisions[0, 5:] = 2
    cost = table.cost(decisions).tolist()
    first, second = table.prices[:, 1].sum().item(), table.prices[:, 2].sum().item()
    assert cost[1] == pytest.approx(table.edges_cost + first)
    assert cost[0] == pytest.approx(2 * table.edges_cost + table.gate_cost + first + second)
    assert table.gate_cost > 0
    assert table.dearest == pytest.approx(2 * (table.edges_cost + table.prices[:, -1].sum().item()) + table.gate_cost)
    assert CostTable.from_dict(table.to_dict()) == table


def test_a_lower_threshold_sends_more_images_on() -> None:
    network, table = probed(), table_of()
    x = torch.randn(64, 3, 32, 32)
    costs = []
    with torch.no_grad():
        doubts = doubt(network.run(x).logits)
        for q in (1.0, 0.9, 0.5, 0.1):
            network.operating_point = float(doubts.quantile(q))
            costs.append(table.cost(network.run(x).decisions).mean().item())
        network.operating_point = NOBODY_IS_SURE
        assert (network.run(x).decisions >= 0).all()
    assert costs == sorted(costs) and costs[0] == pytest.approx(table.edges_cost + table.prices[:, 1].sum().item())


def test_in_training_the_least_sure_share_goes_on() -> None:
    network = probed().train()
    x = torch.randn(40, 3, 32, 32)
    output = network.run(x, share=0.1)
    assert output.first is not None and output.unsure is not None and output.probs is not None
    expected = doubt(output.first.detach()).topk(4).indices
    assert set(output.unsure.tolist()) == set(expected.tolist())
    assert output.probs.shape == (4, 5, 5)
    # A larger share is sampled, so that a step stays cheap.
    assert len(network.run(x, share=1.0).unsure) == 8  # type: ignore[arg-type]


def test_gradients_reach_everything_but_a_sure_images_second_pass() -> None:
    network = probed().train()
    x = torch.randn(20, 3, 32, 32)
    for option in (0, 1, 2, 3, 4):
        decisions = torch.full((20, 10), option)
        decisions[:, :5] = max(option, 1)
        output = network.run(x, decisions, explore=1.0)
        assert output.first is not None
        ((output.logits.square().sum() + output.first.square().sum()) * 1e-2).backward()
    without = [
        name
        for name, p in network.named_parameters()
        if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.any()
    ]
    assert without == []
    gate, quantizers, backbone = parameter_groups(network)
    assert any(p is network.evidence for p in gate)
    assert len(gate) + len(quantizers) + len(backbone) == len(list(network.parameters()))


def test_the_plan_keeps_to_the_budget_and_is_careful_with_few_images() -> None:
    config = DynamicConfig(bits=(0, 2, 3, 4, 5, 6, 8), edge_bits=2, mirror=True)
    table = table_of(config)
    damage = (1 - torch.tensor(table.options) / 8).square().repeat(5, 1)
    shares = []
    for held_out in (5000, 200):
        network = make_dynamic(tiny_resnet(BasicBlock), config)
        assert isinstance(network, ProbedResNet)
        goal = plan_passes(network, table, damage, 0.03, held_out, 5000)
        assert goal.share is not None
        first = table.cost(network.policy[None]).item()
        assert first <= 0.65 * 0.03 and first + goal.share * goal.cost == pytest.approx(0.03)
        shares.append(goal.share)
    assert shares[0] < shares[1] <= 1


@pytest.mark.parametrize("factor", [1.2, 2.0, 9.0])
def test_calibration_meets_the_budget_by_threshold_or_by_price(factor: float) -> None:
    config = DynamicConfig(mirror=True)
    network, table = probed(config), table_of(config)
    budget = factor * table.cost(network.policy[None]).item()
    network.price = 300.0
    held_out = torch.randn(400, 3, 32, 32)
    point = calibrate(network, table, held_out.split(200), budget, 400)
    with torch.no_grad():
        cost = table.cost(network.run(held_out).decisions).mean().item()
    assert cost == pytest.approx(point.cost) and 0.9 * budget <= cost <= budget
    assert (network.operating_point == NOBODY_IS_SURE) == (factor == 9.0)


def test_normalisation_follows_the_bitwidth_and_full_precision_keeps_its_own() -> None:
    norm = nn.BatchNorm2d(3).eval()
    x = torch.randn(8, 3, 5, 5)
    norm.running_mean, norm.running_var = moments(x)
    precision = Precision()
    own = FractionalBatchNorm2d.adopt(norm, (4, 8), precision)
    torch.testing.assert_close(own(x), norm(x))
    quantized = 1.5 * x + 0.25
    match_statistics(own, 1, moments(x), quantized)
    with precision.at(8):
        torch.testing.assert_close(own(quantized), norm(x), rtol=1e-4, atol=1e-4)
    with precision.at(4):
        torch.testing.assert_close(own(x), norm(x))
    mean, variance = moments(x)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(variance, x.var((0, 2, 3), correction=0))
    torch.testing.assert_close(own.bit_mean[1], 1.5 * mean + 0.25)
