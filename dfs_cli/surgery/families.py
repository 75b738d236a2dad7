"""Adapters to timm: a small one per model class and per block class.

timm's forward passes are used as they are. An adapter only says which convolutions of a block are its residual branch,
which are its shortcut, and what the block returns when its residual branch is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from timm.models.res2net import Bottle2neck
from timm.models.resnest import ResNestBottleneck
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.resnetv2 import PreActBasic, PreActBottleneck, ResNetV2
from timm.models.sknet import SelectiveKernelBasic, SelectiveKernelBottleneck
from torch import Tensor, nn

from dfs_cli.nn.network import Layout


@dataclass(frozen=True)
class BlockFamily:
    """How to treat one class of residual block.

    Args:
        block: the class. Its ``conv1.in_channels`` is the width of its input.
        branch: modules inside it whose convolutions follow the block's bitwidth.
        skip: ``skip(block, x)`` is the block's output with its residual branch zeroed.
        shortcut: the module whose convolutions always run, at the bitwidth of the fixed layers.
        apart: modules whose normalisation keeps the original's statistics: those before the first convolution, and attention,
            which stays in floating point.
        norms: a list of normalisations, and the list of convolutions whose outputs they normalise, one each. Others follow the
            convolution before them.

    Convolutions elsewhere in the block (attention) always run in floating point.
    """

    block: type[nn.Module]
    branch: tuple[str, ...]
    skip: Callable[[nn.Module, Tensor], Tensor]
    shortcut: str = "downsample"
    apart: tuple[str, ...] = ()
    norms: tuple[str, str] | None = None


def _skip_after_activation(last_activation: str) -> Callable[[nn.Module, Tensor], Tensor]:
    """The ``skip`` of blocks that add first and activate last."""

    def skip(block: nn.Module, x: Tensor) -> Tensor:
        activation: nn.Module = getattr(block, last_activation)
        downsample: nn.Module | None = getattr(block, "downsample")  # noqa: B009
        if downsample is not None:
            return cast(Tensor, activation(downsample(x)))
        # The input comes from such an activation; applying ReLU to it again changes nothing.
        return x if isinstance(activation, nn.ReLU) else cast(Tensor, activation(x.clone()))

    return skip


def _skip_before_activation(block: nn.Module, x: Tensor) -> Tensor:
    """The ``skip`` of blocks that normalise and activate first; there is no last activation."""
    downsample: nn.Module | None = getattr(block, "downsample")  # noqa: B009
    return x if downsample is None else cast(Tensor, downsample(block.get_submodule("norm1")(x)))


class ResNetLayout:
    """``timm.models.resnet.ResNet``: a convolutional stem, stages of blocks, pooling and classifier."""

    def stem(self, model: nn.Module, images: Tensor) -> Tensor:
        x = images
        for name in ("conv1", "bn1", "act1", "maxpool"):
            x = model.get_submodule(name)(x)
        return x

    def head(self, model: nn.Module, features: Tensor) -> Tensor:
        return cast(ResNet, model).forward_head(features)


class ResNetV2Layout:
    """``timm.models.resnetv2.ResNetV2``: stem, stages of blocks, a last normalisation, pooling and classifier."""

    def stem(self, model: nn.Module, images: Tensor) -> Tensor:
        return cast(Tensor, cast(ResNetV2, model).stem(images))

    def head(self, model: nn.Module, features: Tensor) -> Tensor:
        return cast(ResNetV2, model).forward_head(cast(ResNetV2, model).norm(features))


LAYOUTS: dict[type[nn.Module], Layout] = {ResNet: ResNetLayout(), ResNetV2: ResNetV2Layout()}

FAMILIES = {
    family.block: family
    for family in (
        BlockFamily(BasicBlock, ("conv1", "conv2"), _skip_after_activation("act2")),
        BlockFamily(Bottleneck, ("conv1", "conv2", "conv3"), _skip_after_activation("act3")),
        BlockFamily(Bottle2neck, ("conv1", "convs", "conv3"), _skip_after_activation("relu"), norms=("bns", "convs")),
        # conv2 is split attention: its `conv` is the branch, its `fc1` and `fc2` are attention.
        BlockFamily(
            ResNestBottleneck, ("conv1", "conv2.conv", "conv3"), _skip_after_activation("act3"), apart=("conv2.bn1",)
        ),
        # One of the convolutions is a selective kernel: its paths are the branch, the rest of it is attention.
        BlockFamily(
            SelectiveKernelBasic, ("conv1.paths", "conv2.conv"), _skip_after_activation("act"), apart=("conv1.attn",)
        ),
        BlockFamily(
            SelectiveKernelBottleneck,
            ("conv1.conv", "conv2.paths", "conv3.conv"),
            _skip_after_activation("act"),
            apart=("conv2.attn",),
        ),
        BlockFamily(PreActBasic, ("conv1", "conv2"), _skip_before_activation, apart=("norm1",)),
        BlockFamily(PreActBottleneck, ("conv1", "conv2", "conv3"), _skip_before_activation, apart=("norm1",)),
    )
}


def family_names() -> str:
    """The supported block classes, for messages."""
    return ", ".join(block.__name__ for block in FAMILIES)
