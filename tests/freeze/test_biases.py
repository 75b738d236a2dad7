import pytest
import torch
from common import SIZE, make_dynamic, tiny_resnet
from timm.models.resnet import Bottleneck

from dfs_cli.config import DynamicConfig
from dfs_cli.freeze.biases import round_biases
from dfs_cli.nn.layers import FractionalConv2d
from dfs_cli.nn.normalisation import FractionalBatchNorm
from dfs_cli.nn.quantization import nearest_integer_bias


def test_the_nearest_fraction_by_hand() -> None:
    bias = torch.tensor([2.5, -0.33, 7.0, 3.14, 0.0], dtype=torch.float64)
    numerator, multiple = nearest_integer_bias(bias, 7)
    assert numerator.tolist() == [5, -1, 7, 22, 0] and multiple.tolist() == [2, 3, 1, 7, 1]
    assert nearest_integer_bias(bias, 1)[0].tolist() == [2, 0, 7, 3, 0]


@pytest.mark.parametrize("bits", [4, 8])
def test_biases_are_integers_in_their_units(bits: int) -> None:
    network = make_dynamic(tiny_resnet(Bottleneck), DynamicConfig(bits=(0, 4, 8), gate="rnn"))
    image = torch.randn(1, *SIZE, generator=torch.Generator().manual_seed(2))
    before, _ = network.follow(image, torch.full((1, 5), 2))
    round_biases(network, SIZE)
    block = network.blocks[1].module
    conv, norm = block.get_submodule("conv2"), block.get_submodule("bn2")
    assert isinstance(conv, FractionalConv2d) and isinstance(norm, FractionalBatchNorm)
    row = norm.bitwidths.index(bits)
    gain = norm.bit_weight[row] / (norm.bit_var[row] + norm.eps).sqrt()
    unit = conv.log_weight_steps[row].exp() * conv.log_input_steps[row].exp() * gain.abs()
    shift = ((norm.bit_bias[row] - norm.bit_mean[row] * gain) / unit).double()
    room = {4: 18, 8: 1}[bits]
    numerator, multiple = nearest_integer_bias(shift, room)
    torch.testing.assert_close(numerator / multiple, shift, atol=1e-2 / room**2, rtol=1e-5)
    after, _ = network.follow(image, torch.full((1, 5), 2))
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, before, atol=0.05 * float(before.detach().abs().max()), rtol=0)
