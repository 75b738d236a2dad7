"""The only place that knows all controllers."""

from __future__ import annotations

from collections.abc import Sequence

from dfs_cli.config import DynamicConfig
from dfs_cli.control.base import Controller
from dfs_cli.control.gated import GatedController
from dfs_cli.control.gates import FeedForwardGate, RecurrentGate, SecondPassGate
from dfs_cli.control.probe import ProbeController
from dfs_cli.control.static import StaticController
from dfs_cli.cost.device import DeviceCosts
from dfs_cli.cost.table import CostTable

_GATES = {"rnn": RecurrentGate, "ff": FeedForwardGate}


def alternatives(config: DynamicConfig, costs: DeviceCosts | None) -> list[DynamicConfig]:
    """The settings of the networks that may do what ``config`` asks for, the first one as it does.

    On a device they are those of a static one, which comes last, and of several sizes of the images that a first pass sees. In
    time, deciding costs more than it saves in a second pass.

    Args:
        costs: on the device; None: MACs count.
    """
    if config.gate != "probe" or costs is None:
        return [config]
    scales = (1.0, *costs.scales) if config.first_view is None else (config.first_view,)
    static = config.replace(gate="static", mirror=False, alike=False, first_view=None)
    return [*(config.replace(alike=costs.measured, first_view=scale) for scale in scales), static]


def controller_macs(config: DynamicConfig, channels: Sequence[int], features: int) -> tuple[tuple[int, ...], ...]:
    """What deciding costs, in MACs (P, L): in each pass, before each block.

    Args:
        channels: width of the features that enter each block.
        features: width of those that enter the classifier.
    """
    nothing = ((0,) * len(channels),)
    if config.gate == "static":
        return nothing * compulsory_passes(config)
    if config.gate == "probe" and config.alike:
        return nothing * 2
    if config.gate == "probe":
        return (0,) * len(channels), SecondPassGate.macs(channels, features, config)
    return (_GATES[config.gate].macs(channels, config),)


def compulsory_passes(config: DynamicConfig) -> int:
    """How many passes every image takes."""
    return 1 + config.mirror if config.gate == "static" else 1


def create_controller(config: DynamicConfig, table: CostTable, channels: Sequence[int], features: int) -> Controller:
    """The controller that ``config`` names, for a network of these costs; arguments as for :func:`controller_macs`."""
    if config.gate == "static":
        return StaticController(table, config.mirror)
    if config.gate == "probe":
        gate = None if config.alike else SecondPassGate(channels, features, config)
        return ProbeController(table, gate, config.mirror, config.first_scale)
    return GatedController(table, _GATES[config.gate](channels, config))
