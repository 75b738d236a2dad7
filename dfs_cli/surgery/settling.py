"""Giving up what no option needs, once tuning is done, so that a file need not hold it."""

from __future__ import annotations

import torch

from dfs_cli.config import FULL_BITS
from dfs_cli.nn.layers import FloatLayer, FractionalLayer
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.normalisation import FractionalBatchNorm
from dfs_cli.nn.probe import ProbedResNet
from dfs_cli.nn.quantization import byte_codes


@torch.no_grad()
def settle(network: DynamicResNet) -> None:
    """Round the tuned ``network``, in place, to what its bitwidths can tell apart.

    The gate's parameters become what half precision can hold, weights that only ever are quantized integer codes of their
    widest bitwidth, which narrower ones quantize further. Unless floating point is an option, attention becomes 8-bit codes (it
    is computed in floating point as before), and normalisation keeps only what the bitwidths use.
    """
    if isinstance(network, ProbedResNet):
        network.tuned_price.copy_(network.stored_price)
    for parameter in network.gate.parameters():
        parameter.copy_(parameter.half())
    keeps_floats = FULL_BITS in network.config.bits
    for module in network.backbone.modules():
        if isinstance(module, FractionalLayer):
            if module.bitwidths and (module.precision is network.edges or not keeps_floats):
                module.set_weight_codes()
        elif isinstance(module, FractionalBatchNorm) and not keeps_floats:
            module.fold_statistics()
        elif isinstance(module, FloatLayer) and not keeps_floats:
            codes, steps = byte_codes(module.weight)
            module.weight.copy_(codes * steps)
