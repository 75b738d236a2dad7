import pytest
import timm
import torch
from common import tiny_resnet
from torch import nn
from torch.distributions import Normal, kl_divergence

from dfs_cli.errors import UnsupportedModelError
from dfs_cli.synthesis.moments import Moments, check_remembers, divergence, mean_and_variance


def test_divergence_is_that_of_normal_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, expected_mean = torch.randn(2, 6, generator=generator)
    variance, expected_variance = torch.rand(2, 6, generator=generator) + 0.1
    expected = kl_divergence(Normal(mean, variance.sqrt()), Normal(expected_mean, expected_variance.sqrt())).mean()
    torch.testing.assert_close(divergence(mean, variance, expected_mean, expected_variance, eps=0.0), expected)


def test_divergence_does_not_depend_on_the_scale_of_a_channel() -> None:
    moments = torch.tensor([[0.3], [2.0], [-0.2], [1.5]])
    scaled = moments * torch.tensor([[100.0], [100.0**2], [100.0], [100.0**2]])
    first, second = (divergence(m[0], m[1], m[2], m[3], eps=0.0) for m in (moments, scaled))
    torch.testing.assert_close(first, second)


def test_what_was_seen_in_training_has_no_divergence() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=1.0), nn.ReLU(), nn.BatchNorm2d(4, momentum=1.0)
    )
    images = torch.randn(64, 3, 8, 8)
    model.train()(images)
    model.eval()
    with Moments(model) as moments:
        model(images)
        seen = moments.take().item()
        model(3 * images)
        other = moments.take().item()
    assert seen < 1e-5 and other > 0.5
    model(images)
    assert moments.take() == 0  # nothing is compared any more


@pytest.mark.parametrize("name", ["resnet50_gn", "resnetv2_50x1_bit"])
def test_networks_that_remember_nothing_are_refused(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UnsupportedModelError, match="--data"):
        check_remembers(model, blocks=16)


def test_statistics_are_those_of_every_batch_norm() -> None:
    model = tiny_resnet()
    layers = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    check_remembers(model, blocks=layers)
    with pytest.raises(UnsupportedModelError, match=f"{layers} for"):
        check_remembers(model, blocks=layers + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_mean_and_variance_and_their_gradients(dtype: torch.dtype, layout: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(4, 5, 6, 6, generator=generator) + 2).to(dtype).contiguous(memory_format=layout)
    x[:, 0] = 0  # a dead channel
    x.requires_grad_(True)
    weights = torch.randn(2, 5, generator=generator)
    found = mean_and_variance(x)
    (gradient,) = torch.autograd.grad((torch.stack(found) * weights).sum(), x)
    variance, mean = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
    (expected,) = torch.autograd.grad((torch.stack([mean, variance]) * weights).sum(), x)
    assert found[0].dtype == found[1].dtype == torch.float32
    torch.testing.assert_close(torch.stack(found), torch.stack([mean, variance]).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=2e-2, atol=1e-3 if dtype == torch.bfloat16 else 1e-6)
