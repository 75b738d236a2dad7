"""Biases that integer hardware can add.

A convolution on integer codes sums integers. Integer hardware adds batch-norm's shift as an integer, too, in units of weight
step times input step times batch-norm's gain. Rounding it only in an export would change codes, and with them decisions. So it
is rounded in the network, after tuning, and network and export compute the same.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import cast

import torch
from torch import Tensor, nn

from dfs_cli.cost.decisions import Decisions
from dfs_cli.nn.layers import FractionalConv2d
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.normalisation import norm_tensors
from dfs_cli.nn.quantization import BYTE_BITS, LARGEST_BYTE, code_range, nearest_integer_bias


@torch.no_grad()
def round_biases(network: DynamicResNet, input_size: tuple[int, int, int]) -> None:
    """Round in place the shift of each batch-norm after a convolution of up to 8 bits to a value that integers can express.

    Args:
        input_size: (C, H, W) of images that the network runs on.
    """
    image = torch.zeros(1, *input_size, device=network.device)
    seen: dict[int, tuple[Tensor, FractionalConv2d]] = {}
    done: set[tuple[int, int]] = set()

    def remember(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        seen[id(output)] = output, cast(FractionalConv2d, layer)

    def round_bias(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        output, conv = seen.get(id(inputs[0]), (None, None))
        if conv is None or output is not inputs[0]:
            return
        bits = conv.precision.bits
        if bits <= BYTE_BITS and (id(norm), bits) not in done:
            done.add((id(norm), bits))
            _round(conv, cast(nn.BatchNorm2d, norm), bits)

    with ExitStack() as hooks:
        for module in network.backbone.modules():
            if isinstance(module, FractionalConv2d):
                hooks.callback(module.register_forward_hook(remember).remove)
            elif isinstance(module, nn.BatchNorm2d):
                hooks.callback(module.register_forward_pre_hook(round_bias).remove)
        for policy in network.controller.policies():
            network.run(image, Decisions.alike(policy.to(image.device), 1))
            seen.clear()


def _round(conv: FractionalConv2d, norm: nn.BatchNorm2d, bits: int) -> None:
    tensors = norm_tensors(norm, bits)
    gain, shift = tensors.as_affine(norm.eps)
    if conv.bias is not None:
        shift = shift + conv.bias.double() * gain
    row = conv.bitwidths.index(bits)
    unit = conv.log_weight_steps[row].exp().double() * conv.input_step(bits).double() * gain.abs()
    numerator, multiple = nearest_integer_bias(shift / unit, LARGEST_BYTE // code_range(bits, signed=True)[1])
    rounded = torch.where(unit > 0, numerator / multiple * unit, shift)
    if tensors.bias is not None:
        tensors.bias.add_(torch.where(rounded.isfinite(), rounded - shift, 0.0).to(tensors.bias.dtype))
