"""What a conversion gives."""

from __future__ import annotations

from typing import NamedTuple

from dfs_cli.artifact.manifest import Manifest
from dfs_cli.nn.network import DynamicResNet


class Converted(NamedTuple):
    """A dynamic network and all that is known about it.

    Args:
        network: in evaluation mode.
        manifest: its description.

    Example:
        >>> import dfs_cli
        >>> tuning = dfs_cli.TuningConfig(steps=1, batch_size=64, hflip=0.0)
        >>> network, manifest = dfs_cli.convert("resnet20_digits", 0.1, tuning=tuning)
        >>> manifest.architecture, network.bits == manifest.dynamic.bits
        ('resnet20_digits', True)
    """

    network: DynamicResNet
    manifest: Manifest

    @property
    def keeps_budget(self) -> bool | None:
        """Whether the cost on the validation split keeps the budget; None: there is none, or nothing was measured."""
        return self.manifest.keeps_budget
