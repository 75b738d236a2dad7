import pytest
import torch
from common import RNN, timm_model
from torch import nn

from dfs_cli.freeze.batchnorm import fold_norms
from dfs_cli.nn.pooling import MaxPool2d
from dfs_cli.surgery import swap
from dfs_cli.surgery.plan import plan_costs


@pytest.mark.parametrize("size", [7, 8, 31])
def test_max_pooling_is_that_of_torch(size: int) -> None:
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    x = torch.randn(3, 5, size, size + 1)
    with torch.no_grad():
        found = MaxPool2d.adopt(pool)(x)
    assert torch.equal(found, pool(x)) and found.stride() == pool(x).stride()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", True),
        ("resnetv2_50", False),
        pytest.param("resnet50", True, marks=pytest.mark.slow),
        pytest.param("resnet50_gn", False, marks=pytest.mark.slow),
        pytest.param("resnet10t", False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.medium
def test_only_stems_of_one_convolution_choose_their_layout(name: str, expected: bool) -> None:
    model = timm_model(name)
    config = RNN.replace(fixed_bits=32)
    network = swap.make_dynamic(model, config, plan_costs(model, config, (3, 64, 64))).network
    assert network.pools_first == expected
    assert fold_norms(network).pools_first == expected
    images = torch.randn(3, 3, 64, 64)
    seen: list[torch.Tensor] = []

    def first_input(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0])

    network.blocks[0].module.register_forward_pre_hook(first_input)
    with torch.no_grad():
        wanted = network.layout.stem(network.backbone, images)
        full = torch.full((1, len(network.blocks)), len(network.bits) - 1)
        for batch in (images, *images.split(1), images.to(memory_format=torch.channels_last)):
            network.follow(batch, full.expand(len(batch), -1))
    found, *alone, last = seen
    assert torch.equal(found, torch.cat(alone)) and found.stride() == wanted.stride()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, wanted, rtol=1e-5, atol=1e-5)
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_networks_that_do_not_pool_keep_their_layout() -> None:
    model = timm_model("resnet20_cifar")
    assert not swap.make_dynamic(model, RNN, plan_costs(model, RNN, (3, 32, 32))).network.pools_first
