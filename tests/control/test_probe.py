import math

import pytest
import torch
from common import RNN, SIZE, make_dynamic, spread_gate, tiny_resnet

from dfs_cli.config import DynamicConfig
from dfs_cli.control.base import HeldOut, Request, Sensitivity, controller_of
from dfs_cli.control.gates import summarise
from dfs_cli.control.probe import ProbeController
from dfs_cli.control.threshold import ALWAYS_REFINE, NEVER_REFINE
from dfs_cli.cost.decisions import NOT_RUN, Decisions
from dfs_cli.cost.table import CostTable
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.passes import TuningTarget, uncertainty
from dfs_cli.surgery.plan import plan_costs
from dfs_cli.tuning.state import parameter_groups

PLAIN = RNN.replace(gate="probe")
MIRRORED = PLAIN.replace(mirror=True)


def probed(config: DynamicConfig = MIRRORED, first: int = 1) -> tuple[DynamicResNet, ProbeController]:
    """A network whose first pass runs option ``first`` everywhere, and whose second depends on the image."""
    network = make_dynamic(tiny_resnet(), config)
    controller = controller_of(network)
    assert isinstance(controller, ProbeController)
    controller.policy.fill_(first)
    spread_gate(network)
    return network, controller


def table_of(config: DynamicConfig = MIRRORED) -> CostTable:
    return plan_costs(tiny_resnet(), config, SIZE)


def passes(first: int, second: int, images: int) -> Decisions:
    return Decisions.alike(torch.tensor([[first] * 5, [second] * 5]), images)


@torch.no_grad()
def some_unsure(network: DynamicResNet, images: torch.Tensor, share: float = 0.4) -> None:
    """Set the threshold so that ``share`` of the images take the second pass."""
    network.controller.operating_point = NEVER_REFINE
    network.controller.operating_point = float(uncertainty(network.run(images).logits).quantile(1 - share))


def test_uncertainty_is_minus_the_log_odds() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 1.0]])
    p = logits.softmax(1).amax(1)
    assert uncertainty(logits).tolist() == pytest.approx([-math.log(v / (1 - v)) for v in p.tolist()], rel=1e-5)
    sure = torch.tensor([[60.0, 0.0], [61.0, 0.0]])
    assert uncertainty(sure)[0] > uncertainty(sure)[1], "where the confidence rounds to one, images still differ"


def test_the_summary_of_a_pass_by_hand() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    features = torch.tensor([[[[1.0, 3.0]], [[2.0, 6.0]]]])
    expected = [3 - math.log(1 + math.e), 2.0, 2.0, 4.0]
    assert summarise(logits, features).flatten().tolist() == pytest.approx(expected)


def test_sure_images_end_after_the_first_pass_and_the_others_add_up_both() -> None:
    network, controller = probed()
    x = torch.randn(20, *SIZE)
    some_unsure(network, x)
    with torch.no_grad():
        controller.logit_weights.copy_(torch.tensor([0.3, 0.9]))
        output = network.run(x)
        first = network.run(x, Decisions.of_pass(torch.full((20, 5), 1))).logits
        unsure = uncertainty(first) > controller.operating_point
        assert int(unsure.sum()) == 8
        assert torch.equal(output.decisions.in_pass(0), torch.full((20, 5), 1))
        assert torch.equal(output.decisions.ran[:, 1], unsure)
        torch.testing.assert_close(output.logits[~unsure], first[~unsure])
        second, _ = network.follow(x[unsure].flip(-1), output.decisions.in_pass(1)[unsure])
    torch.testing.assert_close(output.logits[unsure], 0.3 * first[unsure] + 0.9 * second, rtol=1e-5, atol=1e-6)


def test_without_mirror_the_second_pass_sees_the_image_as_it_is() -> None:
    x = torch.randn(4, *SIZE)
    network, _ = probed(PLAIN)
    with torch.no_grad():
        plain = network.run(x, passes(1, 1, 4)).logits
        # The mean of an answer with itself.
        torch.testing.assert_close(plain, network.run(x, Decisions.of_pass(torch.full((4, 5), 1))).logits)
        assert not torch.allclose(probed()[0].run(x, passes(1, 1, 4)).logits, plain, atol=1e-3)


def test_same_answer_alone_and_in_any_batch() -> None:
    network, _ = probed()
    x = torch.randn(24, *SIZE)
    some_unsure(network, x, 0.6)
    with torch.no_grad():
        together = network.run(x)
        assert together.decisions.distinct() >= 5, "the test needs images that decide differently"
        for size in (1, 5, 23):
            parts = [network.run(part) for part in x.split(size)]
            assert bool(Decisions.join(p.decisions for p in parts).equal(together.decisions).all())
            torch.testing.assert_close(torch.cat([p.logits for p in parts]), together.logits, rtol=1e-5, atol=1e-6)
        assert network.run(x[:0]).logits.shape == (0, 5)


def test_decisions_are_followed_whatever_the_threshold() -> None:
    network, controller = probed()
    x = torch.randn(12, *SIZE)
    some_unsure(network, x)
    with torch.no_grad():
        decided = network.run(x)
        controller.operating_point = NEVER_REFINE
        followed = network.run(x, decided.decisions)
    assert bool(followed.decisions.equal(decided.decisions).all())
    torch.testing.assert_close(followed.logits, decided.logits)


def test_a_lower_threshold_sends_more_images_on() -> None:
    network, controller = probed()
    table = table_of()
    x = torch.randn(64, *SIZE)
    costs = []
    with torch.no_grad():
        found = uncertainty(network.run(x).logits)
        for q in (1.0, 0.9, 0.5, 0.1):
            controller.operating_point = float(found.quantile(q))
            costs.append(table.cost(network.run(x).decisions).mean().item())
        controller.operating_point = ALWAYS_REFINE
        assert network.run(x).decisions.ran.all()
    assert costs == sorted(costs)
    assert costs[0] == pytest.approx(table.cost(Decisions.of_pass(torch.full((1, 5), 1))).item()), (
        "the first pass alone"
    )


def test_a_cost_multiplier_lowers_the_bits_of_the_second_pass_alone() -> None:
    network, controller = probed()
    x = torch.randn(16, *SIZE)
    controller.operating_point = ALWAYS_REFINE
    means = []
    for multiplier in (0.0, 1e4, 1e9):
        controller.cost_multiplier = multiplier
        with torch.no_grad():
            decisions = network.run(x).decisions
        assert (decisions.in_pass(0) == 1).all()
        means.append(float(decisions.in_pass(1).float().mean()))
    assert means[0] > means[1] > means[2] == 0


def test_in_training_the_least_sure_share_goes_on() -> None:
    network, _ = probed()
    network.train()
    x = torch.randn(40, *SIZE)
    output = network.run(x, target=TuningTarget(0.1, share=0.1))
    first, second = output.answers
    assert first.rows is None and second.rows is not None and second.probs is not None
    expected = uncertainty(first.logits.detach()).topk(4).indices
    assert set(second.rows.tolist()) == set(expected.tolist())
    assert second.probs.shape == (4, 5, 5) and second.logits.shape == (4, 5)
    assert int(output.decisions.ran[:, 1].sum()) == 4
    # Of a larger share a fifth of the batch is drawn, so that a step stays cheap.
    many = network.run(x, target=TuningTarget(0.1, share=1.0)).answers[1].rows
    assert many is not None and len(many) == 8


@pytest.mark.medium
def test_gradients_reach_everything_but_a_sure_images_second_pass() -> None:
    network, controller = probed()
    network.train()
    x = torch.randn(20, *SIZE)
    for option in (0, 1, 2, 3, 4):
        output = network.run(x, passes(max(option, 1), option, 20), TuningTarget(0.1, explored=1.0))
        ((output.logits.square().sum() + output.answers[0].logits.square().sum()) * 1e-2).backward()
    without = [
        name
        for name, p in network.named_parameters()
        if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.any()
    ]
    assert without == []
    gate, quantizers, backbone = parameter_groups(network)
    assert any(p is controller.logit_weights for p in gate)
    assert len(gate) + len(quantizers) + len(backbone) == len(list(network.parameters()))


@pytest.mark.medium
def test_the_start_keeps_to_the_budget_and_is_careful_with_few_images() -> None:
    config = DynamicConfig(bits=(0, 2, 3, 4, 5, 6, 8), fixed_bits=2, gate="probe", mirror=True)
    table = table_of(config)
    harm = (1 - torch.tensor(table.options) / 8).square().repeat(5, 1)
    shares = []
    for held_out in (5000, 200):
        network = make_dynamic(tiny_resnet(), config)
        controller = controller_of(network)
        request = Request(0.03, True, held_out, 5000)
        target = controller.start(network, table, Sensitivity(harm), request, torch.randn(16, *SIZE))
        first = controller.movable(table)[0]
        assert first <= 0.65 * 0.03 and first + target.share * target.cost == pytest.approx(0.03)
        assert controller.cost_multiplier > 0
        shares.append(target.share)
    assert shares[0] < shares[1] <= 1


@pytest.mark.medium
def test_what_more_bits_do_not_help_with_is_not_planned_for_unless_it_is_to_be_spent() -> None:
    config = DynamicConfig(bits=(0, 2, 3, 4, 5, 6, 8, 32), fixed_bits=2, gate="probe")
    table = table_of(config)
    harm = (1 - torch.tensor(table.options) / 32).square().repeat(5, 1)
    planned = {}
    for spend in (False, True):
        network = make_dynamic(tiny_resnet(), config)
        controller = controller_of(network)
        request = Request(0.5, spend, 5000, 5000)
        target = controller.start(network, table, Sensitivity(harm), request, torch.randn(16, *SIZE))
        planned[spend] = controller.movable(table)[0] + target.share * target.cost
    # Six bits for all, and eight for the unsure, are the most that is of use.
    assert planned[True] == pytest.approx(0.5) and planned[False] <= 0.04 + 0.0625 + 1e-6


@pytest.mark.parametrize(
    "factor", [1.2, pytest.param(2.0, marks=pytest.mark.slow), pytest.param(9.0, marks=pytest.mark.slow)]
)
def test_the_budget_is_spent_by_threshold_or_by_multiplier(factor: float) -> None:
    network, controller = probed()
    table = table_of()
    budget = factor * controller.movable(table)[0]
    controller.cost_multiplier = 300.0
    controller.freeze()  # what tuning ended with
    held_out = torch.randn(400, *SIZE)
    request = Request(budget, True, 400, 400)
    point = controller.set_operating_point(network, table, HeldOut(held_out.split(200)), request)
    with torch.no_grad():
        cost = table.cost(network.run(held_out).decisions).mean().item()
    assert cost == pytest.approx(point.cost) and 0.9 * budget <= cost <= budget
    assert (controller.operating_point == ALWAYS_REFINE) == (factor == 9.0)
    # It can be moved back: the multiplier that tuning ended with is kept.
    low, _ = controller.movable(table)
    again = controller.set_operating_point(
        network, table, HeldOut(held_out.split(200)), request._replace(budget=1.1 * low)
    )
    assert 0.9 * 1.1 * low <= again.cost <= 1.1 * low and controller.cost_multiplier == 300.0


def test_the_refused_second_pass_is_marked_in_every_block() -> None:
    network, controller = probed()
    controller.operating_point = NEVER_REFINE
    with torch.no_grad():
        output = network.run(torch.randn(3, *SIZE))
    assert (output.decisions.in_pass(1) == NOT_RUN).all() and len(output.answers) == 1
