import torch
from torch import nn

from dfs_cli.nn.normalisation import NEUTRAL, FractionalBatchNorm2d, match_statistics, moments, norm_tensors
from dfs_cli.nn.precision import Precision


def test_normalisation_follows_the_bitwidth_and_full_precision_keeps_its_own() -> None:
    norm = nn.BatchNorm2d(3).eval()
    x = torch.randn(8, 3, 5, 5)
    norm.running_mean, norm.running_var = moments(x)
    precision = Precision((4, 8, 32))
    fractional = FractionalBatchNorm2d.adopt(norm, precision)
    torch.testing.assert_close(fractional(x), norm(x))
    quantized = 1.5 * x + 0.25
    match_statistics(fractional, 8, moments(x), quantized)
    with precision.at(8):
        torch.testing.assert_close(fractional(quantized), norm(x), rtol=1e-4, atol=1e-4)
    with precision.at(4):
        torch.testing.assert_close(fractional(x), norm(x))
    torch.testing.assert_close(fractional.bit_mean[1], 1.5 * x.mean((0, 2, 3)) + 0.25)


def test_moments_are_those_of_torch() -> None:
    x = torch.randn(8, 3, 5, 5)
    mean, variance = moments(x)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(variance, x.var((0, 2, 3), correction=0))


def test_as_affine_is_what_batch_norm_does() -> None:
    norm = nn.BatchNorm2d(4).eval()
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2.0)
    x = torch.randn(2, 4, 3, 3)
    gain, shift = norm_tensors(norm, 32).as_affine(norm.eps)
    by_hand = gain.reshape(1, -1, 1, 1) * x.double() + shift.reshape(1, -1, 1, 1)
    torch.testing.assert_close(by_hand.float(), norm(x), rtol=1e-5, atol=1e-5)


def test_folding_statistics_changes_rounding_alone() -> None:
    norm = FractionalBatchNorm2d.adopt(nn.BatchNorm2d(6).eval(), Precision((2, 8)))
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2.0)
    x = torch.randn(2, 6, 4, 4)
    before = norm(x)
    norm.fold_statistics()
    torch.testing.assert_close(norm(x), before)
    assert all(bool((getattr(norm, name) == value).all()) for name, value in NEUTRAL.items())
    assert set(norm.state_dict()) - set(NEUTRAL) == {"bit_weight", "bit_bias"}
