"""The best static mix of bitwidths under a cost: one option per block, the same for every image."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from dfs_cli.cost.table import CostTable
from dfs_cli.errors import ConfigError


def best_static_mix(table: CostTable, damage: Tensor, cost: float) -> Tensor:
    """Options (L,) of least total damage that cost at most ``cost``, without a gate.

    An integer program over one choice per block, solved exactly (HiGHS, by SciPy). Damages of blocks are taken to add up, as
    in HAWQ-V3 (Yao et al., 2021).

    Args:
        damage: (L, K), what each option of each block does to the predictions alone.
        cost: as a fraction of the dense network's.

    Raises:
        ConfigError: the cheapest options cost more.
    """
    blocks, options = damage.shape
    prices = table.prices.numpy()
    spendable = cost - table.edges_cost
    if prices.min(axis=1).sum() > spendable * (1 + 1e-9):
        raise ConfigError(f"no static mix of these options costs {cost:g} or less")
    one_each = np.kron(np.eye(blocks), np.ones(options))
    # Costs as shares of the largest: the solver's tolerances are absolute.
    scale = prices.max(axis=1).sum()
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(prices.reshape(1, -1) / scale, -np.inf, spendable / scale + 1e-12),
    ]
    objective = damage.double().cpu().numpy().ravel()
    # Of equal damages the cheaper one is taken.
    objective = objective / max(objective.max(), 1e-12) + 1e-9 * prices.ravel() / prices.max()
    solution = milp(objective, constraints=constraints, integrality=np.ones(blocks * options), bounds=Bounds(0, 1))
    if not solution.success:
        raise ConfigError(f"no static mix of these options costs {cost:g} or less: {solution.message}")
    return torch.from_numpy(solution.x.reshape(blocks, options).argmax(axis=1))
