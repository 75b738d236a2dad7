"""What a sweep compares. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, get_args

from pydantic import Field

from dfs_cli.config import Budget, DynamicConfig
from dfs_cli.errors import ConfigError
from dfs_cli.validation import Json, validated

Baseline = Literal["uniform", "mixed", "skipnet", "cascade"]

BASELINES: tuple[Baseline, ...] = get_args(Baseline)
"""What a sweep can compare dynamic networks with."""


@validated
class SweepConfig(Json):
    """What a sweep compares.

    Args:
        budgets: of the dynamic networks, and of the baselines that have one.
        baselines: some of ``uniform``, ``mixed``, ``skipnet``, ``cascade``.
        seeds: how many repetitions, from the tuning settings' seed on.
        views: 2: static networks that see every image twice, once mirrored, and pay for both, are baselines, too.
        dynamic: options and gate of the dynamic network for a budget; where there is none, those that a conversion uses.
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

    budgets: Annotated[tuple[Budget, ...], Field(min_length=1)]
    baselines: tuple[Baseline, ...] = BASELINES
    seeds: Annotated[int, Field(ge=1, le=10**4)] = 1
    views: Annotated[int, Field(ge=1, le=2)] = 1
    dynamic: dict[float, DynamicConfig] = dataclasses.field(default_factory=dict)
    spend: bool = False

    def __post_init__(self) -> None:
        if len(set(self.budgets)) != len(self.budgets):
            raise ConfigError("a budget is given twice")
