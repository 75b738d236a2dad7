"""Giving up what no option needs, once tuning is done, so that a file need not hold it."""

from __future__ import annotations

import torch
from torch import nn

from dfs_cli.config import FULL_BITS
from dfs_cli.nn.layers import FractionalLayer
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.normalisation import FractionalBatchNorm
from dfs_cli.nn.probe import ProbedResNet
from dfs_cli.nn.quantization import byte_codes


@torch.no_grad()
def settle(network: DynamicResNet) -> None:
    """Round the tuned ``network``, in place, to what its bitwidths can tell apart.

    The gate becomes what half precision can hold, the always quantized edges integer codes of their bitwidth. Unless floating
    point is an option, so do all weights: codes of the widest bitwidth, which narrower bitwidths quantize further. Attention
    becomes 8-bit codes (it is computed in floating point as before), and normalisation keeps only what the bitwidths use.
    """
    if isinstance(network, ProbedResNet):
        network.tuned_price.copy_(network.stored_price)
    for parameter in network.gate.parameters():
        parameter.copy_(parameter.half())
    keeps_floats = FULL_BITS in network.config.bits
    for module in network.backbone.modules():
        if keeps_floats:
            if isinstance(module, FractionalLayer) and module.precision is network.edges and module.bitwidths:
                module.set_weight_codes()
        elif isinstance(module, FractionalLayer) and module.bitwidths:
            module.set_weight_codes()
        elif isinstance(module, FractionalBatchNorm):
            module.fold_statistics()
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            codes, steps = byte_codes(module.weight)
            module.weight.copy_(codes * steps)
