"""Steps in proportion to what they change."""

import copy

import torch
from common import SIZE, make_dynamic, tiny_resnet
from hostile import hostile, spare
from torch import nn

from dfs_cli.config import DynamicConfig, TuningConfig
from dfs_cli.nn.layers import FractionalLayer
from dfs_cli.surgery.equalise import equalise, input_gains
from dfs_cli.surgery.initialise import fit_steps
from dfs_cli.tuning.scales import ParameterSizes, sizes_of
from dfs_cli.tuning.state import start_state

CONFIG = DynamicConfig(bits=(8,), gate="static")


def test_a_step_is_as_large_as_the_channel_it_changes() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(2, 3)
    norms = torch.tensor([1e-6, 1.0, 50.0])
    with torch.no_grad():
        layer.weight.copy_(norms[:, None] * torch.tensor([0.6, 0.8]))
    sizes, before = ParameterSizes(layer), copy.deepcopy(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer.weight.grad, layer.bias.grad = torch.ones(3, 2), torch.ones(3)
    sizes.scale_gradients()
    torch.testing.assert_close(layer.weight.grad, norms[:, None].expand(3, 2))
    with sizes.proportional():
        optimizer.step()
    # Once for the gradient, once for the step.
    torch.testing.assert_close(before.bias - layer.bias, 0.1 * norms**2, rtol=1e-3, atol=1e-6)
    moved = before.weight - layer.weight
    torch.testing.assert_close(moved, (0.1 * norms**2)[:, None].expand(3, 2), rtol=1e-3, atol=1e-6)


def test_tuning_goes_the_same_way_however_channels_are_scaled() -> None:
    """A hundred steps of Adam on a batch-norm, and on one of the same function with a variance of nearly nothing."""
    torch.manual_seed(0)
    x, results = torch.randn(64, 4, 1, 1), []
    for scale in (1.0, 1e-6):
        norm = nn.BatchNorm2d(4, eps=1e-5).eval()
        assert norm.running_var is not None
        norm.running_var.fill_(scale**2)
        with torch.no_grad():
            norm.weight.copy_(torch.full((4,), ((scale**2 + 1e-5) ** 0.5) / scale))
        sizes, optimizer = ParameterSizes(norm), torch.optim.Adam(norm.parameters(), lr=1e-3)
        for _ in range(100):
            loss = (norm(scale * x) - 2 * x - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            sizes.scale_gradients()
            with sizes.proportional():
                optimizer.step()
        results.append(norm(scale * x).detach())
    assert (results[0] - x).abs().max() > 0.1
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


def test_ordinary_networks_are_tuned_as_ever() -> None:
    state = start_state(make_dynamic(spare(tiny_resnet()), CONFIG), TuningConfig(steps=1), 1)
    assert state.sizes is None


def test_networks_with_gains_and_those_that_divide_by_nothing_are_tuned_in_proportion() -> None:
    assert sizes_of(hostile(tiny_resnet(), "tiny variances"))
    assert sizes_of(hostile(tiny_resnet(), "scaled branches")) is None
    network, images = make_dynamic(hostile(tiny_resnet(), "scaled branches"), CONFIG), torch.randn(16, *SIZE)
    assert start_state(network, TuningConfig(steps=1), 1).sizes is None
    names = [name for name, module in network.backbone.named_modules() if isinstance(module, FractionalLayer)]
    equalise(network, input_gains(network, names, images))
    fit_steps(network, images)
    assert start_state(network, TuningConfig(steps=1), 1).sizes


def test_a_dead_channel_of_almost_no_variance_is_not_uneven() -> None:
    """Trained networks have such channels: all that they put out is their bias."""
    model = spare(tiny_resnet())
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None:
            norm.running_var[0] = 1e-14
    assert sizes_of(model) is None and sizes_of(hostile(model, "tiny variances"))
