"""Equalisation: channels of very different ranges share one step size, once each has a gain of its own.

Cross-layer equalisation (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019)
multiplies a channel in one layer and divides by the same number in the next one. Blocks of timm are black boxes here, so the
layer that reads the channel does both: it multiplies its input's channels before it quantizes them, and divides its weight.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from dfs_cli.nn.features import ByteFeatures
from dfs_cli.nn.layers import FractionalConv2d, FractionalLayer
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.normalisation import FractionalBatchNorm
from dfs_cli.surgery.initialise import hooked

_LARGEST_EXPONENT = 40.0


@torch.no_grad()
def input_gains(network: DynamicResNet, names: Collection[str], images: Tensor) -> dict[str, Tensor]:
    """Gains (C_in,) for the inputs of the layers ``names``: with them, each channel's largest value and its largest weight are
    equal, up to rounding to powers of two.

    Args:
        images: (N, C, H, W), on which the values are measured.
    """
    layers = {cast(FractionalLayer, network.backbone.get_submodule(name)): name for name in names}
    gains: dict[str, Tensor] = {}

    def observe(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        layer = cast(FractionalLayer, layer)
        if layer in layers:
            values = inputs[0].detach().float().abs().transpose(0, 1).flatten(1).amax(dim=1)
            gains[layers[layer]] = balance(values, layer.weight_range())

    with hooked(network, FractionalLayer, observe):
        network.run_in_full(images)
    return gains


def balance(values: Tensor, weights: Tensor) -> Tensor:
    """Powers of two g (C,) with which ``g * values`` and ``weights / g`` are closest to each other.

    A channel that is always zero, or is never read, gets the gain that makes the other range an ordinary one: weights that
    nothing was ever multiplied by may be of any size.

    Args:
        values, weights: (C,), the largest absolute value and weight of each channel.
    """
    value, weight = values.double().log2(), weights.double().log2()
    live = (values > 0) & (weights > 0)
    if not bool(live.any()):
        return torch.ones_like(values)
    ordinary = ((weight + value) / 2)[live].median()
    exponents = torch.where(values > 0, ordinary - value, 0.0)
    exponents = torch.where(weights > 0, weight - ordinary, exponents)
    exponents = torch.where(live, (weight - value) / 2, exponents)
    return exponents.to(values.dtype).round().clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT).exp2()


def equalise(network: DynamicResNet, gains: Mapping[str, Tensor]) -> None:
    """Give the inputs of layers, by name, their gains (C_in,), in place. Step sizes are to be fitted anew."""
    for name, gain in gains.items():
        layer = cast(FractionalLayer, network.backbone.get_submodule(name))
        if layer.source is not None:  # one step size does not do for what blocks hand on
            hand_on_floats(network)
        layer.set_input_gain(gain)


def hand_on_floats(network: DynamicResNet) -> None:
    """Take back, in place, that blocks hand on bytes."""
    network.features = None
    for block in network.blocks:
        block.output = None
    for module in network.backbone.modules():
        if isinstance(module, FractionalLayer):
            module.read_from(None)
        if isinstance(module, (FractionalLayer, FractionalBatchNorm)):
            module.output = None
        if isinstance(module, FractionalConv2d) and isinstance(module.target, ByteFeatures):
            module.fold_in(module.norm, None)


def reserve_gains(network: DynamicResNet, names: Collection[str]) -> None:
    """Make room for the gains of layers, by name, which are loaded later.

    Raises:
        ValueError: a name is not that of a layer that can have one, or is given twice.
    """
    layers = dict(network.backbone.named_modules())
    for name in names:
        layer = layers.pop(name, None)
        if not isinstance(layer, FractionalLayer):
            raise ValueError(f"{name[:80]!r} is no layer whose input could have a gain, or is named twice")
        if layer.source is not None:
            hand_on_floats(network)
        layer.reserve_input_gain()
