"""Costs in a unit of their own, time or energy, on some device: measured, or written by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from dfs_cli.config import GateKind
from dfs_cli.errors import ConfigError
from dfs_cli.validation import Json, parse_json, validated

DOMINATED = 0.02
"""An option that a wider one exceeds by no more than this share of its cost is not worth keeping: as much as times are off."""

STATIC_BITS = 8
"""Of ``static_int8``."""

_LARGEST = 2**24
"""Characters of a file at most."""

Cost = Annotated[float, Field(ge=0, le=1e12)]
Text = Annotated[str, Field(min_length=1, max_length=200)]


@validated
class ViewCosts(Json):
    """What a pass costs that sees smaller images; see :class:`DeviceCosts` for the arguments that are not here.

    Args:
        scale: height and width of the images, as a share of the full ones.
    """

    scale: Annotated[float, Field(gt=0, lt=1)]
    blocks: Annotated[dict[Text, tuple[Cost, ...]], Field(min_length=1)]
    fixed: Cost


@validated
class DeviceCosts(Json):
    """What a network's parts cost on a device, for one image, all in the same unit.

    Args:
        model: architecture, for people.
        image_size: (C, H, W).
        unit: of all costs, as ``ms`` or ``mJ``.
        measured: whether they were measured; else they were written by hand or computed.
        machine: what they hold for: processor, runtime, threads.
        options: the K bitwidths, ascending.
        blocks: by name, what each option of a block adds to ``fixed``, (K,).
        fixed: what a pass costs in any case: stem, shortcuts and head.
        dense: of the whole dense network in float32: budgets are fractions of it.
        static_int8: of the whole network, quantized to 8 bits by other means; None: not known.
        deciding: by gate, what deciding costs in each of P passes: in any case, and for each block that runs. Measured between
            the options that :meth:`useful` keeps.
        smaller: the same for a first pass that sees smaller images, of different scales.
        crowding: by which share of its cost a block is dearer in a second pass where the first one ran it, too: its weights
            lie in memory twice, and caches hold less.
        error: the largest relative difference between predicted and measured costs, on policies that the costs were not
            fitted to; None: not measured.

    Raises:
        ConfigError: a value is of another type or out of range, or lengths do not agree.

    Example:
        >>> import dfs_cli
        >>> blocks = {"layer1.0": (0.0, 2.0, 2.0), "layer1.1": (0.0, 2.5, 2.5)}
        >>> costs = dfs_cli.DeviceCosts("resnet", (3, 8, 8), "mJ", False, {}, (0, 4, 8), blocks, fixed=1.0, dense=16.0)
        >>> costs.useful((0, 4, 8))
        (0, 8)
    """

    model: Text
    image_size: tuple[int, int, int]
    unit: Text
    measured: bool
    machine: dict[Text, Text]
    options: Annotated[tuple[int, ...], Field(min_length=1)]
    blocks: Annotated[dict[Text, tuple[Cost, ...]], Field(min_length=1)]
    fixed: Cost
    dense: Annotated[float, Field(gt=0, le=1e12)]
    static_int8: Cost | None = None
    deciding: dict[GateKind, Annotated[tuple[tuple[Cost, Cost], ...], Field(min_length=1, max_length=2)]] = (
        dataclasses.field(default_factory=dict)
    )
    smaller: tuple[ViewCosts, ...] = ()
    crowding: Cost = 0.0
    error: Cost | None = None

    def __post_init__(self) -> None:
        if list(self.options) != sorted(set(self.options)):
            raise ConfigError("options: expected different bitwidths in ascending order")
        for blocks in (self.blocks, *(view.blocks for view in self.smaller)):
            for name, costs in blocks.items():
                if len(costs) != len(self.options):
                    raise ConfigError(f"blocks.{name}: {len(costs)} costs for {len(self.options)} options")
            if blocks.keys() != self.blocks.keys():
                raise ConfigError("smaller: the costs are of other blocks")
        if len(set(self.scales)) != len(self.scales):
            raise ConfigError("smaller: a scale is repeated")

    @property
    def scales(self) -> tuple[float, ...]:
        """Of the smaller images whose costs are known."""
        return tuple(view.scale for view in self.smaller)

    def at(self, scale: float) -> DeviceCosts | ViewCosts:
        """The costs of a pass that sees images of a scale.

        Raises:
            ConfigError: they are not known.
        """
        for view in self.smaller:
            if view.scale == scale:
                return view
        if scale != 1:
            known = ", ".join(f"{known:g}" for known in (1, *self.scales))
            raise ConfigError(
                f"the costs say nothing about a first view of {scale:g}, only of {known}: measure it, too"
            )
        return self

    def useful(self, options: Sequence[int]) -> tuple[int, ...]:
        """Of some options, those that no wider one is as cheap as, over all blocks.

        Raises:
            ConfigError: an option has no cost.
        """
        totals = dict(zip(options, map(self._total, options), strict=True))
        return tuple(
            bits
            for bits, total in totals.items()
            if all(wider <= bits or other > (1 + DOMINATED) * total for wider, other in totals.items())
        )

    def _total(self, bits: int) -> float:
        if bits not in self.options:
            known = ",".join(map(str, self.options))
            raise ConfigError(f"the costs have no option of {bits} bits, only {known}: measure or write them with it")
        column = self.options.index(bits)
        return sum(costs[column] for costs in self.blocks.values())

    def narrowed(self, options: Sequence[int], gate: GateKind, scale: float = 1.0) -> DeviceCosts:
        """The costs of some options, one gate and one size of the first pass's images alone.

        Raises:
            ConfigError: one of them has no cost.
        """
        if gate != "static" and gate not in self.deciding:
            known = ", ".join(("static", *self.deciding))
            raise ConfigError(
                f"the costs say nothing about --gate {gate}, only about {known}: measure or write them with it"
            )
        for bits in options:
            self._total(bits)
        columns = [self.options.index(bits) for bits in options]

        def of(blocks: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
            return {name: tuple(costs[i] for i in columns) for name, costs in blocks.items()}

        view = self.at(scale)
        return self.replace(
            options=tuple(options),
            blocks=of(self.blocks),
            deciding={} if gate == "static" else {gate: self.deciding[gate]},
            smaller=() if view is self else (view.replace(blocks=of(view.blocks)),),
        )


def read_costs(path: Path) -> DeviceCosts:
    """The costs in a JSON file.

    Raises:
        ConfigError: it cannot be read, or does not hold costs; the message names the first problem.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if len(text) > _LARGEST:
            raise ValueError(f"it is longer than {_LARGEST} characters")
        return DeviceCosts.from_dict(_object(parse_json(text)))
    except OSError as error:
        raise ConfigError(f"costs {path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"costs {path}: {error}") from None


def _object(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError("expected a JSON object")
    return values
