"""What each option of each block costs in accuracy, measured once before tuning."""

from __future__ import annotations

import torch
from torch import Tensor

from dfs_cli.cost.table import CostTable
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.tuning.losses import distillation_loss
from dfs_cli.tuning.static_mix import set_layer_bits

_STRENGTH, _LARGEST_SHIFT = 1.0, 1.8
_FLOOR = 1e-5  # damages below this, in nats, are noise
_MACS = 2e12  # about a minute on a few CPU cores


@torch.no_grad()
def measure_damage(network: DynamicResNet, table: CostTable, images: Tensor) -> Tensor:
    """Damage (L, K) of taking an option in one block while all others run at their widest.

    The damage is the Kullback-Leibler divergence, in nats, of the predictions from those with every block at its widest.

    Args:
        images: (N, C, H, W); for large networks fewer are used, so that this takes about a minute.
    """
    blocks, options = len(table.blocks), len(table.options)
    images = _affordable(images, table, blocks * (options - 1))
    widest = torch.full((len(images), blocks), options - 1, device=images.device)
    expected = network.run(images, widest).logits
    damage = torch.zeros(blocks, options, device=images.device)
    for block in range(blocks):
        for option in range(options - 1):
            decisions = widest.clone()
            decisions[:, block] = option
            logits = network.run(images, decisions).logits
            damage[block, option] = distillation_loss(logits, expected, temperature=1.0)
    return damage


@torch.no_grad()
def measure_layer_damage(network: DynamicResNet, table: CostTable, images: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`measure_damage` measures, for single layers.

    Args:
        images: as there.

    Returns:
        Damage (M, K) of each layer of the blocks, in the table's order, at each option but skipping (infinite), and damage
        (L,) of skipping each block.
    """
    names = [layer.name for layer in table.layers if layer.block is not None]
    blocks, options = len(table.blocks), len(table.options)
    images = _affordable(images, table, len(names) * (options - 2) + blocks)
    widest = torch.full((len(images), blocks), options - 1, device=images.device)
    expected = network.run(images, widest).logits
    damage = torch.full((len(names), options), torch.inf, device=images.device)
    damage[:, -1] = 0
    for row, name in enumerate(names):
        for option in range(1, options - 1):
            set_layer_bits(network, {name: table.options[option]})
            damage[row, option] = distillation_loss(network.run(images, widest).logits, expected, temperature=1.0)
    set_layer_bits(network, {})
    skipping = torch.zeros(blocks, device=images.device)
    for block in range(blocks):
        decisions = widest.clone()
        decisions[:, block] = 0
        skipping[block] = distillation_loss(network.run(images, decisions).logits, expected, temperature=1.0)
    return damage, skipping


def _affordable(images: Tensor, table: CostTable, runs: int) -> Tensor:
    return images[: max(16, int(_MACS / (table.dense_macs * runs)))]


@torch.no_grad()
def prefer_harmless_options(network: DynamicResNet, damage: Tensor) -> None:
    """Shift the gate's preferences by how much less (or more) an option harms a block than it harms the average block."""
    log_damage = damage.clamp_min(_FLOOR).log()
    shift = _STRENGTH * (log_damage.mean(dim=0) - log_damage)
    network.gate.preference.add_(shift.clamp(-_LARGEST_SHIFT, _LARGEST_SHIFT))
