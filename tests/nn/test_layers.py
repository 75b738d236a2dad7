import copy

import pytest
import torch
from torch import nn

from dfs_cli.nn.layers import FractionalConv2d
from dfs_cli.nn.linear import FractionalLinear
from dfs_cli.nn.precision import Precision


def make_conv(options: tuple[int, ...] = (4, 8, 32), bias: bool = False) -> FractionalConv2d:
    torch.manual_seed(0)
    layer = FractionalConv2d.from_module(nn.Conv2d(3, 6, 3, padding=1, bias=bias), Precision(options))
    layer.fit_weight_steps()
    layer.fit_input_steps(torch.rand(8, 3, 9, 9))
    return layer.eval()


def test_adopts_the_parameters_of_the_original() -> None:
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, dilation=1, groups=2, bias=True)
    layer = FractionalConv2d.from_module(conv, Precision((8, 32)))
    assert layer.weight is conv.weight and layer.bias is conv.bias
    x = torch.randn(2, 4, 9, 9)
    assert torch.equal(layer(x), conv(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_training_and_evaluation_compute_the_same(bits: int, bias: bool) -> None:
    layer = make_conv((bits,), bias)
    x = torch.rand(5, 3, 9, 9)
    torch.testing.assert_close(layer.train()(x), layer.eval()(x), rtol=1e-4, atol=1e-5)


def test_quantization_error_falls_with_bits() -> None:
    layer = make_conv()
    x = torch.rand(5, 3, 9, 9)
    full = layer(x)
    errors = []
    for bits in (4, 8):
        with layer.precision.at(bits):
            errors.append((layer(x) - full).abs().max().item())
    assert errors[0] > 4 * errors[1] > 0
    assert torch.equal(layer(x), full), "the bitwidth must not outlive its context"


def test_a_precision_says_what_may_be_set_and_is_restored_after_an_error() -> None:
    precision = Precision((4, 8, 32))
    assert (precision.bits, precision.quantized, precision.may_be_full) == (32, (4, 8), True)
    with pytest.raises(RuntimeError), precision.at(4):
        assert precision.bits == 4
        raise RuntimeError
    assert precision.bits == 32
    narrow = Precision((4, 8))
    assert (narrow.bits, narrow.quantized, narrow.may_be_full) == (8, (4, 8), False)


def test_input_is_signed_where_the_data_is() -> None:
    layer = make_conv()
    assert not layer.is_signed()
    layer.fit_input_steps(torch.randn(8, 3, 9, 9))
    assert layer.is_signed()
    x = torch.randn(2, 3, 9, 9).clamp(-2, 2)
    full = layer(x)
    with layer.precision.at(8):
        assert (layer(x) - full).abs().max().item() < 0.05 * full.abs().max().item()


def test_quantized_weight_is_kept_until_the_weight_or_its_steps_change() -> None:
    layer = make_conv((4,))
    x = torch.rand(2, 3, 9, 9)
    before = layer(x)
    assert layer.quantized_weight(4) is layer.quantized_weight(4)
    with torch.no_grad():
        layer.weight.mul_(-1)
    torch.testing.assert_close(layer(x), -before)
    with torch.no_grad():
        layer.log_weight_steps.add_(0.3)
    assert not torch.allclose(layer(x), -before)


def test_a_copy_keeps_a_quantized_weight_of_its_own() -> None:
    layer = make_conv((4,))
    x = torch.rand(1, 3, 9, 9)
    before = layer(x)
    twin = copy.deepcopy(layer)
    assert twin.quantized_weight(4).codes.data_ptr() != layer.quantized_weight(4).codes.data_ptr()
    with torch.no_grad():
        twin.weight.zero_()
    assert not twin(x).any() and torch.equal(layer(x), before)


def test_lone_image_gets_the_bits_of_the_batch() -> None:
    layer = make_conv()
    x = torch.rand(7, 3, 9, 9)
    for bits in (32, 8, 4):
        with layer.precision.at(bits):
            batch = layer(x)
            assert all(torch.equal(layer(x[i : i + 1])[0], batch[i]) for i in range(7))


def test_linear_by_hand() -> None:
    linear = nn.Linear(2, 1)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, -0.5]]))
        linear.bias.fill_(0.25)
    layer = FractionalLinear.from_module(linear, Precision((8,))).eval()
    with torch.no_grad():
        layer.log_weight_steps.fill_(float(torch.tensor(0.5).log()))
        layer.log_input_steps.fill_(float(torch.tensor(0.1).log()))
    # Input codes 3 and 7 (0.3, 0.74 -> 0.7), weight codes 2 and -1.
    assert layer(torch.tensor([[0.3, 0.74]])).item() == pytest.approx((3 * 2 - 7) * 0.5 * 0.1 + 0.25, abs=1e-6)


def test_a_frozen_weight_is_its_codes_and_a_tuned_one_is_not() -> None:
    layer = make_conv((4, 8))
    assert layer.weight_codes() is None
    layer.set_weight_codes()
    codes = layer.weight_codes()
    assert codes is not None and torch.equal(codes, codes.round()) and int(codes.abs().max()) <= 127
    steps = layer.log_weight_steps[1].exp().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(layer.weight, codes * steps)
