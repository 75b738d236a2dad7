"""Multiply-accumulates (MACs) per layer, counted by fvcore."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

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

    On the meta device, where fvcore cannot trace, PyTorch's own counter counts the same MACs, and lists nothing else.
    """
    parameter = next(model.parameters())
    if parameter.is_meta:
        return MacCount(_count_on_meta(model, torch.empty(1, *input_size, device="meta", dtype=parameter.dtype)), {})
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


@torch.no_grad()
def _count_on_meta(model: nn.Module, image: torch.Tensor) -> dict[str, int]:
    """MACs of each layer, by module path in order, by PyTorch's counter: nothing is allocated."""
    was_training = model.training
    with FlopCounterMode(display=False) as counter:
        model.eval()(image)
    model.train(was_training)
    counts = {path: sum(by_op.values()) // 2 for path, by_op in counter.get_flop_counts().items()}
    layers: dict[str, int] = {}

    def total(name: str, module: nn.Module) -> int:
        """A module's count, with its children's; of a list of modules, which is never called, the sum of theirs."""
        layers[name] = 0  # keeps the order of the network
        within = sum(total(f"{name}.{child}" if name else child, m) for child, m in module.named_children())
        mine: int = counts.get(f"{type(model).__name__}.{name}" if name else type(model).__name__, within)
        layers[name] = mine - within
        return mine

    total("", model)
    return {name: macs for name, macs in layers.items() if macs}
