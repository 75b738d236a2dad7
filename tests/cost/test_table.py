import dataclasses
from typing import Any

import pytest
import timm
import torch
from common import RNN, SIZE, tiny_resnet

from dfs_cli.config import DynamicConfig
from dfs_cli.cost.decisions import NOT_RUN, Decisions
from dfs_cli.cost.layer import LayerCost
from dfs_cli.cost.table import CostTable
from dfs_cli.cost.weighting import mac_cost
from dfs_cli.errors import ConfigError
from dfs_cli.surgery.plan import plan_costs

# 1000 MACs in all: a stem at 8 bits, a block of two layers, a block of one; the controller costs 10 and 20 MACs.
STEM = LayerCost("stem", 200, bits=8)
LAYERS = (STEM, LayerCost("a.1", 100, 0), LayerCost("a.2", 300, 0), LayerCost("b", 400, 1))
TABLE = CostTable((0, 8, 32), ("a", "b"), LAYERS, ((0, 0), (10, 20)))
FIXED = 200 / 16 / 1000


def test_cost_of_a_mac_by_hand() -> None:
    assert [mac_cost(b) for b in (0, 4, 8, 16, 32)] == [0, 1 / 64, 1 / 16, 1 / 4, 1]


def test_costs_of_each_pass_by_hand() -> None:
    assert (TABLE.passes, TABLE.dense_macs, TABLE.block_macs) == (2, 1000, (400, 400))
    assert TABLE.option_costs.flatten().tolist() == pytest.approx([0, 0.025, 0.4] * 4)
    assert list(TABLE.controller_costs) == pytest.approx([0, 0.03])
    assert (TABLE.fixed_cost(0), TABLE.fixed_cost(1)) == pytest.approx((FIXED, FIXED + 0.03))
    assert TABLE.cheapest == pytest.approx(FIXED)
    assert (TABLE.dearest_pass(0), TABLE.dearest_pass(1)) == pytest.approx((FIXED + 0.8, FIXED + 0.83))
    assert TABLE.dearest == pytest.approx(2 * FIXED + 1.63)
    assert TABLE.uniform_cost(8) == 1 / 16


def test_a_first_pass_over_smaller_images_costs_less_by_hand() -> None:
    first_macs = (120, 50, 100, 80)
    layers = tuple(dataclasses.replace(layer, first_macs=n) for layer, n in zip(LAYERS, first_macs, strict=True))
    table = dataclasses.replace(TABLE, layers=layers, first_view=0.75)
    assert table.option_costs[0].flatten().tolist() == pytest.approx([0, 0.15 / 16, 0.15, 0, 0.08 / 16, 0.08])
    assert torch.equal(table.option_costs[1], TABLE.option_costs[1])
    assert table.fixed_layers_costs == pytest.approx((120 / 16 / 1000, FIXED))
    assert table.dense_macs == 1000 and table.uniform_cost(8) == 1 / 16
    # In one pass for all images they are seen in full.
    alone = table.without_deciding()
    assert alone.first_view == 1 and torch.equal(alone.option_costs[0], TABLE.option_costs[0])


def test_images_pay_for_the_passes_they_take() -> None:
    decisions = Decisions(torch.tensor([[[0, 1], [NOT_RUN, NOT_RUN]], [[0, 1], [2, 1]], [[2, 0], [0, 0]]]))
    expected = [FIXED + 0.025, 2 * FIXED + 0.025 + 0.03 + 0.425, 2 * FIXED + 0.4 + 0.03]
    assert TABLE.cost(decisions).tolist() == pytest.approx(expected)
    assert TABLE.block_costs(decisions).flatten().tolist() == pytest.approx([0, 0.025, 0.4, 0.05, 0.4, 0])
    assert TABLE.pass_cost(decisions.in_pass(1)[1:], 1).tolist() == pytest.approx([FIXED + 0.455, FIXED + 0.03])
    # Decisions may have fewer passes than the table.
    assert TABLE.cost(Decisions.of_pass(torch.tensor([[2, 2]]))).tolist() == pytest.approx([FIXED + 0.8])


def test_sums_of_costs_are_exact_in_whatever_order() -> None:
    many = CostTable(
        (0, 3, 7), tuple("abcdefghi"), (STEM, *(LayerCost(b, 7, i) for i, b in enumerate("abcdefghi"))), ((3,) * 9,)
    )
    costs = many.option_costs[0]
    steps = costs * 2**44
    assert torch.equal(steps, steps.round()) and costs[0].tolist() == pytest.approx(
        [0, 7 * 9 / 1024 / 263, 7 * 49 / 1024 / 263]
    )
    policy = torch.tensor([1, 2, 1, 2, 2, 0, 1, 2, 1])
    chosen = costs.gather(1, policy[:, None]).flatten().tolist()
    forwards = sum([many.fixed_cost(0), *chosen])
    assert many.cost(Decisions.alike(policy, 1)).item() == forwards == sum([*reversed(chosen), many.fixed_cost(0)])


def test_a_limit_is_checked_with_the_budget() -> None:
    TABLE.check_budget(0.5, limit=TABLE.cheapest)
    with pytest.raises(
        ConfigError, match=r"limit 0.01 cannot be kept with options 0,8,32: .*; pass --limit 0.0125 or more"
    ):
        TABLE.check_budget(0.5, limit=0.01)
    TABLE.check_budget(0.5, spend=True, limit=0.45)
    with pytest.raises(ConfigError, match=r"budget 0.5 cannot be spent where no image may cost more than 0.44: "):
        TABLE.check_budget(0.5, spend=True, limit=0.44)


def test_layers_may_have_bits_of_their_own() -> None:
    table = TABLE.with_layer_bits({"a.1": 8, "a.2": 32, "b": 0})
    assert table.layer_bits == {"a.1": 8, "a.2": 32, "b": 0} and TABLE.layer_bits == {}
    # Whatever runs of block a costs the same, and block b costs nothing.
    runs = 100 / 16 / 1000 + 0.3
    assert table.option_costs[0].flatten().tolist() == pytest.approx([0, runs, runs, 0, 0, 0])
    policies = Decisions.of_pass(torch.tensor([[0, 0], [1, 0], [2, 0]]))
    assert table.cost(policies).tolist() == pytest.approx([FIXED, FIXED + runs, FIXED + runs])
    uniform = TABLE.with_layer_bits(dict.fromkeys(("a.1", "a.2", "b"), 8))
    assert uniform.cost(Decisions.of_pass(torch.tensor([[2, 2]]))).tolist() == pytest.approx([FIXED + 0.05])
    with pytest.raises(KeyError):
        TABLE.with_layer_bits({"a.1": 8})


def test_expected_cost_of_certain_decisions_is_their_cost() -> None:
    options = torch.randint(0, 3, (7, 2), generator=torch.Generator().manual_seed(0))
    probs = torch.nn.functional.one_hot(options, 3).double().requires_grad_()
    for index in range(2):
        expected = TABLE.expected_pass_cost(probs, index)
        torch.testing.assert_close(expected, TABLE.pass_cost(options, index))
    expected.sum().backward()
    assert probs.grad is not None and torch.equal(probs.grad[0], TABLE.option_costs[1])


def test_table_of_a_hand_counted_network() -> None:
    """A ResNet-20 on 1x8x8 images, counted by hand."""
    model = timm.create_model("resnet20_cifar", in_chans=1)
    config = DynamicConfig(bits=(0, 8, 32), fixed_bits=8, gate="rnn", embedding=2, hidden=3)
    table = plan_costs(model, config, (1, 8, 8))
    stage1 = 2 * 16 * 16 * 9 * 64
    stage2_first = (16 * 32 * 9 + 32 * 32 * 9) * 16
    stage2 = 2 * 32 * 32 * 9 * 16
    stage3_first = (32 * 64 * 9 + 64 * 64 * 9) * 4
    stage3 = 2 * 64 * 64 * 9 * 4
    assert table.block_macs == (stage1,) * 3 + (stage2_first, stage2, stage2) + (stage3_first, stage3, stage3)
    fixed = 1 * 16 * 9 * 64 + 16 * 32 * 16 + 32 * 64 * 4 + 64 * 10
    dense = sum(table.block_macs) + fixed
    assert table.dense_macs == dense
    # Embedding, LSTM of width 3 on 2 inputs, three options.
    gate = tuple(c * 2 + 4 * 3 * (2 + 3) + 3 * 3 for c in (16, 16, 16, 16, 32, 32, 32, 64, 64))
    assert table.controller_macs == (gate,)
    assert table.fixed_cost(0) == pytest.approx((fixed / 16 + sum(gate)) / dense)
    policies = Decisions.of_pass(torch.tensor([[0] * 9, [2] * 9, [1, 0, 0, 2, 0, 0, 0, 0, 0]]))
    expected = [0, sum(table.block_macs), stage1 / 16 + stage2_first]
    found = table.cost(policies)
    assert found.tolist() == pytest.approx([table.fixed_cost(0) + e / dense for e in expected])
    assert table.cheapest == pytest.approx(found[0].item()) and table.dearest == pytest.approx(found[1].item())


def test_what_deciding_costs_by_hand() -> None:
    """For the same network: a feed-forward gate per block, none, and a gate before the second pass."""
    model = timm.create_model("resnet20_cifar", in_chans=1)
    channels = (16, 16, 16, 16, 32, 32, 32, 64, 64)
    expected = {
        "ff": (tuple(c * 2 + 2 * 3 for c in channels),),
        "static": ((0,) * 9,),
        # 64 pooled features, log-odds and margin to 3 hidden values, these to three scores for each of nine blocks.
        "probe": ((0,) * 9, ((64 + 2) * 3 + 3 * 9 * 3, *(0,) * 8)),
    }
    for gate, macs in expected.items():
        config = DynamicConfig(bits=(0, 8, 32), gate=gate, embedding=2, hidden=3)  # type: ignore[arg-type]
        assert plan_costs(model, config, (1, 8, 8)).controller_macs == macs


def test_attention_is_in_the_fixed_part() -> None:
    table = plan_costs(timm.create_model("seresnet50"), RNN, (3, 64, 64))
    attention = [layer for layer in table.layers if ".se." in layer.name]
    assert len(attention) == 2 * 16 and all((layer.block, layer.bits) == (None, 32) for layer in attention)
    shortcuts = [layer for layer in table.layers if "downsample" in layer.name]
    assert len(shortcuts) == 4 and all((layer.block, layer.bits) == (None, 8) for layer in shortcuts)


def test_table_goes_to_json_and_back() -> None:
    for table in (TABLE, TABLE.with_layer_bits({"a.1": 8, "a.2": 32, "b": 0}), plan_costs(tiny_resnet(), RNN, SIZE)):
        assert CostTable.from_dict(table.to_dict()) == table


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"controller_macs": ((0,), (1, 2))}, "another number of blocks"),
        ({"controller_macs": ()}, "controller.macs"),
        ({"blocks": ("a",), "controller_macs": ((0,),)}, "a block that is not there"),
        ({"layers": (*LAYERS, LayerCost("free", 10))}, "fixed layer without a bitwidth"),
        ({"layers": (LayerCost("stem", 0, bits=8),)}, "no MACs"),
        ({"options": (0, "8")}, "options"),
    ],
)
def test_tables_that_contradict_themselves_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TABLE.replace(**changes)
    with pytest.raises(ConfigError):
        LayerCost("x", -1, bits=8)


def test_unreachable_budgets_are_refused_with_the_reachable_one() -> None:
    with pytest.raises(ConfigError, match=r"the smallest reachable one is 0\.0125$"):
        TABLE.check_budget(FIXED * 0.99)
    TABLE.check_budget(0.0125)
    odd = TABLE.replace(layers=(LayerCost("stem", 201, bits=8), *LAYERS[1:]))
    with pytest.raises(ConfigError, match="smallest reachable one is") as caught:
        odd.check_budget(0.01)
    odd.check_budget(float(str(caught.value).split()[-1]))


def test_a_budget_is_an_upper_bound_unless_it_is_to_be_spent() -> None:
    low = CostTable((0, 8), ("a", "b"), LAYERS, ((0, 0),))  # costs FIXED + 0.05 at most
    low.check_budget(1.0)
    low.check_budget(0.0694, spend=True)  # 0.9 of it is 0.06246
    for budget in (0.0695, 0.4):
        with pytest.raises(ConfigError, match=r"cannot be spent .* at most 0\.0625.* leave --spend out"):
            low.check_budget(budget, spend=True)
