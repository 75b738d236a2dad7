"""Which networks a sweep tunes, and with which settings."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from dfs_cli.comparison.config import SweepConfig
from dfs_cli.comparison.summary import of_first_seed, rivals
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

    @classmethod
    def of(cls, point: dict[str, Any]) -> Job:
        """The job of a point of the results.

        Raises:
            KeyError: it is no such point.
        """
        return cls(**{field.name: point[field.name] for field in dataclasses.fields(cls)})


def jobs(config: SweepConfig, seed: int) -> list[Job]:
    """The networks of the first seed, dynamic ones first, cascades, which use the static ones, last. Without a budget: those
    that a static network's curve is made of."""
    planned = [Job("dfs", seed, budget=budget) for budget in config.budgets]
    views = range(1, config.views + 1)
    if not config.budgets or {"uniform", "cascade"} & set(config.baselines):
        planned += [Job("uniform", seed, bits=bits, views=count) for count in views for bits in UNIFORM_BITS]
    if "mixed" in config.baselines:
        planned += [Job("mixed", seed, budget, views=count) for count in views for budget in config.budgets]
    for method in ("skipnet", "cascade"):
        if method in config.baselines:
            planned += [Job(method, seed, budget) for budget in config.budgets]
    return planned


def repeated_jobs(config: SweepConfig, results: dict[str, Any], seed: int) -> list[Job]:
    """The networks of another seed than the first: dynamic ones, and at each budget its rivals. Cascades, before which the
    networks must be there that they were made of, come last."""
    planned = [Job("dfs", seed, budget=budget) for budget in config.budgets]
    first = [Job.of(point) for point in of_first_seed(results["points"])]
    for rival in (rival for budget in config.budgets for rival in rivals(results, budget)):
        if rival["method"] in config.baselines:
            names = *rival.get("members", ()), Job.of(rival).network
            planned += [dataclasses.replace(job, seed=seed) for job in first if job.network in names]
    return sorted(dict.fromkeys(planned), key=lambda job: job.method == "cascade")


class Settings(NamedTuple):
    """What a network is tuned for: its budget, options and gate, and whether the budget is to be spent."""

    budget: float
    dynamic: DynamicConfig
    spend: bool


def settings(job: Job, dynamic: dict[float, DynamicConfig], spend: bool, fixed_bits: int) -> Settings:
    """What a job's network is tuned for.

    Args:
        dynamic: those of the dynamic network for each budget.
        spend: whether it is to spend the budget.
        fixed_bits: bitwidth of the fixed layers of static networks.
    """
    mirror = job.views > 1
    if job.bits is not None:
        return Settings(1.0, DynamicConfig((job.bits,), fixed_bits, gate="static", mirror=mirror), False)
    assert job.budget is not None, "all but uniform networks have one"
    if job.method == "dfs":
        return Settings(job.budget, dynamic[job.budget], spend)
    if job.method == "skipnet":
        preset = PRESETS["skipnet"]
        return Settings(job.budget, DynamicConfig(preset.bits, preset.fixed_bits, gate="rnn"), True)
    # A rival may use all of the budget.
    return Settings(job.budget, DynamicConfig(PRESETS["static"].bits, fixed_bits, gate="static", mirror=mirror), True)
