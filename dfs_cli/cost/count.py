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
    """MACs of one image: of each layer (by module path, in order), and what was not counted, by operation."""

    layers: dict[str, int]
    not_counted: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.layers.values())


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> MacCount:
    """Count the convolutions and linear maps of ``model`` for one image of ``input_size`` (C, H, W).

    The count is fvcore's, in which one multiply-accumulate counts one. Normalisation, pooling, activations and additions
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
        not_counted |= {op: 1 for op in analysis.by_operator() if op in _FREE}
    finally:
        model.train(was_training)
    layers = {}
    for name, _ in model.named_modules():
        own = {op: n for op, n in per_module.get(name, {}).items() if op in _COUNTED}
        # What fvcore attributes to a module includes its children; take the rest.
        for child, _ in model.get_submodule(name).named_children():
            path = f"{name}.{child}" if name else child
            for op in own:
                own[op] -= per_module.get(path, {}).get(op, 0)
        if macs := int(sum(own.values())):
            layers[name] = macs
    return MacCount(layers, dict(sorted(not_counted.items())))
