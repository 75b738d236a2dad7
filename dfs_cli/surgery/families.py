"""What the surgery knows about timm: one small adapter per model class and per block class.

timm's forward passes are used as they are. An adapter only says which convolutions of a block are its residual branch,
which are its shortcut, and what the block gives when its residual branch is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from dfs_cli.nn.network import Layout


@dataclass(frozen=True)
class BlockFamily:
    """How to treat one class of residual block.

    Args:
        block: the class.
        branch: child modules whose convolutions follow the block's bitwidth.
        shortcut: child modules whose convolutions always run.
        skip: ``skip(block, x)`` is the block's output with its residual branch zeroed.
    """

    block: type[nn.Module]
    branch: tuple[str, ...]
    shortcut: tuple[str, ...]
    skip: Callable[[nn.Module, Tensor], Tensor]


def _skip_after_activation(last_activation: str) -> Callable[[nn.Module, Tensor], Tensor]:
    """Skip of blocks that add first and activate last."""

    def skip(block: nn.Module, x: Tensor) -> Tensor:
        activation: nn.Module = getattr(block, last_activation)
        downsample: nn.Module | None = getattr(block, "downsample")  # noqa: B009
        if downsample is not None:
            return cast(Tensor, activation(downsample(x)))
        # The input comes from such an activation; applying ReLU to it again changes nothing.
        return x if isinstance(activation, nn.ReLU) else cast(Tensor, activation(x.clone()))

    return skip


class ResNetLayout:
    """``timm.models.resnet.ResNet``: a convolutional stem, stages of blocks, pooling and classifier."""

    def stem(self, model: nn.Module, images: Tensor) -> Tensor:
        x = images
        for name in ("conv1", "bn1", "act1", "maxpool"):
            x = model.get_submodule(name)(x)
        return x

    def head(self, model: nn.Module, features: Tensor) -> Tensor:
        return cast(ResNet, model).forward_head(features)


LAYOUTS: dict[type[nn.Module], Layout] = {ResNet: ResNetLayout()}

FAMILIES = {
    family.block: family
    for family in (
        BlockFamily(BasicBlock, ("conv1", "conv2"), ("downsample",), _skip_after_activation("act2")),
        BlockFamily(Bottleneck, ("conv1", "conv2", "conv3"), ("downsample",), _skip_after_activation("act3")),
    )
}


def family_names() -> str:
    """The supported block classes, for messages."""
    return ", ".join(block.__name__ for block in FAMILIES)
