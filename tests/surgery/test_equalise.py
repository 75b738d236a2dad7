"""Hostile copies of networks, and the gains that undo what makes them hostile."""

import copy

import pytest
import torch
from common import SIZE, make_dynamic, tiny_resnet
from hostile import KINDS, hostile, spare
from timm.layers import StdConv2d
from timm.models.resnet import Bottleneck
from torch import nn

from dfs_cli.config import DynamicConfig
from dfs_cli.data.digits import Digits
from dfs_cli.nn.layers import FractionalConv2d, FractionalLayer
from dfs_cli.nn.precision import Precision
from dfs_cli.surgery.equalise import balance, equalise, input_gains, reserve_gains

CONFIG = DynamicConfig(bits=(0, 4, 8, 32), gate="rnn")


@pytest.mark.parametrize("kind", [*KINDS, None], ids=lambda kind: kind or "all")
def test_a_hostile_copy_computes_what_the_original_does(kind: str | None, digits_model: nn.Module) -> None:
    digits = torch.from_numpy(Digits("calibration").pixels[:60, None]).double() / 64 - 2
    model = copy.deepcopy(digits_model).double()
    expected, made = spare(model)(digits), hostile(model, *([kind] if kind else []))
    difference = (made(digits) - expected).abs().max() / expected.abs().max()
    # Single peaks do add a little.
    assert difference < (1e-4 if kind in ("peaks", None) else 1e-9)


def test_gains_make_the_ranges_of_values_and_weights_equal() -> None:
    values = torch.tensor([4.0, 1.0, 0.0, 4.0, 0.0])
    weights = torch.tensor([1.0, 4.0, 8.0, 0.0, 0.0])
    # 4 * 1/2 = 1 / (1/2) = 2, and 1 * 2 = 4 / 2 = 2. What never fires or is never read is brought to 2 as well.
    assert balance(values, weights).tolist() == [0.5, 2.0, 4.0, 0.5, 1.0]
    assert balance(torch.zeros(2), torch.ones(2)).tolist() == [1.0, 1.0]
    # Powers of two: the square root of 3 becomes 2.
    assert balance(torch.ones(1), torch.tensor([3.0])).tolist() == [2.0]


def test_gains_change_no_bit_in_floating_point() -> None:
    network = make_dynamic(hostile(tiny_resnet(Bottleneck)), CONFIG)
    images = torch.randn(8, *SIZE)
    full = network.run_in_full(images)
    names = [name for name, module in network.backbone.named_modules() if isinstance(module, FractionalLayer)]
    gains = input_gains(network, names, images)
    assert len({float(g) for gain in gains.values() for g in gain}) > 10
    equalise(network, gains)
    assert torch.equal(network.run_in_full(images), full)
    again = input_gains(network, names, images)
    assert all(torch.equal(again[name], gain) for name, gain in gains.items())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_gain_undoes_the_scales_of_channels_exactly(bits: int, groups: int, training: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=groups, bias=False)
    scales = torch.tensor([0.25, 64.0, 1.0, 2.0**-9])
    scaled, x = copy.deepcopy(conv), torch.rand(3, 4, 9, 9)
    with torch.no_grad():
        per_group = scales.reshape(groups, 1, -1, 1, 1)
        scaled.weight.copy_((conv.weight.reshape(groups, -1, 4 // groups, 3, 3) / per_group).reshape_as(conv.weight))
    layers = [FractionalConv2d.from_module(c, Precision((bits, 32))) for c in (conv, scaled)]
    layers[1].set_input_gain(1 / scales)
    results = []
    for layer, given in zip(layers, (x, x * scales.reshape(1, -1, 1, 1)), strict=True):
        layer.fit_weight_steps()
        layer.fit_input_steps(given)
        with layer.precision.at(bits):
            results.append(layer.train(training)(given).detach())
    assert torch.equal(*results)
    ranges = [layer.weight_range() for layer in layers]
    assert torch.equal(ranges[0], ranges[1] * scales)


def test_a_standardised_weight_is_divided_after_it_is_standardised() -> None:
    torch.manual_seed(0)
    conv = StdConv2d(4, 6, 3)
    layer = FractionalConv2d.from_module(conv, Precision((8, 32))).eval()
    x, expected = torch.rand(3, 4, 9, 9), conv.get_parameter("weight").clone()
    full = layer(x)
    layer.set_input_gain(torch.tensor([0.5, 4.0, 1.0, 8.0]))
    assert torch.equal(layer(x), full) and torch.equal(layer.weight, expected)
    layer.fit_weight_steps()
    layer.fit_input_steps(x)
    with layer.precision.at(8):
        assert (layer(x) - full).abs().max() < 0.1 * full.abs().max()
        rounded = layer(x)
        layer.set_weight_codes()
        assert torch.equal(layer(x), rounded)


@pytest.mark.parametrize("names", [["layer9"], ["layer1.0.bn1"], [""], ["fc", "fc"]])
def test_only_layers_that_can_have_a_gain_get_room_for_one(names: list[str]) -> None:
    network = make_dynamic(tiny_resnet(), CONFIG)
    with pytest.raises(ValueError, match="is no layer whose input could have a gain"):
        reserve_gains(network, names)
