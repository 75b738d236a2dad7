"""The best static mix of bitwidths under a cost, the same for every image: an option per block, or a bitwidth per layer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from dfs_cli.cost.table import CostTable, relative_cost
from dfs_cli.errors import ConfigError
from dfs_cli.nn.layers import FractionalLayer
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.normalisation import FractionalBatchNorm
from dfs_cli.nn.precision import Precision


def best_static_mix(table: CostTable, damage: Tensor, cost: float) -> Tensor:
    """Options (L,) of least total damage that cost at most ``cost``, without a gate.

    Damages are taken to add up, as in HAWQ-V3 (Yao et al., 2021).

    Args:
        damage: (L, K), what each option of each block does to the predictions alone.
        cost: as a fraction of the dense network's.

    Raises:
        ConfigError: the cheapest options cost more.
    """
    blocks, options = damage.shape
    one_each = np.kron(np.eye(blocks), np.ones(options))
    chosen = _choose(damage.double().cpu().numpy().ravel(), table.prices.numpy().ravel(), one_each, table, cost)
    return torch.from_numpy(chosen.reshape(blocks, options).argmax(axis=1))


def best_layer_mix(table: CostTable, damage: Tensor, skipping: Tensor, cost: float) -> dict[str, int]:
    """Bitwidths of the blocks' layers, by name, of least total damage that cost at most ``cost``, without a gate; 0 for all
    layers of a block that is skipped.

    Args:
        damage: (M, K), what each option but skipping does to the predictions in one layer alone.
        skipping: (L,), what skipping each block does.
        cost: as a fraction of the dense network's.

    Raises:
        ConfigError: the cheapest choice costs more.
    """
    layers = [layer for layer in table.layers if layer.block is not None]
    # A variable for each layer and option, and one for each block that may be skipped.
    member = np.array([[layer.block == block for block in range(len(table.blocks))] for layer in layers], dtype=float)
    one_each = np.hstack([np.kron(np.eye(len(layers)), np.ones(len(table.options) - 1)), member])
    shares = np.array([layer.macs / table.dense_macs for layer in layers])
    prices = np.outer(shares, [relative_cost(bits) for bits in table.options[1:]])
    harm = np.concatenate([damage[:, 1:].double().cpu().numpy().ravel(), skipping.double().cpu().numpy()])
    chosen = _choose(harm, np.concatenate([prices.ravel(), np.zeros(len(table.blocks))]), one_each, table, cost)
    kept, bits = chosen[: prices.size].reshape(prices.shape), np.array(table.options[1:])
    return {layer.name: int(row @ bits) for layer, row in zip(layers, kept, strict=True)}


def set_layer_bits(network: DynamicResNet, bits: Mapping[str, int]) -> None:
    """Give layers of the blocks, by their path in the backbone, bitwidths of their own, whatever is decided, for as long as
    their block is not skipped. Layers that are not named, or at 0 bits, follow their block.

    A normalisation follows the layer in front of it; without one, the layer behind.
    """
    for block in network.blocks:
        layer: FractionalLayer | None = None
        waiting: list[FractionalBatchNorm] = []
        for name, module in block.module.named_modules(prefix=block.name):
            if isinstance(module, FractionalBatchNorm):
                if layer is None:
                    waiting.append(module)
                else:
                    module.precision = layer.precision
            elif isinstance(module, FractionalLayer) and module.precision is not network.edges:
                layer = module
                layer.precision = Precision(bits[name]) if bits.get(name) else block.precision
                for norm in waiting:
                    norm.precision = layer.precision
                waiting.clear()


def _choose(damage: np.ndarray, prices: np.ndarray, one_each: np.ndarray, table: CostTable, cost: float) -> np.ndarray:
    """Which of V choices to make (V,), solved exactly as an integer program (HiGHS, by SciPy).

    Args:
        damage, prices: (V,), of each choice.
        one_each: (R, V), the choices of which exactly one is to be made, a row each.
    """
    spendable = cost - table.edges_cost
    # Costs as shares of the largest: the solver's tolerances are absolute.
    scale = (one_each * prices).max(axis=1).sum()
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(prices[None] / scale, -np.inf, spendable / scale * (1 + 1e-9) + 1e-12),
    ]
    # Of equal damages the cheaper one is taken.
    objective = damage / max(damage.max(), 1e-12) + 1e-9 * prices / prices.max()
    solution = milp(objective, constraints=constraints, integrality=np.ones(len(prices)), bounds=Bounds(0, 1))
    if not solution.success:
        raise ConfigError(f"no static mix of these options costs {cost:g} or less: {solution.message}")
    chosen: np.ndarray = solution.x.round().astype(int)
    return chosen
