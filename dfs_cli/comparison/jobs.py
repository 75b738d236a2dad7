"""Which networks a sweep tunes, and with which settings."""

from __future__ import annotations

import dataclasses
from typing import Any

from dfs_cli.comparison.config import SweepConfig
from dfs_cli.config import DynamicConfig
from dfs_cli.presets import PRESETS

UNIFORM_BITS = (8, 6, 5, 4, 3, 2)
"""Bitwidths of the uniform static networks."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One network to tune; a uniform one has ``bits``, every other one a ``budget``. A static one may have two ``views``."""

    method: str
    seed: int
    budget: float | None = None
    bits: int | None = None
    views: int = 1

    @property
    def network(self) -> str:
        """What is tuned, whatever the seed."""
        views = f" {self.views} views" if self.views > 1 else ""
        return f"{self.method} {f'{self.bits} bit' if self.bits else f'{self.budget:g}'}{views}"

    @property
    def name(self) -> str:
        return f"{self.network}, seed {self.seed}"

    def matches(self, point: dict[str, Any]) -> bool:
        """Whether a point of the results is of this job."""
        return all(point[key] == value for key, value in dataclasses.asdict(self).items())


def jobs(config: SweepConfig, seed: int) -> list[Job]:
    """The networks to tune, dynamic ones first; a cascade uses the static ones."""
    planned = [Job("dfs", seed, budget=budget) for budget in config.budgets]
    views = range(1, config.views + 1)
    if "uniform" in config.baselines or "cascade" in config.baselines:
        planned += [Job("uniform", seed, bits=bits, views=count) for count in views for bits in UNIFORM_BITS]
    if "mixed" in config.baselines:
        planned += [Job("mixed", seed, budget, views=count) for count in views for budget in config.budgets]
    if "skipnet" in config.baselines:
        planned += [Job("skipnet", seed, budget) for budget in config.budgets]
    return planned


def settings(job: Job, config: SweepConfig) -> tuple[float, DynamicConfig, bool]:
    """A job's budget, options and gate, and whether the budget is to be spent."""
    fixed_bits = static_fixed_bits(config)
    mirror = job.views > 1
    if job.bits is not None:
        return 1.0, DynamicConfig((job.bits,), fixed_bits, gate="static", mirror=mirror), False
    assert job.budget is not None, "all but uniform networks have one"
    if job.method == "dfs":
        return job.budget, config.dynamic[job.budget], config.spend
    if job.method == "skipnet":
        preset = PRESETS["skipnet"]
        return job.budget, DynamicConfig(preset.bits, preset.fixed_bits, gate="rnn"), True
    # A rival may use all of the budget.
    return job.budget, DynamicConfig(PRESETS["static"].bits, fixed_bits, gate="static", mirror=mirror), True


def static_fixed_bits(config: SweepConfig) -> int:
    """Bitwidth of the fixed layers of static networks: the widest among the dynamic ones."""
    return max(settings.fixed_bits for settings in config.dynamic.values())
