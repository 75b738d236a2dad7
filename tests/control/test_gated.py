import math

import pytest
import torch
from common import RNN, SIZE, make_dynamic, spread_gate, tiny_resnet
from timm.models.resnet import Bottleneck
from torch import nn

from dfs_cli.config import DynamicConfig
from dfs_cli.control.base import HeldOut, Request, Sensitivity, controller_of
from dfs_cli.control.gated import GatedController
from dfs_cli.control.gates import FeedForwardGate, RecurrentGate, initial_preference, pool, shift_preference
from dfs_cli.control.static import best_block_mix
from dfs_cli.surgery.plan import plan_costs


def test_a_growing_cost_multiplier_lowers_the_bits(tiny: nn.Module) -> None:
    network = make_dynamic(tiny)
    x = torch.randn(16, *SIZE)
    means = []
    for multiplier in (0.0, 30.0, 100.0, 400.0, 1e6):
        network.controller.cost_multiplier = multiplier
        assert network.controller.operating_point == multiplier
        with torch.no_grad():
            means.append(float(network.run(x).decisions.options.float().mean()))
    assert means[0] == 4 and means[-1] == 0
    assert means == sorted(means, reverse=True) and len(set(means)) >= 4


def test_every_option_is_the_first_choice_at_some_multiplier() -> None:
    preference, costs = initial_preference(RNN.bits), torch.tensor([(b / 32) ** 2 for b in RNN.bits])
    assert preference.tolist() == pytest.approx([6 * (b / 32) ** 0.5 for b in RNN.bits])
    chosen = [int((preference - m * costs).argmax()) for m in torch.logspace(-2, 4, 200).tolist()]
    assert chosen == sorted(chosen, reverse=True) and set(chosen) == set(range(5))


def test_harmless_options_are_preferred_by_hand() -> None:
    preference = torch.zeros(2, 2)
    # Logarithms of the harm; the mean of a column, less its rows, at most 1.8 either way.
    shift_preference(preference, torch.tensor([[math.exp(-1), math.exp(-3)], [math.exp(-2), math.exp(-8)]]))
    torch.testing.assert_close(preference, torch.tensor([[-0.5, -1.8], [0.5, 1.8]]))


def test_starting_prefers_what_does_little_harm_and_adapts_to_what_the_gate_sees(tiny: nn.Module) -> None:
    network, table = make_dynamic(tiny), plan_costs(tiny, RNN, SIZE)
    controller = controller_of(network)
    before = {name: value.clone() for name, value in controller.state_dict().items()}
    harm = torch.full((5, 5), 0.1)
    harm[2] = 0.2
    sample = 3 * torch.randn(64, *SIZE)
    target = controller.start(network, table, Sensitivity(harm), Request(0.2, False, 64, 64), sample)
    assert target.cost == 0.2
    shift = controller.state_dict()["gate.preference"] - before["gate.preference"]
    assert (shift[2] < 0).all() and (shift[[0, 1, 3, 4]] > 0).all()
    changed = {name for name, value in controller.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"gate.embed.{i}.{kind}" for i in range(5) for kind in ("weight", "bias")} | {"gate.preference"}


@pytest.mark.parametrize("budget", [0.05, 0.2, 0.6])
def test_tuning_begins_with_the_best_static_mix_for_all_images(budget: float) -> None:
    model = tiny_resnet()
    network, table = make_dynamic(model), plan_costs(model, RNN, SIZE)
    controller = controller_of(network)
    harm = torch.rand(5, 5, generator=torch.Generator().manual_seed(1)).sort(dim=1, descending=True).values
    assert isinstance(controller, GatedController)
    for head in controller.gate.heads_of_scores():
        nn.init.zeros_(head.weight)
    sample = torch.randn(16, *SIZE)
    controller.start(network, table, Sensitivity(harm), Request(budget, True, 64, 64), sample)
    policy = controller.first_policy()
    assert policy is not None and policy.tolist() == best_block_mix(table, harm, budget).tolist()
    decisions = network.eval().run(sample).decisions
    assert torch.equal(decisions.in_pass(0), policy.expand(16, -1))
    assert float(table.cost(decisions).max()) <= budget * (1 + 1e-9)


def test_the_input_of_a_gate_is_normalised() -> None:
    gate = RecurrentGate((6, 6), RNN)
    embed = gate.embed[1]
    assert isinstance(embed, nn.Linear)
    weight, bias = embed.weight.detach().clone(), embed.bias.detach().clone()
    features = torch.randn(200, 6, 4, 4) * torch.arange(1, 7).reshape(1, 6, 1, 1) + 5
    gate.normalise_input(1, features)
    pooled = features.mean((2, 3))
    standardised = (pooled - pooled.mean(0)) / pooled.std(0, correction=0)
    torch.testing.assert_close(embed(pooled), standardised @ weight.T + bias, rtol=1e-3, atol=1e-4)


def test_a_lone_image_gives_finite_parameters(tiny: nn.Module) -> None:
    network, table = make_dynamic(tiny), plan_costs(tiny, RNN, SIZE)
    controller_of(network).start(
        network, table, Sensitivity(torch.full((5, 5), 0.1)), Request(0.2, False, 1, 1), torch.randn(1, *SIZE)
    )
    assert all(torch.isfinite(p).all() for p in network.parameters())


@pytest.mark.parametrize("kind", [RecurrentGate, FeedForwardGate])
def test_macs_of_a_gate_are_those_of_its_linear_maps(kind: type[RecurrentGate] | type[FeedForwardGate]) -> None:
    config = DynamicConfig(bits=(0, 8, 32), gate="rnn", embedding=7, hidden=5)
    channels = (3, 4)
    gate = kind(channels, config)
    per_block = {name: p.numel() for name, p in gate.named_parameters() if "weight" in name}
    once = sum(n for name, n in per_block.items() if name.startswith(("cell", "head.")))
    found = kind.macs(channels, config)
    for block in range(2):
        of_block = per_block[f"embed.{block}.weight"] + per_block.get(f"heads.{block}.weight", 0)
        assert found[block] == of_block + once


def test_means_are_taken_again_only_of_what_changed() -> None:
    gate = RecurrentGate((4, 4), RNN)
    features = torch.randn(3, 4, 160, 160)  # large enough to be worth it
    known = pool(features)
    expected = known.clone()
    features[1] += 1
    features[2] += 1
    found = gate.pool(features, known, torch.tensor([1]))
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1] + 1)
    torch.testing.assert_close(found[2], expected[2]), "said to be unchanged: not looked at"
    small = torch.randn(3, 4, 8, 8)
    torch.testing.assert_close(gate.pool(small, torch.zeros(3, 4), torch.tensor([1])), small.mean((2, 3)))


@pytest.mark.medium
def test_means_of_unchanged_features_need_not_be_taken_again() -> None:
    """Without gradients means are kept from block to block where images skip; with them they are taken of all."""
    network = make_dynamic(tiny_resnet(Bottleneck), DynamicConfig(bits=(0, 4, 8), gate="rnn"), (3, 128, 128))
    spread_gate(network)
    images = torch.randn(4, 3, 256, 256)
    with torch.no_grad():
        found = network.run(images)
    expected = network.run(images)
    skipped = (found.decisions.options == 0).float().mean()
    assert 0 < float(skipped) < 1 and found.decisions.distinct() > 1
    assert bool(found.decisions.equal(expected.decisions).all())
    torch.testing.assert_close(found.logits, expected.logits.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["rnn", "ff"])
@pytest.mark.parametrize("share", [0.9, 0.3, 0.02])
def test_other_images_keep_the_budget_too(gate: str, share: float) -> None:
    model = tiny_resnet()
    config = RNN.replace(gate=gate)
    table = plan_costs(model, config, SIZE)
    budget = table.cheapest + share * (table.dearest - table.cheapest)
    network = make_dynamic(model, config)
    held_out, others = torch.randn(2, 600, *SIZE, generator=torch.Generator().manual_seed(1)).unbind()
    request = Request(budget, True, 600, 600)
    point = controller_of(network).set_operating_point(network, table, HeldOut(held_out.split(200)), request)
    assert network.controller.operating_point == point.value and point.top1 is None
    assert 0.92 * budget <= point.cost <= budget
    with torch.no_grad():
        cost = table.cost(network.run(others).decisions).mean().item()
    assert 0.9 * budget <= cost <= 1.01 * budget


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["rnn", "ff"])
def test_held_out_accuracy_does_not_fall_as_the_budget_grows(gate: str) -> None:
    """With random classes accuracy over cost goes up and down; the best affordable point is taken all the same."""
    config = RNN.replace(gate=gate)
    network, table = make_dynamic(tiny_resnet(), config), plan_costs(tiny_resnet(), config, SIZE)
    spread_gate(network)
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(120, *SIZE, generator=generator)
    held_out = HeldOut([images], torch.randint(5, (120,), generator=generator))
    points = []
    for budget in (0.055, 0.06, 0.07, 0.08, 0.1, 0.13, 0.2, 0.4, 0.7):
        request = Request(budget, False, len(held_out), 120)
        points.append(controller_of(network).set_operating_point(network, table, held_out, request))
        assert points[-1].cost <= budget
    top1 = [point.top1 for point in points]
    assert all(value is not None for value in top1) and top1 == sorted(top1)  # type: ignore[type-var]
    assert len(set(top1)) > 1, "the test needs budgets that make a difference"
