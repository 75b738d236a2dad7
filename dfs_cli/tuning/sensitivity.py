"""The harm of each option of each block, and of each layer, to the predictions, measured once before tuning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dfs_cli.control.base import Need, Sensitivity, affordable
from dfs_cli.cost.table import CostTable
from dfs_cli.distributed import of_all, share, size, total
from dfs_cli.nn.features import ByteFeatures
from dfs_cli.nn.layers import FractionalConv2d
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.precision import Precision
from dfs_cli.nn.quantization import BYTE_BITS
from dfs_cli.surgery.plan import SurgeryPlan
from dfs_cli.tuning.losses import distillation_loss


def measure(
    need: Need, network: DynamicResNet, plan: SurgeryPlan, table: CostTable, images: Tensor
) -> Sensitivity | None:
    """Measure the sensitivity that a controller needs; None where there is a single option.

    Args:
        images: (N, C, H, W); for large networks fewer are used, so that each measurement takes about a minute.
    """
    if len(table.options) == 1:  # there is nothing to choose
        return None
    blocks = measure_blocks(network, table, images)
    if need is Need.BLOCKS or table.device is not None:  # on a device a block's cost is known, not that of its layers
        return Sensitivity(blocks)
    return Sensitivity(blocks, measure_layers(network, plan, table, images))


@torch.no_grad()
def measure_blocks(network: DynamicResNet, table: CostTable, images: Tensor) -> Tensor:
    """Harm (L, K) of taking an option in one block while all others run at their widest: the Kullback-Leibler divergence, in
    nats, of the predictions for ``images`` (N, C, H, W) from those with every block at its widest."""
    blocks, options = len(table.blocks), len(table.options)
    images, widest = _share_of_affordable(images, table, blocks * (options - 1)), options - 1
    if not len(images):
        return _mean(torch.zeros(blocks, options, device=images.device), 0)
    x = network.stem(images)
    expected = network.finish(0, x, widest)
    harm = torch.zeros(blocks, options, device=images.device)
    for block in range(blocks):
        for option in range(options - 1):
            logits = network.finish(block + 1, network.run_block(block, x, option), widest)
            harm[block, option] = distillation_loss(logits, expected, temperature=1.0)
        x = network.run_block(block, x, widest)
    return _mean(harm, len(images))


@torch.no_grad()
def measure_layers(network: DynamicResNet, plan: SurgeryPlan, table: CostTable, images: Tensor) -> Tensor:
    """Harm (M, K), as in :func:`measure_blocks`, of each option of each of the M layers of the blocks alone, in the table's
    order; infinite for skipping."""
    layers = [layer for layer in table.layers if layer.block is not None]
    options, widest = [i for i, bits in enumerate(table.options) if bits], len(table.options) - 1
    images = _share_of_affordable(images, table, len(layers) * (len(options) - 1) + len(table.blocks))
    harm = torch.zeros(len(layers), len(table.options), device=images.device)
    if not len(images):
        return _mean(harm, 0).index_fill(1, _skipping(table, harm), torch.inf)
    x, block = network.stem(images), 0
    expected = network.finish(block, x, widest)
    for row, layer in enumerate(layers):
        while block != layer.block:  # layers stand in the order of their blocks
            x, block = network.run_block(block, x, widest), block + 1
        for option in options[:-1]:
            with layer_at(network, plan, layer.name, table.options[option]):
                logits = network.finish(block, x, widest)
            harm[row, option] = distillation_loss(logits, expected, temperature=1.0)
    return _mean(harm, len(images)).index_fill(1, _skipping(table, harm), torch.inf)


def _skipping(table: CostTable, like: Tensor) -> Tensor:
    """The index of skipping, if it is an option, (1,) or (0,)."""
    return torch.tensor([i for i, bits in enumerate(table.options) if not bits], dtype=torch.long, device=like.device)


@torch.no_grad()
def measure_alone(
    network: DynamicResNet, plan: SurgeryPlan, table: CostTable, images: Tensor, expected: Tensor
) -> dict[str, float]:
    """Harm of quantizing one layer alone, to 8 bits or else to its fewest, while all others run in floating point; by name.

    Args:
        images: (N, C, H, W), see :func:`measure`.
        expected: (N, classes), the original's logits.
    """
    layers = {name: network.backbone.get_submodule(name) for name in (*plan.branch, *plan.fixed)}
    bits = {name: _byte_bits(layer.bitwidths) for name, layer in layers.items() if layer.bitwidths}  # type: ignore
    images = affordable(images, table, len(bits))
    harm = {}
    for name in bits:
        with layer_at(network, plan, name, bits[name]) as kept:
            logits = network.run_in_full(images, kept)
        harm[name] = float(distillation_loss(logits, expected[: len(images)], temperature=1.0))
    return harm


def _byte_bits(bitwidths: tuple[int, ...]) -> int:
    return max((bits for bits in bitwidths if bits <= BYTE_BITS), default=min(bitwidths))


@contextmanager
def layer_at(network: DynamicResNet, plan: SurgeryPlan, name: str, bits: int) -> Iterator[Precision]:
    """Run one layer, and the batch-norms that follow it, at ``bits``, whatever its block runs at, within the context, which is
    given their precision."""
    paths = [name, *(norm for norm, layer in plan.norms.items() if layer == name)]
    modules = [network.backbone.get_submodule(path) for path in paths]
    norm = modules[0].norm if isinstance(modules[0], FractionalConv2d) else None
    if norm is not None and norm not in modules:  # of stem or shortcut
        modules.append(norm)
    modules += [output for module in modules if isinstance(output := getattr(module, "output", None), ByteFeatures)]
    before = [module.precision for module in modules]
    layer_precision = Precision((bits,))
    for module in modules:
        module.precision = layer_precision  # type: ignore[assignment]
    try:
        yield layer_precision
    finally:
        for module, precision in zip(modules, before, strict=True):
            module.precision = precision


@torch.no_grad()
def divergence(network: DynamicResNet, original: torch.nn.Module, images: Tensor) -> float:
    """Kullback-Leibler divergence, in nats, of the predictions for ``images`` (N, C, H, W) from the original's."""
    return float(distillation_loss(network.run(images).logits, original(images), temperature=1.0))


def _share_of_affordable(images: Tensor, table: CostTable, runs: int) -> Tensor:
    """This process's share of the images."""
    images = affordable(images, table, runs)
    own = share(len(images))
    return images[own.start : own.stop]


def _mean(harm: Tensor, images: int) -> Tensor:
    """The mean of the harm to all processes' images, of this one's to so many."""
    if size() == 1:
        return harm
    counts = of_all(images)
    return (total(harm.double() * images) / sum(counts)).to(harm)
