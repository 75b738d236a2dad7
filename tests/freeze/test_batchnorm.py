import copy

import pytest
import torch
from common import SIZE, Block, make_dynamic, mixed_decisions, randomise, tiny_resnet
from timm.layers import BatchNormAct2d, StdConv2d, create_conv2d
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.resnetv2 import ResNetV2
from torch import nn

from dfs_cli.config import DynamicConfig
from dfs_cli.freeze.batchnorm import fold_norms
from dfs_cli.presets import FULL_BITS

FLOATS = DynamicConfig(bits=(0, FULL_BITS), fixed_bits=FULL_BITS, gate="rnn")


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_every_norm_behind_a_convolution_is_folded(block: Block) -> None:
    network = make_dynamic(tiny_resnet(block), FLOATS)
    before = copy.deepcopy(network.state_dict())
    images = torch.randn(6, *SIZE)
    choice = mixed_decisions(network, 6)
    folded = fold_norms(network)
    with torch.no_grad():
        torch.testing.assert_close(
            folded.run(images, choice).logits, network.run(images, choice).logits, rtol=1e-4, atol=1e-5
        )
    assert norms(network.backbone) > 0 and norms(folded.backbone) == 0
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_convolutions_with_other_bitwidths_keep_their_norms() -> None:
    config = DynamicConfig(bits=(0, 4, FULL_BITS), fixed_bits=FULL_BITS, gate="rnn")
    network = make_dynamic(tiny_resnet(Bottleneck), config)
    images = torch.randn(6, *SIZE)
    choice = mixed_decisions(network, 6)
    folded = fold_norms(network)
    fixed = 3 + sum(block.module.downsample is not None for block in network.blocks)
    assert norms(folded.backbone) == norms(network.backbone) - fixed
    with torch.no_grad():
        found, expected = folded.run(images, choice).logits, network.run(images, choice).logits
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()  # codes at a tie may differ


def test_where_nothing_always_runs_in_floating_point_nothing_is_copied() -> None:
    network = make_dynamic(tiny_resnet(), DynamicConfig(bits=(0, 4, 8), gate="rnn"))
    assert fold_norms(network) is network


def test_activations_and_standardised_weights_survive() -> None:
    torch.manual_seed(0)
    for layer in (create_conv2d, StdConv2d):
        model = ResNetV2(
            [1, 1],
            channels=(32, 64),
            num_classes=5,
            stem_chs=16,
            preact=True,
            conv_layer=layer,
            norm_layer=BatchNormAct2d,
        )
        network = make_dynamic(randomise(model), FLOATS)
        images = torch.randn(3, *SIZE)
        folded = fold_norms(network)
        assert norms(folded.backbone) < norms(network.backbone)
        with torch.no_grad():
            expected = network.run_in_full(images)
            torch.testing.assert_close(folded.run_in_full(images), expected, rtol=1e-4, atol=1e-4)


def test_what_else_reads_a_convolution_keeps_it_as_it_is() -> None:
    network = make_dynamic(tiny_resnet(BasicBlock), FLOATS)

    class Peeks(BasicBlock):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv1(x)
            y = self.conv2(self.act1(self.bn1(y)) + y)
            result: torch.Tensor = self.act2(self.bn2(y) + x)
            return result

    block = network.blocks[1].module
    block.__class__ = Peeks
    images = torch.randn(3, *SIZE)
    folded = fold_norms(network)
    peeking = folded.blocks[1].module
    assert isinstance(peeking.bn1, nn.BatchNorm2d) and isinstance(peeking.bn2, nn.Identity)
    with torch.no_grad():
        expected = network.run_in_full(images)
        torch.testing.assert_close(folded.run_in_full(images), expected, rtol=1e-4, atol=1e-4)
