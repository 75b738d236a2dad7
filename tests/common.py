"""Small networks and small helpers that tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import timm
import torch
from PIL import Image
from timm.layers import BatchNormAct2d, create_conv2d
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn

import dfs_cli.models  # noqa: F401  # registers the CIFAR and digits ResNets
from dfs_cli.config import DynamicConfig
from dfs_cli.control.base import Request, Sensitivity, controller_of
from dfs_cli.cost.decisions import Decisions
from dfs_cli.cost.table import CostTable
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.surgery import swap
from dfs_cli.surgery.initialise import fit_steps
from dfs_cli.surgery.plan import plan_costs

Block = type[BasicBlock] | type[Bottleneck]

MakeFolder = Callable[..., Path]
"""The type of the fixture ``make_folder``."""

RNN = DynamicConfig(bits=(0, 4, 8, 16, 32), gate="rnn")
"""The settings of :func:`make_dynamic` where none are given."""

SIZE = (3, 32, 32)
"""The (C, H, W) of images for the tiny networks."""


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a fresh model weights and statistics under which every block matters (timm zeroes each last scale)."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0, generator=generator)
            nn.init.normal_(module.bias, std=0.2, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(cast(Tensor, module.running_mean), std=0.1, generator=generator)
            nn.init.uniform_(cast(Tensor, module.running_var), 0.5, 1.5, generator=generator)
    return model.eval()


def name(model: nn.Module) -> None:
    """Give ``model`` what timm says about its own ones."""
    model.pretrained_cfg = {"architecture": "tiny", "input_size": SIZE}  # type: ignore[assignment]


def tiny_resnet(block: Block = BasicBlock, seed: int = 0) -> nn.Module:
    """A timm ResNet of five blocks for 32x32 images and five classes."""
    torch.manual_seed(seed)
    channels = (8, 16, 16, 24)
    # timm's annotation names instances; it means classes.
    model = ResNet(block, (2, 1, 1, 1), 5, channels=channels, stem_type="deep", stem_width=8)  # type: ignore[arg-type]
    name(model)
    return randomise(model, seed)


def se_resnet() -> nn.Module:
    """A timm ResNet of four blocks with squeeze-and-excitation."""
    torch.manual_seed(0)
    attention, channels = {"attn_layer": "se"}, (8, 16, 16, 24)
    model = ResNet(Bottleneck, (1, 1, 1, 1), 5, channels=channels, block_args=attention)  # type: ignore[arg-type]
    name(model)
    return randomise(model)


def preactivated_resnet() -> nn.Module:
    """A timm ResNetV2 of five blocks that normalise and activate first."""
    torch.manual_seed(0)
    model = ResNetV2(
        [1, 1, 2, 1], channels=(32, 32, 64, 64), num_classes=5, stem_chs=16, stem_type="", preact=True,
        conv_layer=create_conv2d, norm_layer=BatchNormAct2d,
    )  # fmt: skip
    return randomise(model)


def timm_model(name: str) -> nn.Module:
    """A timm model with random weights under which every block matters."""
    torch.manual_seed(0)
    return randomise(timm.create_model(name, pretrained=False))


def shallow_model(name: str, **kwargs: Any) -> nn.Module:
    """A timm architecture with one block of each structure; pruned ones, whose widths belong to their depth, stay whole."""
    depths = (2, 1, 1, 1)
    if "pruned" in name:
        return timm.create_model(name, **kwargs)
    try:
        return timm.create_model(name, layers=depths, **kwargs)
    except TypeError:  # BiT entrypoints fix their depth
        model = timm.create_model(name, **kwargs)
        for stage, depth in zip(model.get_submodule("stages").children(), depths, strict=True):
            stage.blocks = cast(nn.Sequential, stage.blocks)[:depth]
        return model


def make_dynamic(
    model: nn.Module,
    config: DynamicConfig = RNN,
    size: tuple[int, int, int] = SIZE,
    seed: int = 0,
    table: CostTable | None = None,
) -> DynamicResNet:
    """A dynamic network whose step sizes are set and whose gate's inputs are normalised; it takes its widest options.

    Args:
        size: (C, H, W) of the images.
        table: its costs; None: those of ``model``.
    """
    torch.manual_seed(seed)
    table = table or plan_costs(model, config, size)
    network = swap.make_dynamic(model, config, table).network
    sample = torch.randn(16, *size)
    fit_steps(network, sample)
    start_controller(network, table, sample)
    return network


def start_controller(network: DynamicResNet, table: CostTable, sample: Tensor) -> None:
    """Normalise what the controller sees, (N, C, H, W), and leave it at its widest options."""
    controller = controller_of(network)
    harmless = Sensitivity(torch.zeros(len(table.blocks), len(table.options)))
    policy = getattr(controller, "policy", None)
    before = None if policy is None else policy.clone()
    point = controller.operating_point
    controller.start(network, table, harmless, Request(table.dearest, True, len(sample), len(sample)), sample)
    if policy is not None:
        policy.copy_(before)
    controller.cost_multiplier = 0.0
    controller.operating_point = point


def spread_gate(network: DynamicResNet, scale: float = 4.0, seed: int = 0) -> None:
    """Make the gate's answer depend strongly on the image."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in controller_of(network).named_parameters():
        if name.startswith("gate.head") and name.endswith("weight"):
            nn.init.normal_(parameter, std=scale, generator=generator)
        elif name == "gate.preference":
            nn.init.zeros_(parameter)


def mixed_decisions(network: DynamicResNet, images: int, seed: int = 0) -> Decisions:
    """Random options for so many images, in one pass."""
    generator = torch.Generator().manual_seed(seed)
    return Decisions.of_pass(torch.randint(len(network.bits), (images, len(network.blocks)), generator=generator))


def everywhere(network: DynamicResNet, bits: int, images: int) -> Decisions:
    """The option of ``bits`` bits in every block, in one pass, for so many images."""
    return Decisions.alike(torch.full((len(network.blocks),), network.bits.index(bits)), images)


def solid_image(path: Path, colour: int = 128) -> None:
    """Write a small image of one colour."""
    Image.new("L", (8, 8), colour).save(path)
