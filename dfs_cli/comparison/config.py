"""What a sweep compares. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from dfs_cli.config import Budget
from dfs_cli.errors import ConfigError
from dfs_cli.validation import Json, validated

Baseline = Literal["uniform", "mixed", "skipnet", "cascade"]

BASELINES: tuple[Baseline, ...] = get_args(Baseline)
"""What a sweep can compare dynamic networks with."""


@validated
class SweepConfig(Json):
    """What a sweep compares.

    Args:
        budgets: of the dynamic networks, and of the baselines that have one. None are given: those at which uniform static
            networks have lost 0.5, 1, 2 and 4 points of top-1, which are tuned first.
        baselines: some of ``uniform``, ``mixed``, ``skipnet``, ``cascade``.
        seeds: how many repetitions, from the tuning settings' seed on, of the dynamic networks and, at each budget, of the two
            best baselines; the others have one.
        views: 2: static networks that see every image twice, once mirrored, and pay for both, are baselines, too.
        spend: reach for the budget itself, as ``dfs convert --spend``.

    Raises:
        ConfigError: a value is of another type or out of range.

    Example:
        >>> import dfs_cli
        >>> dfs_cli.SweepConfig(budgets=(0.03, 0.03))
        Traceback (most recent call last):
        ...
        dfs_cli.errors.ConfigError: a budget is given twice
    """

    budgets: tuple[Budget, ...] = ()
    baselines: tuple[Baseline, ...] = BASELINES
    seeds: Annotated[int, Field(ge=1, le=10**4)] = 1
    views: Annotated[int, Field(ge=1, le=2)] = 1
    spend: bool = False

    def __post_init__(self) -> None:
        if len(set(self.budgets)) != len(self.budgets):
            raise ConfigError("a budget is given twice")
