"""What a run tells while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dfs_cli.records import StepRecord

if TYPE_CHECKING:
    from dfs_cli.config import Configuration
    from dfs_cli.cost.table import CostTable

MEASURING, REFITTING = "measuring", "refitting layers"
VARIED_STAGES = (MEASURING, REFITTING)
"""Stages that do one thing after the other, where the others do the same thing for each batch."""


class Observer:
    """Told what a conversion or an evaluation does; override what you want to show.

    Example:
        >>> import dfs_cli
        >>> class Stages(dfs_cli.Observer):
        ...     def stage(self, name, total):
        ...         print(name)
        >>> tuning = dfs_cli.TuningConfig(steps=1, batch_size=64, hflip=0.0)
        >>> _ = dfs_cli.convert("resnet20_digits", 0.1, tuning=tuning, observer=Stages())
        loading held-out images
        measuring
        original
        tuning
        loading held-out images
        setting the operating point
        validation
    """

    def job(self, name: str) -> None:
        """One of several conversions begins."""

    def configured(self, configuration: Configuration, table: CostTable) -> None:
        """Everything is resolved; nothing has run yet."""

    def stage(self, name: str, total: int | None) -> None:
        """A stage of ``total`` units begins (None: not known)."""

    def advance(self, units: int) -> None:
        """Units of the stage are done."""

    def step(self, record: StepRecord) -> None:
        """A tuning step is done."""

    def estimate(self, seconds: float) -> None:
        """So long will the rest of tuning take on this machine, by its first steps."""

    def tried(self, value: float, cost: float) -> None:
        """An operating point, or cost multiplier, was tried on the held-out images, and gave this mean cost."""

    def note(self, text: str) -> None:
        """Something that the user should know."""
