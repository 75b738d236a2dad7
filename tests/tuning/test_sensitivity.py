from collections.abc import Callable

import pytest
import torch
from common import SIZE, everywhere, make_dynamic, preactivated_resnet, tiny_resnet
from torch import nn

from dfs_cli.config import DynamicConfig
from dfs_cli.control.base import Need
from dfs_cli.cost.decisions import Decisions
from dfs_cli.nn.layers import FractionalLayer
from dfs_cli.surgery.plan import plan_costs, plan_surgery
from dfs_cli.tuning.sensitivity import divergence, layer_at, measure, measure_blocks, measure_layers

CONFIG = DynamicConfig(bits=(0, 4, 8, 32), gate="rnn")


def kl(expected: torch.Tensor, found: torch.Tensor) -> float:
    p = expected.log_softmax(1)
    return float((p.exp() * (p - found.log_softmax(1))).sum(1).mean())


def test_harm_of_blocks_by_hand() -> None:
    model = tiny_resnet()
    network, table = make_dynamic(model, CONFIG), plan_costs(model, CONFIG, SIZE)
    x = torch.randn(16, *SIZE)
    harm = measure_blocks(network, table, x)
    options = torch.full((16, 5), 3)
    with torch.no_grad():
        expected = network.run(x, Decisions.of_pass(options)).logits
        options[:, 2] = 1
        found = network.run(x, Decisions.of_pass(options)).logits
    assert harm.shape == (5, 4)
    assert harm[2, 1].item() == pytest.approx(kl(expected, found), rel=1e-3)
    assert (harm[:, 3] == 0).all() and (harm[:, 0] > harm[:, 2]).all()


@pytest.mark.parametrize("create", [tiny_resnet, preactivated_resnet])
def test_harm_of_layers_by_hand(create: Callable[[], nn.Module]) -> None:
    model = create()
    plan, table = plan_surgery(model), plan_costs(model, CONFIG, SIZE)
    network = make_dynamic(model, CONFIG)
    x = torch.randn(16, *SIZE)
    names = [layer.name for layer in table.layers if layer.block is not None]
    harm = measure_layers(network, plan, table, x)
    assert harm.shape == (len(names), 4)
    assert (harm[:, 0] == torch.inf).all() and (harm[:, -1] == 0).all()
    assert harm[:, 1].mean() > harm[:, 2].mean() > 0
    with torch.no_grad():
        expected = network.run(x, everywhere(network, 32, 16)).logits
        with layer_at(network, plan, names[3], 4):
            found = network.run(x, everywhere(network, 32, 16)).logits
        after = network.run(x, everywhere(network, 32, 16)).logits
    assert harm[3, 1].item() == pytest.approx(kl(expected, found), rel=1e-3)
    assert torch.equal(after, expected), "the layer is left as it was"


def test_one_layer_alone_runs_at_other_bits_with_its_norm() -> None:
    model = tiny_resnet()
    plan, network = plan_surgery(model), make_dynamic(model, CONFIG)
    ran: dict[str, int] = {}
    for name, module in network.backbone.named_modules():
        if isinstance(module, FractionalLayer) or name in plan.norms:
            module.register_forward_pre_hook(lambda m, _, name=name: ran.update({name: m.precision.bits}))
    with torch.no_grad(), layer_at(network, plan, "layer2.0.conv2", 4):
        network.run(torch.randn(2, *SIZE), everywhere(network, 32, 2))
    assert {name for name, bits in ran.items() if bits == 4} == {"layer2.0.conv2", "layer2.0.bn2"}


def test_only_what_is_needed_is_measured() -> None:
    model = tiny_resnet()
    plan, table, network = plan_surgery(model), plan_costs(model, CONFIG, SIZE), make_dynamic(model, CONFIG)
    x = torch.randn(16, *SIZE)
    blocks = measure(Need.BLOCKS, network, plan, table, x)
    both = measure(Need.BLOCKS_AND_LAYERS, network, plan, table, x)
    assert blocks is not None and blocks.layers is None
    assert both is not None and both.layers is not None and torch.equal(both.blocks, blocks.blocks)
    one = DynamicConfig(bits=(8,), gate="static")
    alone = plan_costs(model, one, SIZE)
    assert measure(Need.BLOCKS_AND_LAYERS, make_dynamic(model, one), plan, alone, x) is None


def test_divergence_from_the_original_by_hand() -> None:
    model = tiny_resnet()
    network = make_dynamic(model, DynamicConfig(bits=(0, 4), gate="rnn"))
    x = torch.randn(8, *SIZE)
    with torch.no_grad():
        assert divergence(network, model, x) == pytest.approx(kl(model(x), network(x)), rel=1e-3)
