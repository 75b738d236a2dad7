"""Copies of a timm ResNet that compute the same and are hard to quantize.

Each kind is something that trained networks show: channels of very different scales, channels that never fire beside weights
that nothing has ever restrained, normalisation by almost nothing, a few huge activations.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import cast

import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

Pair = tuple[nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]
"""A convolution, the batch-norm behind it and, behind a ReLU, the convolution that alone reads the result."""


def hostile(model: nn.Module, *kinds: str, seed: int = 0) -> nn.Module:
    """A copy of ``model``, a timm ResNet of basic or bottleneck blocks with ReLU, that computes what :func:`spare` of it does.

    Args:
        kinds: names of :data:`KINDS`; none: all of them.
    """
    made = spare(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for kind in kinds or KINDS:
            KINDS[kind](made, generator)
    return made


@torch.no_grad()
def spare(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose convolutions inside blocks have two channels each that are always zero and never read.

    These are the channels that the next convolution makes least of.
    """
    made = copy.deepcopy(model).eval()
    for _, norm, reader in _pairs(made):
        use = norm.weight.abs() * reader.weight.abs().sum(dim=(0, 2, 3))
        for channel in use.argsort()[:2].tolist():
            norm.weight[channel] = norm.bias[channel] = 0
            reader.weight[:, channel] = 0
    return made


def _blocks(model: nn.Module) -> list[list[BasicBlock | Bottleneck]]:
    """The blocks of each stage."""
    stages: dict[str, list[BasicBlock | Bottleneck]] = {}
    for name, module in model.named_modules():
        if isinstance(module, BasicBlock | Bottleneck):
            stages.setdefault(name.split(".")[0], []).append(module)
    return list(stages.values())


def _norms(block: nn.Module) -> list[nn.BatchNorm2d]:
    names = ("bn1", "bn2", "bn3")
    return [cast(nn.BatchNorm2d, getattr(block, name)) for name in names if hasattr(block, name)]


def _convolutions(block: nn.Module) -> list[nn.Conv2d]:
    names = ("conv1", "conv2", "conv3")
    return [cast(nn.Conv2d, getattr(block, name)) for name in names if hasattr(block, name)]


def _pairs(model: nn.Module) -> Iterator[Pair]:
    for stage in _blocks(model):
        for block in stage:
            convs = _convolutions(block)
            yield from zip(convs, _norms(block), convs[1:], strict=False)


def _scales(count: int, generator: torch.Generator) -> Tensor:
    """Log-uniform from 1/100 to 100."""
    return 10 ** (4 * torch.rand(count, generator=generator) - 2)


def _scale(norm: nn.BatchNorm2d, scales: Tensor) -> None:
    norm.weight.mul_(scales)
    norm.bias.mul_(scales)


def _read_scaled(layer: nn.Conv2d | nn.Linear, scales: Tensor) -> None:
    layer.weight.div_(scales.reshape(1, -1, *[1] * (layer.weight.dim() - 2)))


def _scale_branches(model: nn.Module, generator: torch.Generator) -> None:
    """Channels between the convolutions of a block are scaled by 1/100 to 100."""
    for _, norm, reader in _pairs(model):
        scales = _scales(norm.num_features, generator)
        _scale(norm, scales)
        _read_scaled(reader, scales)


def _scale_stream(model: nn.Module, generator: torch.Generator) -> None:
    """Channels of what blocks hand on, the same ones throughout a stage, are scaled by 1/100 to 100."""
    resnet, stages = cast(ResNet, model), _blocks(model)
    for number, stage in enumerate(stages):
        scales = _scales(_norms(stage[0])[-1].num_features, generator)
        for i, block in enumerate(stage):
            _scale(_norms(block)[-1], scales)
            if i:
                _read_scaled(_convolutions(block)[0], scales)
        if stage[0].downsample is not None:
            _scale(cast(nn.BatchNorm2d, cast(nn.Sequential, stage[0].downsample)[-1]), scales)
        else:  # the shortcut hands on what the stem has made
            _scale(cast(nn.BatchNorm2d, resnet.bn1), scales)
            _read_scaled(_convolutions(stage[0])[0], scales)
        if number + 1 == len(stages):
            _read_scaled(cast(nn.Linear, resnet.fc), scales)
            continue
        after = stages[number + 1][0]
        _read_scaled(_convolutions(after)[0], scales)
        convs = [m for m in cast(nn.Module, after.downsample).modules() if isinstance(m, nn.Conv2d)]
        _read_scaled(convs[0], scales)


def _add_dead(model: nn.Module, generator: torch.Generator) -> None:
    """A channel that never fires, beside weights a hundred times as large as all others."""
    for i, (_, norm, reader) in enumerate(_pairs(model)):
        channel = _spare_channels(norm)[0]
        norm.bias[channel] = (0.0, -1e4)[i % 2] * float(norm.bias.abs().max())
        largest = reader.weight.abs().amax(dim=(1, 2, 3))
        noise = torch.randn(reader.weight[:, channel].shape, generator=generator)
        reader.weight[:, channel] = 100 * largest[:, None, None] * noise


def _shrink_variances(model: nn.Module, generator: torch.Generator) -> None:
    """A third of the channels inside blocks have variances of 1e-12 to 1e-8."""
    for conv, norm, _ in _pairs(model):
        variance = cast(Tensor, norm.running_var)
        chosen = torch.rand(len(variance), generator=generator) < 1 / 3
        tiny = 10 ** (4 * torch.rand(len(variance), generator=generator) - 12)
        factor = torch.where(chosen, (tiny / variance.clamp_min(1e-5)).sqrt(), 1.0)
        small = variance * factor**2
        norm.weight.mul_(((small + norm.eps) / (variance + norm.eps)).sqrt() / factor)
        conv.weight.mul_(factor.reshape(-1, 1, 1, 1))
        cast(Tensor, norm.running_mean).mul_(factor)
        variance.copy_(small)


def _add_peaks(model: nn.Module, generator: torch.Generator) -> None:
    """A channel that is nearly always zero and now and then a thousand times as large as all others, and hardly read."""
    for conv, norm, reader in _pairs(model):
        channel = _spare_channels(norm)[-1]
        alive = int(norm.weight.abs().argmax())
        conv.weight[channel] = conv.weight[alive]
        for name in ("running_mean", "running_var"):
            values = cast(Tensor, getattr(norm, name))
            values[channel] = values[alive]
        gain = 1000 * float(norm.weight.abs().max())
        norm.weight[channel], norm.bias[channel] = gain, -3.5 * gain  # as far from the mean as that
        noise = torch.randn(reader.weight[:, channel].shape, generator=generator)
        reader.weight[:, channel] = 1e-7 * noise / math.sqrt(noise[0].numel())


def _spare_channels(norm: nn.BatchNorm2d) -> list[int]:
    return (norm.weight == 0).nonzero().flatten().tolist()


KINDS: dict[str, Callable[[nn.Module, torch.Generator], None]] = {
    "dead channels": _add_dead,
    "peaks": _add_peaks,
    "tiny variances": _shrink_variances,
    "scaled branches": _scale_branches,
    "scaled stream": _scale_stream,
}
"""By name, what makes a network hostile, in place; in the order in which they can follow each other."""
