"""Batch-norm folded into the convolution before it, where that convolution runs in floating point only."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterator
from typing import cast

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn

from dfs_cli.nn.layers import FractionalConv2d
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.normalisation import norm_tensors
from dfs_cli.presets import FULL_BITS


@torch.no_grad()
def fold_norms(network: DynamicResNet) -> DynamicResNet:
    """The same network for inference, without the memory traffic of separate normalisation.

    Convolutions that also run at other bitwidths keep their normalisation. Floating-point results differ in rounding alone.

    Returns:
        A copy; or ``network`` itself, if there is nothing to fold.
    """
    backbone = network.backbone
    blocks = [block.name for block in network.blocks]
    pairs = [*_pairs(backbone, blocks)]
    for name in blocks:
        pairs += [(f"{name}.{conv}", f"{name}.{norm}") for conv, norm in _pairs(backbone.get_submodule(name))]
    if not pairs:
        return network
    folded = copy.deepcopy(network).eval()
    for conv, norm in pairs:
        layer, module = folded.backbone.get_submodule(conv), folded.backbone.get_submodule(norm)
        _fold(cast(FractionalConv2d, layer), cast(nn.BatchNorm2d, module))
        activation = module.act if isinstance(module, BatchNormAct2d) else nn.Identity()
        folded.backbone.set_submodule(norm, activation)
    return folded


class _Tracer(fx.Tracer):
    """Traces layers, and the modules at the paths ``leaves``, as single steps."""

    def __init__(self, leaves: Collection[str]) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            module_qualified_name in self.leaves or isinstance(m, nn.BatchNorm2d) or not any(True for _ in m.children())
        )


def _pairs(module: nn.Module, leaves: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """Pairs of paths: a convolution that runs in floating point only, and the batch-norm that alone uses its output."""
    parts = dict(module.named_modules())
    if not any(_always_full(part) for part in parts.values()):
        return
    try:
        graph = _Tracer(leaves).trace(module)
    except Exception:  # code that cannot be traced is left as it is
        return
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(node.target for node in calls)
    for norm in calls:
        if type(parts[norm.target]) in (nn.BatchNorm2d, BatchNormAct2d):
            (conv,) = norm.all_input_nodes
            is_pair = conv.op == "call_module" and _always_full(parts[conv.target]) and len(conv.users) == 1
            if is_pair and times[conv.target] == times[norm.target] == 1:
                yield conv.target, norm.target


def _always_full(module: nn.Module) -> bool:
    return isinstance(module, FractionalConv2d) and not module.bitwidths


def _fold(conv: FractionalConv2d, norm: nn.BatchNorm2d) -> None:
    gain, shift = norm_tensors(norm, FULL_BITS).as_affine(norm.eps)
    if conv.bias is not None:
        shift = shift + conv.bias.double() * gain
    weight: Tensor = conv.effective_weight()
    conv.weight = nn.Parameter((weight.double() * gain.reshape(-1, 1, 1, 1)).to(weight.dtype))
    conv.bias = nn.Parameter(shift.to(weight.dtype))
    conv.standardise_eps = None  # the weight is standardised already
