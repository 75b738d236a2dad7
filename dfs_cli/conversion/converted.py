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
    """

    network: DynamicResNet
    manifest: Manifest

    @property
    def keeps_budget(self) -> bool | None:
        """Whether the cost on the validation split keeps the budget; None: there is none, or nothing was measured."""
        return self.manifest.keeps_budget
