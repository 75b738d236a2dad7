import pytest
import timm
import torch
from common import tiny_resnet
from torch import nn
from torch.distributions import Normal, kl_divergence

from dfs_cli.errors import UnsupportedModelError
from dfs_cli.synthesis.moments import Moments, divergence


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
    model(images)  # nothing is compared any more
    with pytest.raises(RuntimeError):
        moments.take()


@pytest.mark.parametrize("name", ["resnet50_gn", "resnetv2_50x1_bit"])
def test_networks_that_remember_nothing_are_refused(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UnsupportedModelError, match="--data"):
        Moments(model, blocks=16)


def test_statistics_are_those_of_every_batch_norm() -> None:
    model = tiny_resnet()
    layers = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    with Moments(model, blocks=layers):
        pass
    with pytest.raises(UnsupportedModelError, match=f"{layers} for"):
        Moments(model, blocks=layers + 1)
