"""Options of a second pass that a limit pays for: those of the next larger cost multiplier at which they are cheap enough."""

from __future__ import annotations

import torch
from torch import Tensor

from dfs_cli.control.base import Ceiling

# Multipliers tried besides the present one: how many, and the lowest and highest, in units of one over the mean cost of a
# block at its dearest.
_RUNGS, _LOWEST, _HIGHEST = 16, 1 / 16, 256.0
_HOPELESS = 1e30  # more than any score; finite in single precision


def charges(multiplier: Tensor, costs: Tensor, ceiling: Ceiling) -> Tensor:
    """What is subtracted from the scores of options, (R, L, K) for R rungs: their costs at multipliers that rise from the
    present one on; at the last rung, nothing from the cheapest options and more than any score from the others.

    Args:
        multiplier: the present one, (), in double precision.
        costs: (L, K), of the options.
        ceiling: the dearest options that the blocks may have.
    """
    unit = 1 / costs.max(dim=1).values.mean()
    low = torch.maximum(multiplier, unit * _LOWEST)
    rise = (unit * _HIGHEST / low).clamp_min(2.0)
    rising = low * rise ** torch.linspace(0, 1, _RUNGS, dtype=low.dtype, device=low.device)
    multipliers = torch.cat([multiplier[None], rising])
    extras, _ = ceiling.extras(costs)
    return torch.cat([multipliers[:, None, None] * costs, _HOPELESS * (extras > 0)[None]])


def affordable_scores(
    scores: Tensor, multiplier: Tensor, costs: Tensor, ceiling: Ceiling, most: Tensor | None
) -> Tensor:
    """``scores`` (M, L, K), less the charges of the first rung whose best options cost no more than ``most`` together; options
    above the ceiling have none.

    Args:
        multiplier, costs, ceiling: see :func:`charges`.
        most: (), no less than the cheapest options cost; None: there is no limit.
    """
    if most is None:
        return (scores - multiplier * costs.to(scores.dtype)).masked_fill(ceiling.forbidden(), -torch.inf)
    rungs = scores[:, None] - charges(multiplier, costs, ceiling).to(scores.dtype)
    rungs = rungs.masked_fill(ceiling.forbidden(), -torch.inf)
    total = costs[torch.arange(len(costs), device=scores.device), rungs.argmax(dim=3)].sum(dim=2)
    first = (total <= most).byte().argmax(dim=1)
    return rungs[torch.arange(len(rungs), device=scores.device), first]
