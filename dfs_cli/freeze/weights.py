"""Rounding after tuning: a file need not hold precision that no option uses."""

from __future__ import annotations

import torch

from dfs_cli.nn.features import ByteFeatures
from dfs_cli.nn.layers import FloatLayer, FractionalLayer
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.normalisation import FractionalBatchNorm
from dfs_cli.nn.quantization import byte_codes


@torch.no_grad()
def freeze_weights(network: DynamicResNet) -> None:
    """Round the tuned ``network``, in place, to the precision that its bitwidths use.

    The controller's parameters become half-precision values. Weights that never run in floating point become integer codes at
    their widest bitwidth, which narrower bitwidths quantize further. Step sizes of features become
    final. Unless floating point is an option, attention's weights become 8-bit codes (it still runs in floating point), and
    normalisation keeps only the parameters that the bitwidths use.
    """
    network.controller.freeze()
    outputs = [m for m in network.modules() if isinstance(m, ByteFeatures)]
    for output in sorted(outputs, key=lambda output: output.unit is not None):  # units first
        output.settle()
    layers = [m for m in network.backbone.modules() if isinstance(m, FractionalLayer)]
    keeps_floats = any(layer.precision.may_be_full for layer in layers if layer.precision is not network.fixed)
    for module in network.backbone.modules():
        if isinstance(module, FractionalLayer):
            if module.bitwidths and not module.precision.may_be_full:
                module.set_weight_codes()
        elif isinstance(module, FractionalBatchNorm):
            if not module.precision.may_be_full:
                module.fold_statistics()
        elif isinstance(module, FloatLayer) and not keeps_floats:
            codes, steps = byte_codes(module.weight)
            module.weight.copy_(codes * steps)
