"""The surgery: which layers are replaced, what each costs, and the replacement itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from dfs_cli.config import FULL_BITS, DynamicConfig
from dfs_cli.cost.count import count_macs
from dfs_cli.cost.table import CostTable, LayerCost
from dfs_cli.errors import UnsupportedModelError
from dfs_cli.nn.gate import FeedForwardGate, Gate, RecurrentGate, RefineGate
from dfs_cli.nn.layers import CONVOLUTIONS, FractionalConv2d, FractionalLayer, FractionalLinear
from dfs_cli.nn.network import Block, DynamicResNet
from dfs_cli.nn.normalisation import FRACTIONAL_NORMS, FractionalBatchNorm, match_statistics, moments
from dfs_cli.nn.pooling import MaxPool2d
from dfs_cli.nn.precision import Precision
from dfs_cli.nn.probe import ProbedResNet
from dfs_cli.surgery.families import FAMILIES, LAYOUTS, family_names


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The residual blocks of ``model`` by path, in order.

    Raises:
        UnsupportedModelError: the model's class or its blocks are of no known family.
    """
    kind = f"{type(model).__module__}.{type(model).__name__}"
    if type(model) not in LAYOUTS:
        raise UnsupportedModelError(
            f"a {kind} cannot be converted: supported are {', '.join(c.__name__ for c in LAYOUTS)} "
            f"models of timm with {family_names()} blocks"
        )
    blocks = {name: module for name, module in model.named_modules() if type(module) in FAMILIES}
    if not blocks:
        # Blocks are the children of the stages.
        found = sorted({type(m).__name__ for m in model.modules() if hasattr(m, "downsample")})
        raise UnsupportedModelError(
            f"a {kind} with {', '.join(found) or 'no residual'} blocks cannot be converted: "
            f"supported are {family_names()} blocks"
        )
    return blocks


def _roles(model: nn.Module) -> tuple[dict[str, int], set[str]]:
    """Layers that follow a block's option (path to block index), and layers that run at the edge bitwidth."""
    branch: dict[str, int] = {}
    edges: set[str] = set()
    inside: set[str] = set()
    for i, (path, block) in enumerate(find_blocks(model).items()):
        family = FAMILIES[type(block)]
        for name, module in block.named_modules(prefix=path):
            inside.add(name)
            if type(module) not in CONVOLUTIONS:
                continue
            if _is_within(name, path, family.branch):
                branch[name] = i
            elif _is_within(name, path, (family.shortcut,)):
                edges.add(name)
    for name, module in model.named_modules():
        if name not in inside and type(module) in (*CONVOLUTIONS, nn.Linear):
            edges.add(name)
    return branch, edges


def _is_within(name: str, path: str, parts: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{path}.{part}.") for part in parts)


def block_channels(model: nn.Module) -> list[int]:
    """Width of the features that enter each block."""
    return [cast(nn.Conv2d, block.get_submodule("conv1")).in_channels for block in find_blocks(model).values()]


def plan_costs(model: nn.Module, config: DynamicConfig, input_size: tuple[int, int, int]) -> CostTable:
    """The cost of every option of every block of ``model`` at ``input_size`` (C, H, W); the model is not changed.

    Raises:
        UnsupportedModelError: see :func:`find_blocks`; or the model cannot run at that size.
    """
    branch, edges = _roles(model)
    try:
        count = count_macs(model, input_size)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(f"the model cannot run on images of size {input_size}: {reason}") from None
    layers = tuple(
        LayerCost(name, macs, block=branch[name])
        if name in branch
        else LayerCost(name, macs, bits=config.edge_bits if name in edges else FULL_BITS)
        for name, macs in count.layers.items()
    )
    with torch.random.fork_rng(devices=[]):  # a throwaway gate must not use up random numbers
        gate_macs = _create_gate(model, config).macs()
    passes = 2 if config.gate == "probe" else 1
    return CostTable(config.bits, tuple(find_blocks(model)), layers, tuple(gate_macs), count.not_counted, passes)


def _create_gate(model: nn.Module, config: DynamicConfig) -> Gate | RefineGate:
    """The gate that ``config`` names, for ``model``."""
    channels = block_channels(model)
    if config.gate == "probe":
        return RefineGate(channels, int(model.num_features), config)  # type: ignore[arg-type]
    return {"rnn": RecurrentGate, "ff": FeedForwardGate}[config.gate](channels, config)


def to_dynamic(model: nn.Module, config: DynamicConfig, table: CostTable) -> DynamicResNet:
    """A dynamic network made from a copy of ``model``; ``model`` is left unchanged.

    Its step sizes are not set yet: call :func:`fit_scales`, or load them.

    Raises:
        UnsupportedModelError: see :func:`find_blocks`; or the model's blocks do not match ``table``.
    """
    backbone = copy.deepcopy(model)
    block_modules = find_blocks(backbone)
    if tuple(block_modules) != table.blocks:
        raise UnsupportedModelError("the cost table belongs to another model: its blocks differ")
    branch, edge_names = _roles(backbone)
    edges = Precision(config.edge_bits)
    edge_bitwidths = () if config.edge_bits == FULL_BITS else (config.edge_bits,)
    bitwidths = tuple(b for b in config.bits if b not in (0, FULL_BITS))
    precisions = [Precision(max(config.bits)) for _ in block_modules]
    channels = block_channels(backbone)
    for name in [*branch, *edge_names]:
        layer = backbone.get_submodule(name)
        widths = bitwidths if name in branch else edge_bitwidths
        precision = precisions[branch[name]] if name in branch else edges
        new: FractionalLayer
        if isinstance(layer, nn.Conv2d):
            new = FractionalConv2d.from_module(layer, widths, precision)
        else:
            assert isinstance(layer, nn.Linear)
            new = FractionalLinear.from_module(layer, widths, precision)
        backbone.set_submodule(name, new)
    if bitwidths:
        for name, (norm, block) in _norms(backbone).items():
            adopted = FRACTIONAL_NORMS[type(norm)].adopt(norm, bitwidths, precisions[block])
            backbone.set_submodule(name, adopted)
    for name, module in list(backbone.named_modules()):
        if type(module) is nn.MaxPool2d:
            backbone.set_submodule(name, MaxPool2d.adopt(module))
    blocks = [
        Block(path, module, FAMILIES[type(module)].skip, precision, width, _keeps_input(module))
        for (path, module), precision, width in zip(block_modules.items(), precisions, channels, strict=True)
    ]
    device = next(backbone.parameters()).device
    gate = _create_gate(model, config)
    parts = (backbone, LAYOUTS[type(backbone)], blocks, edges, config, table.prices)
    network = ProbedResNet(*parts, gate) if isinstance(gate, RefineGate) else DynamicResNet(*parts, gate)
    return network.to(device).eval()


def _keeps_input(block: nn.Module) -> bool:
    """Whether the block, skipped, gives its input itself."""
    nothing = torch.empty(0)
    has_shortcut = getattr(block, FAMILIES[type(block)].shortcut) is not None
    return not has_shortcut and FAMILIES[type(block)].skip(block, nothing) is nothing


def _norms(model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """The batch-norms that see what a block's bitwidth changes, by path, with the block's index."""
    found = {}
    for i, (path, block) in enumerate(find_blocks(model).items()):
        family = FAMILIES[type(block)]
        for name, module in block.named_modules(prefix=path):
            if type(module) in FRACTIONAL_NORMS and not _is_within(name, path, (family.shortcut, *family.apart)):
                found[name] = (module, i)
    return found


@torch.no_grad()
def fit_scales(network: DynamicResNet, images: Tensor, policies: Sequence[Tensor] | None = None) -> None:
    """Set all step sizes and the statistics per bitwidth from ``images`` (N, C, H, W).

    Args:
        policies: options (L,), one or several, under which the statistics are measured; None: each option, for all blocks.
    """
    if policies is None:
        policies = [
            torch.full((len(network.blocks),), k)
            for k, bits in enumerate(network.config.bits)
            if bits not in (0, FULL_BITS)
        ]
    was_training = network.training
    network.eval()
    expected: dict[FractionalBatchNorm, tuple[Tensor, Tensor]] = {}

    def observe_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        cast(FractionalLayer, layer).calibrate_input(inputs[0])

    def observe_moments(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        expected[cast(FractionalBatchNorm, norm)] = moments(inputs[0])

    for layer in network.backbone.modules():
        if isinstance(layer, FractionalLayer):
            layer.calibrate_weight()
    with _hooked(network, FractionalLayer, observe_input), _hooked(network, FractionalBatchNorm, observe_moments):
        network.run_in_full(images)

    def match(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        norm = cast(FractionalBatchNorm, norm)
        if (bits := norm.precision.bits) != FULL_BITS:
            match_statistics(norm, norm.bitwidths.index(bits), expected[norm], inputs[0])

    with _hooked(network, FractionalBatchNorm, match):
        for policy in policies:
            network.run(images, policy.to(images.device).expand(len(images), -1))
    network.train(was_training)


@contextmanager
def _hooked(network: nn.Module, kind: type, hook: Callable[[nn.Module, tuple[Tensor, ...]], None]) -> Iterator[None]:
    """Call ``hook`` with the inputs of every layer of a kind before it runs, within the context."""
    handles = [m.register_forward_pre_hook(hook) for m in network.modules() if isinstance(m, kind)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def verify_conversion(model: nn.Module, network: DynamicResNet, images: Tensor) -> None:
    """Check that the network in floating point computes what ``model`` does.

    Raises:
        UnsupportedModelError: it does not: timm's forward differs from what the adapters assume.
    """
    was_training = model.training
    model.eval()
    with torch.no_grad():
        expected = model(images)
    model.train(was_training)
    found = network.run_in_full(images)
    scale = float(expected.abs().max()) or 1.0
    difference = float((found - expected).abs().max()) / scale
    if math.isnan(difference) or difference > 1e-4:
        raise UnsupportedModelError(
            f"the converted {type(model).__name__} computes something else than the original (relative difference "
            f"{difference:.1e}): this version of timm is not supported for it"
        )
