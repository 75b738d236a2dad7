"""Multiply-accumulates (MACs) per layer, counted by fvcore."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn

_COUNTED = ("conv", "linear", "matmul", "addmm", "bmm", "einsum")
_FREE = ("batch_norm", "group_norm", "layer_norm", "instance_norm", "adaptive_avg_pool2d", "upsample_bilinear2d")


class MacCount(NamedTuple):
    """MACs of each layer for one image, by module path in order, and how often each operation without a count occurs."""

    layers: dict[str, int]
    not_counted: dict[str, int]


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> MacCount:
    """Count the convolutions and linear maps of ``model`` for one image of ``input_size`` (C, H, W).

    The count is fvcore's, which counts a multiply-accumulate as one. Normalisation, pooling, activations and additions
    are listed as not counted. The model runs once, in evaluation mode, and is left as it was.
    """
    parameter = next(model.parameters())
    image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    was_training = model.training
    model.eval()
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    try:
        analysis = FlopCountAnalysis(model, image)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        per_module = analysis.by_module_and_operator()
        not_counted = {op.removeprefix("aten::"): n for op, n in analysis.unsupported_ops().items()}
    finally:
        model.train(was_training)
    layers = {}
    for name, module in model.named_modules():
        counts = dict(per_module.get(name, {}))
        # fvcore's counts of a module include its children's: subtract them.
        for child, _ in module.named_children():
            path = f"{name}.{child}" if name else child
            for op in counts:
                counts[op] -= per_module.get(path, {}).get(op, 0)
        if macs := int(sum(n for op, n in counts.items() if op in _COUNTED)):
            layers[name] = macs
        for op in _FREE:
            if counts.get(op):
                not_counted[op] = not_counted.get(op, 0) + 1
    return MacCount(layers, dict(sorted(not_counted.items())))
