"""The surgery: fractional layers replace the layers of a copy of the model."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dfs_cli.config import DynamicConfig
from dfs_cli.control.factory import create_controller
from dfs_cli.cost.table import CostTable
from dfs_cli.errors import UnsupportedModelError
from dfs_cli.nn.features import ByteFeatures, Stream
from dfs_cli.nn.layers import FractionalConv2d
from dfs_cli.nn.linear import FractionalLinear
from dfs_cli.nn.network import Block, DynamicResNet
from dfs_cli.nn.normalisation import FRACTIONAL_NORMS, FractionalBatchNorm
from dfs_cli.nn.pooling import MaxPool2d
from dfs_cli.nn.precision import Precision, Viewpoint
from dfs_cli.nn.quantization import BYTE_BITS
from dfs_cli.presets import FULL_BITS
from dfs_cli.surgery.dataflow import Dataflow
from dfs_cli.surgery.families import FAMILIES, LAYOUTS
from dfs_cli.surgery.plan import SurgeryPlan, plan_surgery

Replaced = dict[str, tuple[type[nn.Module], type[nn.Module]]]
"""By path, the classes of the original module and of its replacement."""


class Surgery(NamedTuple):
    """A dynamic network, and the record of its replaced modules."""

    network: DynamicResNet
    replaced: Replaced


def make_dynamic(model: nn.Module, config: DynamicConfig, table: CostTable, plan: SurgeryPlan | None = None) -> Surgery:
    """A dynamic network made from a copy of ``model``; ``model`` is left unchanged.

    Layers of the blocks follow their block's option, or have the individual bitwidth in ``table``. Step sizes are not set
    yet: call :func:`dfs_cli.surgery.initialise.fit_steps`, or load them.

    Args:
        plan: of ``model``; None: it is computed.

    Raises:
        UnsupportedModelError: see :func:`dfs_cli.surgery.plan.plan_surgery`; nothing could be replaced; or the model's
            blocks do not match ``table``.
    """
    plan = plan or plan_surgery(model)
    if plan.blocks != table.blocks:
        raise UnsupportedModelError("the cost table belongs to another model: its blocks differ")
    device = next(model.parameters()).device
    backbone = copy.deepcopy(model)
    viewpoint = Viewpoint(1 if config.first_scale == 1 else 2)
    fixed = Precision((config.fixed_bits,), viewpoint)
    options = tuple(bits for bits in config.bits if bits)
    block_precisions = [Precision(options, viewpoint) for _ in plan.blocks]
    precisions = {name: block_precisions[block] for name, block in plan.branch.items()}
    # A block that is always skipped keeps its layers at the fewest bits.
    precisions |= {name: Precision((bits or min(options),), viewpoint) for name, bits in table.layer_bits.items()}
    replaced: Replaced = {}
    for name in (*plan.branch, *plan.fixed):
        _replace(backbone, name, precisions.get(name, fixed), replaced)
    for name, layer in plan.norms.items():
        if precisions[layer].quantized:
            norm = backbone.get_submodule(name)
            _put(backbone, name, FRACTIONAL_NORMS[type(norm)].adopt(norm, precisions[layer]), replaced)
    for name, module in list(backbone.named_modules()):
        if type(module) is nn.MaxPool2d:
            _put(backbone, name, MaxPool2d.adopt(module), replaced)
    if not plan.branch:
        raise UnsupportedModelError(
            f"a {type(model).__name__} has no layer that could follow a bitwidth: nothing was replaced"
        )
    blocks = []
    for name, precision, width in zip(plan.blocks, block_precisions, plan.channels, strict=True):
        module = backbone.get_submodule(name)
        blocks.append(Block(name, module, FAMILIES[type(module)].skip, precision, width, _keeps_input(module)))
    features = None
    if max(config.fixed_bits, *(table.layer_bits.values() or config.bits)) <= BYTE_BITS:
        features = _make_stream(blocks, device)
    _compute_on_integers(backbone, plan.stem, None, None if features is None else features.at(0), replaced)
    for i, (block, flow) in enumerate(zip(blocks, plan.flows, strict=True)):
        given, block.output = (None, None) if features is None else (features.at(i), features.at(i + 1))
        _compute_on_integers(backbone, flow, given, block.output, replaced)
    controller = create_controller(config, table, plan.channels, plan.features)
    network = DynamicResNet(backbone, LAYOUTS[type(backbone)], blocks, fixed, config.bits, controller, features)
    return Surgery(network.to(device).eval(), replaced)


def _replace(backbone: nn.Module, name: str, precision: Precision, replaced: Replaced) -> None:
    layer = backbone.get_submodule(name)
    if isinstance(layer, nn.Conv2d):
        _put(backbone, name, FractionalConv2d.from_module(layer, precision), replaced)
    elif isinstance(layer, nn.Linear):
        _put(backbone, name, FractionalLinear.from_module(layer, precision), replaced)
    else:
        raise UnsupportedModelError(f"{name} is a {type(layer).__name__}: it cannot follow a bitwidth")


def _put(backbone: nn.Module, name: str, new: nn.Module, replaced: Replaced) -> None:
    replaced[name] = type(backbone.get_submodule(name)), type(new)
    backbone.set_submodule(name, new)


def _make_stream(blocks: Sequence[Block], device: torch.device) -> Stream:
    """What rounds the features between blocks to bytes: a block that may hand on its input keeps its step size, so that
    skipping it changes nothing, and adding to it needs one factor less."""
    groups = [0]
    for block in blocks:
        groups.append(groups[-1] if block.keeps_input else groups[-1] + 1)
    return Stream(groups, device)


def _compute_on_integers(
    backbone: nn.Module, flow: Dataflow, given: ByteFeatures | None, wanted: ByteFeatures | None, replaced: Replaced
) -> None:
    """Let the convolutions of a block, or of the stem, read and give codes where they can, in place.

    Args:
        given, wanted: what rounds the block's input and its output; None: nothing does.
    """
    names = {*flow.norms, *flow.targets, *flow.targets.values(), *flow.readers, *flow.results} - {""}
    layers = {name: backbone.get_submodule(name) for name in sorted(names)}
    convs = {name: layer for name, layer in layers.items() if isinstance(layer, FractionalConv2d)}
    for name, conv in convs.items():
        if name in flow.readers:
            conv.read_from(given)
        is_result, next_layer = wanted is not None and name in flow.results, flow.targets.get(name)
        target = wanted if next_layer == "" else convs.get(next_layer or "")
        if min(conv.bitwidths, default=FULL_BITS) > BYTE_BITS or (not is_result and target is None):
            continue
        norm = backbone.get_submodule(flow.norms[name]) if name in flow.norms else None
        if norm is not None and type(norm) in FRACTIONAL_NORMS and wanted is not None:  # of stem and shortcut
            norm = FRACTIONAL_NORMS[type(norm)].adopt(norm, conv.precision)
            _put(backbone, flow.norms[name], norm, replaced)
        if norm is not None and not isinstance(norm, FractionalBatchNorm):
            continue
        if is_result:
            (norm or conv).output = ByteFeatures(conv.precision, conv.weight.device, unit=wanted)
        conv.fold_in(norm, target)


def _keeps_input(block: nn.Module) -> bool:
    """Whether the block, when skipped, returns its input tensor itself."""
    empty = torch.empty(0)
    has_shortcut = getattr(block, FAMILIES[type(block)].shortcut) is not None
    return not has_shortcut and FAMILIES[type(block)].skip(block, empty) is empty


def verify_conversion(model: nn.Module, network: DynamicResNet, images: Tensor) -> None:
    """Check that the network in floating point computes what ``model`` does.

    Args:
        images: (N, C, H, W).

    Raises:
        UnsupportedModelError: it does not: timm's forward differs from what the adapters assume.
    """
    was_training = model.training
    model.eval()
    with torch.no_grad():
        expected = model(images)
    model.train(was_training)
    actual = network.run_in_full(images)
    scale = float(expected.abs().max()) or 1.0
    difference = float((actual - expected).abs().max()) / scale
    if math.isnan(difference) or difference > 1e-4:
        raise UnsupportedModelError(
            f"the converted {type(model).__name__} computes something else than the original (relative difference "
            f"{difference:.1e}): this version of timm is not supported for it"
        )
