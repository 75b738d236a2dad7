import dataclasses
from itertools import product

import pytest
import torch
from common import SIZE, make_dynamic, tiny_resnet
from torch import nn

from dfs_cli.config import DynamicConfig
from dfs_cli.control.base import Request, Sensitivity, controller_of
from dfs_cli.control.static import best_block_mix, best_layer_mix, policy_of, sufficient_cost
from dfs_cli.cost.decisions import Decisions
from dfs_cli.cost.layer import LayerCost
from dfs_cli.cost.table import CostTable
from dfs_cli.errors import ConfigError
from dfs_cli.nn.layers import FractionalLayer
from dfs_cli.surgery.plan import plan_costs

STATIC = DynamicConfig(bits=(0, 4, 8, 32), gate="static")


def two_blocks() -> CostTable:
    """A stem at 8 bits and two blocks of three layers, which differ in size."""
    layers = [LayerCost(f"{b}{i}", 100 + 30 * i, b) for b, i in product((0, 1), (0, 1, 2))]
    return CostTable((0, 2, 4, 8, 32), ("a", "b"), (LayerCost("stem", 50, bits=8), *layers), ((0, 0),))


def harm_of_layers() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    harm = torch.rand(6, 5, generator=generator).sort(dim=1, descending=True).values
    harm[:, 0] = torch.inf
    return harm


def test_a_mix_with_a_skipped_block_runs_only_what_it_says() -> None:
    model = tiny_resnet()
    table = plan_costs(model, STATIC, SIZE)
    names = [layer.name for layer in table.layers if layer.block is not None]
    blocks = {layer.name: layer.block for layer in table.layers}
    # Block 1 is skipped; in each other block the first layer has 8 bits, the second one 4, and block 4 runs in full.
    mix = {n: {1: 0, 4: 32}.get(blocks[n], 8 if n.endswith("conv1") else 4) for n in names}  # type: ignore[arg-type]
    mixed = table.with_layer_bits(mix)
    network = make_dynamic(model, STATIC, table=mixed)
    ran: dict[str, int] = {}
    for name in names:
        layer = network.backbone.get_submodule(name)
        assert isinstance(layer, FractionalLayer)

        def record(module: nn.Module, _: object, name: str = name) -> None:
            assert isinstance(module, FractionalLayer)
            ran[name] = module.precision.bits

        layer.register_forward_pre_hook(record)
    with torch.no_grad():
        output = network.run(torch.randn(3, *SIZE))
    assert ran == {name: bits for name, bits in mix.items() if bits}
    assert output.decisions.options.tolist() == [[[2, 0, 2, 2, 3]]] * 3
    by_hand = sum(x.macs * ((mix[x.name] if x.block is not None else 8) / 32) ** 2 for x in table.layers)
    by_hand /= sum(x.macs for x in table.layers)
    assert mixed.cost(output.decisions).tolist() == pytest.approx([by_hand] * 3)
    assert controller_of(network).movable(mixed) == pytest.approx((by_hand, by_hand))


def test_a_uniform_mix_is_the_option_of_the_same_bits() -> None:
    model, static = tiny_resnet(), STATIC.replace(bits=(0, 4, 8))  # bytes between blocks, whether mixed or not
    table = plan_costs(model, static, SIZE)
    mix = {layer.name: 8 for layer in table.layers if layer.block is not None}
    network, mixed = make_dynamic(model, static), make_dynamic(model, static, table=table.with_layer_bits(mix))
    images = torch.randn(4, *SIZE)
    with torch.no_grad():
        expected = network.run(images, Decisions.alike(torch.full((5,), 2), 4))
        found = mixed.run(images)
        narrower = network.run(images, Decisions.alike(torch.full((5,), 1), 4))
    torch.testing.assert_close(found.logits, expected.logits, rtol=0.02, atol=0.02)
    assert (found.logits - expected.logits).abs().max() < 0.2 * (narrower.logits - expected.logits).abs().max()
    assert bool(found.decisions.equal(expected.decisions).all())


def test_the_policy_follows_from_the_table_by_hand() -> None:
    table = two_blocks()
    assert policy_of(table).tolist() == [4, 4], "without a mix the widest option"
    mix = {"00": 2, "01": 8, "02": 4, "10": 0, "11": 0, "12": 0}
    assert policy_of(table.with_layer_bits(mix)).tolist() == [3, 0]


def test_the_block_mix_is_the_best_of_all() -> None:
    table = plan_costs(tiny_resnet(), DynamicConfig(bits=(2, 4, 8, 32), fixed_bits=2, gate="static"), SIZE)
    harm = torch.rand(5, 4, generator=torch.Generator().manual_seed(3)).sort(dim=1, descending=True).values
    for cost in (0.005, 0.02, 0.1, 0.5):
        found = best_block_mix(table, harm, cost)
        affordable = {
            mix: sum(harm[i, k].item() for i, k in enumerate(mix))
            for mix in product(range(4), repeat=5)
            if table.cost(Decisions.alike(torch.tensor(mix), 1)).item() <= cost
        }
        assert sum(harm[i, k].item() for i, k in enumerate(found.tolist())) == pytest.approx(min(affordable.values()))
        assert tuple(found.tolist()) in affordable
    with pytest.raises(ConfigError, match="no static mix"):
        best_block_mix(table, harm, 0.0001)


@pytest.mark.parametrize("cost", [0.008, 0.02, 0.1, 0.5])
@pytest.mark.parametrize("skipping", [(9.0, 0.5), (9.0, 9.0)])
def test_the_layer_mix_is_the_best_of_all_and_may_skip_blocks(cost: float, skipping: tuple[float, float]) -> None:
    table, harm = two_blocks(), harm_of_layers()
    blocks = torch.zeros(2, 5)
    blocks[:, 0] = torch.tensor(skipping)
    found = best_layer_mix(table, Sensitivity(blocks, harm), cost)
    mixed = table.with_layer_bits(found)
    assert mixed.cost(Decisions.alike(policy_of(mixed), 1)).item() <= cost

    def harm_of(mix: tuple[int, ...]) -> float:
        halves = (mix[:3], mix[3:])
        return sum(
            skipping[b] if not any(half) else sum(float(harm[3 * b + i, k]) for i, k in enumerate(half))
            for b, half in enumerate(halves)
        )

    of_block = [(0, 0, 0), *product(range(1, 5), repeat=3)]
    costs = [[layer.macs / table.dense_macs * (bits / 32) ** 2 for bits in table.options] for layer in table.layers[1:]]
    fixed = 50 / 16 / table.dense_macs
    least = min(
        harm_of(a + b)
        for a, b in product(of_block, of_block)
        if fixed + sum(costs[i][k] for i, k in enumerate(a + b)) <= cost
    )
    assert harm_of(tuple(table.options.index(found[x.name]) for x in table.layers[1:])) == pytest.approx(least)
    # Skipping the second block does less harm than narrow options; the first one's harm is never worth it.
    assert (found["10"] == 0) == (skipping[1] == 0.5) and found["00"] > 0


def test_candidates_are_the_best_layer_mix_and_the_best_block_mix() -> None:
    table, harm = two_blocks(), harm_of_layers()
    blocks = torch.rand(2, 5, generator=torch.Generator().manual_seed(2)).sort(dim=1, descending=True).values
    sensitivity = Sensitivity(blocks, harm)
    controller = controller_of(make_dynamic(tiny_resnet(), STATIC))
    by_layer, by_block = controller.candidates(table, sensitivity, Request(0.05, False, 10, 10))
    assert by_layer.layer_bits == best_layer_mix(table, sensitivity, 0.05)
    options = best_block_mix(table, blocks, 0.05).tolist()
    assert [by_block.layer_bits[f"{b}{i}"] for b in (0, 1) for i in (0, 1, 2)] == [
        table.options[option] for option in options for _ in range(3)
    ]
    harmful = Sensitivity(blocks + torch.tensor([9.0, 0, 0, 0, 0]), harm)
    (only,) = controller.candidates(table, harmful, Request(1.0, False, 10, 10))
    assert only.layer_bits == dict.fromkeys(by_block.layer_bits, 32), "with room for everything both are the same"
    with pytest.raises(ConfigError, match="no static mix"):
        controller.candidates(table, sensitivity, Request(0.0001, False, 10, 10))


def test_two_views_are_both_paid_and_their_logits_are_averaged() -> None:
    model = tiny_resnet()
    views = STATIC.replace(bits=(0, 4, 8), mirror=True)
    table = plan_costs(model, views, SIZE)
    network = make_dynamic(model, views, table=table)
    images = torch.randn(3, *SIZE)
    with torch.no_grad():
        output = network.run(images)
        one, other = (network.run(x, Decisions.alike(policy_of(table), 3)).logits for x in (images, images.flip(-1)))
    assert output.decisions.passes == 2 and output.decisions.ran.all()
    assert torch.allclose(output.logits, (one + other) / 2, atol=1e-5)
    alone = plan_costs(model, views.replace(mirror=False), SIZE).cost(Decisions.alike(policy_of(table), 1))
    assert torch.equal(table.cost(output.decisions), 2 * alone.expand(3))
    assert controller_of(network).movable(table) == (2 * alone.item(), 2 * alone.item())


def test_a_mix_for_two_views_costs_half_as_much_in_each() -> None:
    two = two_blocks()
    two = dataclasses.replace(two, controller_macs=two.controller_macs * 2, compulsory_passes=2)
    blocks = torch.rand(2, 5, generator=torch.Generator().manual_seed(2)).sort(dim=1, descending=True).values
    sensitivity = Sensitivity(blocks, harm_of_layers())
    controller = controller_of(make_dynamic(tiny_resnet(), STATIC))
    request = Request(0.05, False, 10, 10)
    assert two.cheapest == pytest.approx(2 * two_blocks().cheapest) and two.always == pytest.approx(
        two.fixed_cost(0) * 2
    )
    alone = controller.candidates(two_blocks(), sensitivity, request._replace(budget=0.025))
    assert [mix.layer_bits for mix in controller.candidates(two, sensitivity, request)] == [
        mix.layer_bits for mix in alone
    ]


def test_with_one_option_there_is_one_candidate_and_nothing_to_measure() -> None:
    config = DynamicConfig(bits=(8,), gate="static")
    table = plan_costs(tiny_resnet(), config, SIZE)
    controller = controller_of(make_dynamic(tiny_resnet(), config))
    (only,) = controller.candidates(table, None, Request(0.1, False, 10, 10))
    assert set(only.layer_bits.values()) == {8}
    assert only.cost(Decisions.alike(policy_of(only), 1)).item() == pytest.approx(1 / 16)


def test_the_cheapest_mix_of_little_harm_is_the_cheapest_of_all() -> None:
    table = two_blocks()
    harm = torch.rand(2, 5, generator=torch.Generator().manual_seed(3)).sort(dim=1, descending=True).values
    harm[:, -1] = 0
    for limit in (0.0, 0.3, 0.8, 5.0):
        costs = [
            table.cost(Decisions.of_pass(torch.tensor([mix]))).item()
            for mix in product(range(5), repeat=2)
            if sum(float(harm[block, option]) for block, option in enumerate(mix)) <= limit
        ]
        assert sufficient_cost(table, harm, limit) == pytest.approx(min(costs))
    assert sufficient_cost(table, harm + 1, 0.5) == pytest.approx(table.dearest_pass(0)), "where no mix does so little"


def test_sensitivities_are_measured_under_every_option_and_a_mix_runs_alone() -> None:
    model = tiny_resnet()
    table = plan_costs(model, STATIC, SIZE)
    unmixed = controller_of(make_dynamic(model, STATIC, table=table))
    assert [int(policy[0]) for policy in unmixed.policies()] == [0, 1, 2], "all but floating point"
    mixed = table.with_layer_bits({layer.name: 4 for layer in table.layers if layer.block is not None})
    (policy,) = controller_of(make_dynamic(model, STATIC, table=mixed)).policies()
    assert policy.tolist() == [1] * 5


def test_a_budget_that_is_to_be_spent_is_spent_or_refused_before_tuning() -> None:
    table, layers = two_blocks(), harm_of_layers()
    layers[:, 2:] = 0
    harmless = Sensitivity(torch.tensor([[9.0, 1.0, 0.0, 0.0, 0.0]] * 2), layers)
    controller = controller_of(make_dynamic(tiny_resnet(), STATIC))
    for budget in (0.05, 0.3, 0.9):
        for candidate in controller.candidates(table, harmless, Request(budget, True, 10, 10)):
            cost = candidate.cost(Decisions.alike(policy_of(candidate), 1)).item()
            assert 0.9 * budget <= cost <= budget * (1 + 1e-6)
    with pytest.raises(ConfigError, match=r"costs 0\.0018 to 0\.002"):
        controller.candidates(table, harmless, Request(0.002, True, 10, 10))
