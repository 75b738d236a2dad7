import pytest
import torch

from dfs_cli.nn.integers import fold, requantize
from dfs_cli.nn.quantization import code_range, nearest_integer_bias


def test_the_nearest_fraction_by_hand() -> None:
    bias = torch.tensor([2.5, -0.33, 7.0, 3.14, 0.0], dtype=torch.float64)
    numerator, multiple = nearest_integer_bias(bias, 7)
    assert numerator.tolist() == [5, -1, 7, 22, 0] and multiple.tolist() == [2, 3, 1, 7, 1]
    assert nearest_integer_bias(bias, 1)[0].tolist() == [2, 0, 7, 3, 0]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_folded_convolution_is_the_convolution_and_its_batchnorm(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    limits = code_range(bits, signed=True)
    codes = torch.randint(limits[0], limits[1] + 1, (6, 4, 3, 3), generator=generator).float()
    x = torch.randint(0, 2**bits, (2, 4, 5, 5), generator=generator).float()
    step, target = torch.tensor(0.03), torch.tensor(0.05)
    scale = torch.rand(6, generator=generator) + 0.5
    gain, shift = (torch.randn(6, generator=generator).double() for _ in range(2))
    shift[0], gain[1] = 1e6, -gain[1].abs()  # a bias that outweighs its weight, and a negative gain
    folded = fold(codes, scale, float(step), bits, gain, shift)
    assert float(folded.weight.abs().max()) <= 127 and torch.equal(folded.bias, folded.bias.round())
    sums = torch.nn.functional.conv2d(x, codes).double()
    expected = sums * (scale * step * gain).reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)
    sums = torch.nn.functional.conv2d(x.double(), folded.weight.double(), folded.bias.double()).float()
    found = requantize(sums, folded, step, target).double() * target
    # Half of a code, and half of the bias's unit.
    tolerance = float(target) / 2 + float(step) * folded.scale.double() / 2
    error = (found - expected).abs().amax(dim=(0, 2, 3))
    assert bool((error[1:] <= tolerance[1:] + 1e-4).all()) and float(error[0]) < 1e-3 * 1e6
