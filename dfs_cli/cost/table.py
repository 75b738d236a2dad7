"""The cost table: the one source of every figure about cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dfs_cli.config import GateKind
from dfs_cli.cost.decisions import NOT_RUN, Decisions
from dfs_cli.cost.device import STATIC_BITS, DeviceCosts
from dfs_cli.cost.layer import LayerCost, Macs
from dfs_cli.cost.operating_point import HIGHEST_SHARE, LOWEST_SHARE
from dfs_cli.cost.weighting import UNIT, in_steps, mac_cost
from dfs_cli.errors import ConfigError
from dfs_cli.validation import Json, validated


@validated
class CostTable(Json):
    """Cost of the whole network, as a fraction of the dense one's: in the unit of :mod:`dfs_cli.cost.weighting`, or in that of
    a device.

    Args:
        options: the K bitwidths, ascending.
        blocks: names of the L blocks.
        layers: every layer with MACs, in the order of the network.
        controller_macs: (P, L), MACs at 32 bits of deciding before each block, for an image that takes the pass; the dense
            network has none.
        not_counted: operations that have no MACs, and how often they occur.
        device: costs on a device, of these options and this controller, in place of MACs; None: MACs count.
        first_view: height and width of the images that the first pass sees, as a share of the full ones.
        first_runs: (L,), whether the first pass of every image runs a block, which makes it dearer in a second one on a device;
            empty: it may run any.
        compulsory_passes: how many passes every image takes.

    Raises:
        ConfigError: lengths or indices do not agree.

    Example:
        >>> import torch
        >>> import dfs_cli
        >>> table = dfs_cli.plan("resnet20_digits", dfs_cli.DynamicConfig(bits=(0, 8), gate="static"))
        >>> policy = torch.ones(len(table.blocks), dtype=torch.long)
        >>> table.cost(dfs_cli.Decisions.alike(policy, images=2)).round(decimals=6).tolist()
        [0.0625, 0.0625]
    """

    options: tuple[int, ...]
    blocks: tuple[str, ...]
    layers: tuple[LayerCost, ...]
    controller_macs: Annotated[tuple[tuple[Macs, ...], ...], Field(min_length=1)]
    not_counted: dict[str, Annotated[int, Field(ge=0, lt=2**63)]] = dataclasses.field(default_factory=dict)
    device: DeviceCosts | None = None
    first_view: Annotated[float, Field(gt=0, le=1)] = 1.0
    first_runs: tuple[bool, ...] = ()
    compulsory_passes: Annotated[int, Field(ge=1)] = 1

    def __post_init__(self) -> None:
        if any(len(row) != len(self.blocks) for row in self.controller_macs):
            raise ConfigError("the cost table has another number of blocks than its controller")
        if self.compulsory_passes > self.passes:
            raise ConfigError("the cost table has more passes that every image takes than passes")
        if any(layer.block is not None and layer.block >= len(self.blocks) for layer in self.layers):
            raise ConfigError("the cost table has a layer of a block that is not there")
        if any(layer.block is None and layer.bits is None for layer in self.layers):
            raise ConfigError("the cost table has a fixed layer without a bitwidth")
        if not sum(layer.macs for layer in self.layers):
            raise ConfigError("the cost table has no MACs")
        if not self.options or not self.blocks:
            raise ConfigError("the cost table has no options or no blocks")
        if self.first_runs and len(self.first_runs) != len(self.blocks):
            raise ConfigError("the cost table has another number of blocks than its first pass")
        if {layer.block for layer in self.layers} - {None} != set(range(len(self.blocks))):
            raise ConfigError("the cost table has a block without layers")
        if not set(self.layer_bits.values()) <= set(self.options):
            raise ConfigError("the cost table has a layer with a bitwidth that is no option")
        skipped = {layer.block for layer in self.layers if layer.block is not None and layer.bits == 0}
        if any(layer.block in skipped and layer.bits != 0 for layer in self.layers):
            raise ConfigError("the cost table has a block that is skipped in part")
        if self.device is not None:
            self._check_device(self.device)

    def _check_device(self, costs: DeviceCosts) -> None:
        if costs.blocks.keys() != set(self.blocks):
            raise ConfigError(f"the costs are of other blocks than the network's, which are {', '.join(self.blocks)}")
        if costs.options != self.options:
            raise ConfigError("the costs are of other options than the network's")
        passes = {len(deciding) for deciding in costs.deciding.values()}
        is_missing = not passes and self.passes > self.compulsory_passes
        if is_missing or len(costs.deciding) > 1 or not passes <= {self.passes}:
            raise ConfigError(f"the costs of deciding are not those of one gate with {self.passes} passes")
        if not costs.fixed and not any(map(any, costs.blocks.values())):
            raise ConfigError("the costs are all zero")
        costs.at(self.first_view)

    @property
    def passes(self) -> int:
        """P: how many passes an image may take."""
        return len(self.controller_macs)

    @cached_property
    def dense_macs(self) -> int:
        """MACs of the dense network for one image."""
        return sum(layer.macs for layer in self.layers)

    @cached_property
    def block_macs(self) -> tuple[int, ...]:
        """MACs of each block's residual branch, (L,)."""
        totals = [0] * len(self.blocks)
        for layer in self.layers:
            if layer.block is not None:
                totals[layer.block] += layer.macs
        return tuple(totals)

    @property
    def unit(self) -> str:
        """Of every cost and budget, for people."""
        if self.device is None:
            return UNIT
        return f"{self.device.unit}, as a fraction of the dense float32 network's {self.device.dense:.4g} {self.device.unit}"

    @property
    def scale(self) -> str:
        """What a cost is a fraction of, in short."""
        return "dense 32-bit" if self.device is None else f"dense 32-bit in {self.device.unit}"

    @cached_property
    def option_costs(self) -> Tensor:
        """Cost of each option of each block in each pass, (P, L, K) in float64."""
        if self.device is None:
            first, full = (self._options_of(is_first) for is_first in (True, False))
            return in_steps(torch.stack([first] + [full] * (self.passes - 1)))
        first, full = (self._on_device(is_first) for is_first in (True, False))
        runs = torch.tensor([bool(b) for b in self.options], dtype=torch.float64)
        per_block = torch.tensor([per_block for _, per_block in self._deciding], dtype=torch.float64)
        again = torch.tensor(self.first_runs or (True,) * len(self.blocks), dtype=torch.float64)[:, None]
        passes = [first] + [full * (1 + self.device.crowding * again)] * (self.passes - 1)
        return in_steps((torch.stack(passes) + per_block[:, None, None] * runs) / self.device.dense)

    def _on_device(self, is_first: bool) -> Tensor:
        """What each option of each block costs on the device, (L, K), in its unit, nothing decided; see :meth:`_options_of`."""
        assert self.device is not None, "asked for where there are its costs"
        blocks = self.device.at(self.first_view if is_first else 1.0).blocks
        return torch.tensor([blocks[name] for name in self.blocks], dtype=torch.float64)

    def _options_of(self, is_first: bool) -> Tensor:
        """Bit-weighted MACs of each option of each block, as fractions, in the first pass or in one that sees the full images,
        (L, K)."""
        options = torch.tensor([mac_cost(b) for b in self.options], dtype=torch.float64)
        option_macs, individual_costs = [0] * len(self.blocks), [0.0] * len(self.blocks)
        for layer in self.layers:
            if layer.block is not None and layer.bits is None:
                option_macs[layer.block] += layer.macs_in(is_first)
            elif layer.block is not None and layer.bits is not None:
                individual_costs[layer.block] += layer.macs_in(is_first) * mac_cost(layer.bits)
        runs = torch.tensor([bool(b) for b in self.options], dtype=torch.float64)
        costs = torch.tensor(option_macs, dtype=torch.float64)[:, None] / self.dense_macs * options
        return costs + torch.tensor(individual_costs, dtype=torch.float64)[:, None] / self.dense_macs * runs

    @cached_property
    def controller_costs(self) -> tuple[float, ...]:
        """Cost of deciding in each pass, (P,)."""
        if self.device is not None:
            return tuple(in_steps(always / self.device.dense) for always, _ in self._deciding)
        return tuple(in_steps(sum(row) / self.dense_macs) for row in self.controller_macs)

    @property
    def _deciding(self) -> tuple[tuple[float, float], ...]:
        """What deciding costs on the device in each pass: in any case, and for each block that runs."""
        nothing = ((0.0, 0.0),) * self.passes
        return nothing if self.device is None else next(iter(self.device.deciding.values()), nothing)

    @cached_property
    def fixed_layers_costs(self) -> tuple[float, ...]:
        """Cost of the fixed layers, which every pass runs, in each pass, (P,)."""
        return tuple(self._fixed_of(index == 0) for index in range(self.passes))

    def _fixed_of(self, is_first: bool) -> float:
        if self.device is not None:
            return in_steps(self.device.at(self.first_view if is_first else 1.0).fixed / self.device.dense)
        fixed = [layer for layer in self.layers if layer.block is None]
        macs = sum(layer.macs_in(is_first) * mac_cost(layer.bits) for layer in fixed if layer.bits)
        return in_steps(macs / self.dense_macs)

    def fixed_cost(self, index: int) -> float:
        """Cost of a pass for an image that takes it, whatever its blocks' options: fixed layers and controller."""
        return self.fixed_layers_costs[index] + self.controller_costs[index]

    @property
    def cheapest(self) -> float:
        """The smallest cost that any decision can have: of the passes that every image takes."""
        return sum(self.cheapest_pass(index) for index in range(self.compulsory_passes))

    @property
    def always(self) -> float:
        """What an image costs whatever is decided: fixed layers and controller of the passes that every image takes."""
        return sum(self.fixed_cost(index) for index in range(self.compulsory_passes))

    def cheapest_pass(self, index: int) -> float:
        """The smallest cost of a pass."""
        return self.fixed_cost(index) + float(self.option_costs[index].min(dim=1).values.sum())

    def dearest_pass(self, index: int) -> float:
        """The largest cost of a pass."""
        return self.fixed_cost(index) + float(self.option_costs[index].max(dim=1).values.sum())

    @property
    def dearest(self) -> float:
        """The largest cost that any decision can have: of all passes."""
        return sum(self.dearest_pass(index) for index in range(self.passes))

    def block_costs(self, decisions: Decisions) -> Tensor:
        """Cost of each block over all passes, (N, L) in float64."""
        return torch.stack([self._blocks_of(i, decisions.in_pass(i)) for i in range(decisions.passes)]).sum(dim=0)

    def _blocks_of(self, index: int, options: Tensor) -> Tensor:
        costs = self.option_costs[index].to(options.device)
        return costs.gather(1, options.clamp_min(0).T).T * (options != NOT_RUN)

    def cost(self, decisions: Decisions) -> Tensor:
        """Cost of each image, (N,) in float64."""
        total = self.block_costs(decisions).sum(dim=1)
        for index in range(decisions.passes):
            total = total + self.fixed_cost(index) * decisions.ran[:, index].double()
        return total

    def pass_cost(self, options: Tensor, index: int) -> Tensor:
        """Cost (N,) of a pass alone, with ``options`` (N, L)."""
        return self.fixed_cost(index) + self._blocks_of(index, options).sum(dim=1)

    def expected_pass_cost(self, probs: Tensor, index: int) -> Tensor:
        """Cost (N,) of a pass alone under option probabilities (N, L, K); differentiable."""
        costs = self.option_costs[index].to(device=probs.device, dtype=probs.dtype)
        return self.fixed_cost(index) + (probs * costs).sum(dim=(1, 2))

    def uniform_cost(self, bits: int) -> float:
        """Cost of the static network, without a controller, that runs everything at ``bits`` bits; on a device, at 8 bits that
        of static int8, where it is known, else at the widest option of no more bits."""
        if self.device is None:
            return mac_cost(bits)
        if bits == STATIC_BITS and self.device.static_int8 is not None:
            return self.device.static_int8 / self.device.dense
        column = max([i for i, option in enumerate(self.options) if option <= bits], default=0)
        return self._fixed_of(False) + float(self._on_device(False)[:, column].sum()) / self.device.dense

    def on_device(self, costs: DeviceCosts, gate: GateKind) -> CostTable:
        """The same network with costs on a device.

        Args:
            gate: whose deciding counts.

        Raises:
            ConfigError: the costs are of another network, of other options, or not of this gate.
        """
        return dataclasses.replace(self, device=costs.narrowed(self.options, gate, self.first_view))

    def most_in_one_pass(self, budget: float) -> float:
        """What a pass for all images may cost. Measured times are no more exact than the share by which a budget may be
        exceeded."""
        return budget * (HIGHEST_SHARE if self.device and self.device.measured else 1.0)

    def after(self, policy: Tensor) -> CostTable:
        """The costs where the first pass has the options ``policy`` (L,) for every image."""
        runs = tuple(self.options[i] > 0 for i in policy.tolist())
        return self if self.device is None else dataclasses.replace(self, first_runs=() if all(runs) else runs)

    def without_deciding(self) -> CostTable:
        """The costs of the same network with one pass for all images, in which nothing is decided."""
        device = self.device and self.device.narrowed(self.options, "static")
        layers = tuple(dataclasses.replace(layer, first_macs=None) for layer in self.layers)
        controller_macs = ((0,) * len(self.blocks),)
        return dataclasses.replace(
            self,
            layers=layers,
            controller_macs=controller_macs,
            device=device,
            first_view=1.0,
            first_runs=(),
            compulsory_passes=1,
        )

    def check_budget(self, budget: float, spend: bool = False, limit: float = math.inf) -> None:
        """Check that decisions can keep ``budget`` and, where it is to be spent, reach it, while no image costs more than
        ``limit``.

        Raises:
            ConfigError: they cannot; the message says what can be reached.
        """
        options = ",".join(map(str, self.options))
        if budget < self.cheapest:
            raise ConfigError(
                f"budget {budget:g} cannot be reached with options {options}: "
                f"the smallest reachable one is {math.ceil(self.cheapest * 1e4) / 1e4:.4f}"
            )
        if limit < self.cheapest:
            raise ConfigError(
                f"limit {limit:g} cannot be kept with options {options}: the cheapest decision costs more; "
                f"pass --limit {math.ceil(self.cheapest * 1e4) / 1e4:.4f} or more"
            )
        if spend and limit < LOWEST_SHARE * budget:
            raise ConfigError(
                f"budget {budget:g} cannot be spent where no image may cost more than {limit:g}: "
                f"pass a smaller --budget, a larger --limit, or leave --spend out"
            )
        if spend and LOWEST_SHARE * budget > self.dearest:
            raise ConfigError(
                f"budget {budget:g} cannot be spent with options {options}: they cost at most {self.dearest:.4f}; "
                f"pass a smaller --budget or wider --bits, or leave --spend out"
            )

    def with_layer_bits(self, bits: Mapping[str, int]) -> CostTable:
        """The costs with individual bitwidths of the blocks' layers, by layer name; 0: the block is skipped."""
        layers = tuple(
            layer if layer.block is None else dataclasses.replace(layer, bits=bits[layer.name]) for layer in self.layers
        )
        return dataclasses.replace(self, layers=layers)

    @property
    def layer_bits(self) -> dict[str, int]:
        """Individual bitwidths of layers of the blocks, by layer name; 0: the block is skipped."""
        return {layer.name: layer.bits for layer in self.layers if layer.block is not None and layer.bits is not None}
