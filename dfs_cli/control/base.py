"""What a controller is: everything that a method of deciding knows, in one interface."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from enum import Enum
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from dfs_cli.cost.decisions import Decisions
from dfs_cli.cost.operating_point import OperatingPoint
from dfs_cli.cost.table import CostTable
from dfs_cli.distributed import of_all
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.passes import Output, TuningTarget, View
from dfs_cli.presets import FULL_BITS

Tell = Callable[[float, float], None]
"""Told an operating point (or cost multiplier) that was tried, and the mean cost at it."""

_MACS = 2e12  # about a minute on a few CPU cores


class Need(Enum):
    """What a controller needs to have measured before tuning."""

    BLOCKS = "what each option of each block does to the predictions"
    BLOCKS_AND_LAYERS = "that, and what each bitwidth of each single layer does"


class Sensitivity(NamedTuple):
    """What options do to the predictions, one at a time, while all else runs at its widest: Kullback-Leibler divergences in
    nats.

    Args:
        blocks: (L, K), of each option of each block.
        layers: (M, K), of each option of each layer of the blocks, in the cost table's order, infinite for skipping; None: not
            measured.
    """

    blocks: Tensor
    layers: Tensor | None = None


def affordable(images: Tensor, table: CostTable, runs: int) -> Tensor:
    """As many of ``images`` (N, C, H, W) as so many runs of the network take about a minute for, 16 at least."""
    return images[: affordable_images(table, runs, len(images))]


def affordable_images(table: CostTable, runs: int, images: int) -> int:
    """How many they are of so many."""
    return min(images, max(16, int(_MACS / (table.dense_macs * runs))))


class Request(NamedTuple):
    """What a conversion asks for.

    Args:
        budget: the mean cost of an image that is not to be exceeded.
        spend: reach for the budget itself, even where less does as well.
        held_out, images: how many images the operating point is set on, and how many it is to hold for.
        is_bound: no single image may cost more, whatever it shows: where there are no real images to estimate a mean from.
        limit: what no image may cost more than, whatever the budget; infinite: there is none.
    """

    budget: float
    spend: bool
    held_out: int
    images: int
    is_bound: bool = False
    limit: float = math.inf


class HeldOut(NamedTuple):
    """The images held out of training, as the operating point is set on them.

    Args:
        batches: (N, C, H, W) each, on the network's device; of several processes, each has a share of the images.
        targets: (N,) class indices of all of them, of all processes; None: not known.
    """

    batches: Sequence[Tensor]
    targets: Tensor | None = None

    def __len__(self) -> int:
        return sum(of_all(sum(len(batch) for batch in self.batches)))

    @torch.inference_mode()
    def measure(self, network: DynamicResNet, table: CostTable) -> tuple[Tensor, float | None]:
        """The costs (N,) of the images at the present operating point, and their top-1."""
        outputs = [network.run(images) for images in self.batches]
        costs = join_batches([table.cost(output.decisions) for output in outputs])
        return costs, self.top1(join_batches([output.logits.argmax(dim=1) for output in outputs]))

    def top1(self, answers: Tensor) -> float | None:
        """Percent of the images that ``answers`` (N,) are right for; None where classes are not known."""
        return None if self.targets is None else 100 * float((answers.cpu() == self.targets).double().mean())


def join_batches(values: Sequence[Tensor]) -> Tensor:
    """The values (N,) of all batches of all processes, in order, on the CPU."""
    parts = [torch.cat(list(values)).cpu()] if values else []
    return torch.cat([part for some in of_all(parts) for part in some])


class Controller(nn.Module, ABC):
    """What decides for each image which passes it takes and which option each block has in them.

    Args:
        table: costs of the network that it decides for.
        views: what each pass sees, one for each of its P passes.
    """

    needs: ClassVar[Need]
    """What must be measured before :meth:`start`."""
    limit: float = math.inf
    """No image costs more, or the cheapest decision where that alone costs more; infinite: there is no limit."""
    option_costs: Tensor

    def __init__(self, table: CostTable, views: tuple[View, ...]) -> None:
        super().__init__()
        self.views = views
        self.bits, self.blocks = table.options, len(table.blocks)
        self.fixed_costs = tuple(map(table.fixed_cost, range(table.passes)))
        self.register_buffer("option_costs", table.option_costs.clone(), persistent=False)

    @abstractmethod
    def run(
        self,
        network: DynamicResNet,
        images: Tensor,
        decisions: Decisions | None = None,
        target: TuningTarget | None = None,
    ) -> Output:
        """Decide for ``images`` (N, C, H, W), or follow ``decisions``, and run what was decided; see
        :meth:`dfs_cli.nn.network.DynamicResNet.run`."""

    @property
    @abstractmethod
    def operating_point(self) -> float:
        """The number that moves a tuned network along its curve of accuracy and cost."""

    @operating_point.setter
    @abstractmethod
    def operating_point(self, value: float) -> None: ...

    @property
    @abstractmethod
    def cost_multiplier(self) -> float:
        """The Lagrange multiplier of the budget: what a unit of cost counts against the scores of options."""

    @cost_multiplier.setter
    @abstractmethod
    def cost_multiplier(self, value: float) -> None: ...

    def candidates(self, table: CostTable, sensitivity: Sensitivity | None, request: Request) -> list[CostTable]:
        """The cost tables of the networks that are worth making; of several, the one that is closest to the original before
        tuning is tuned. The table itself where there is nothing to choose before tuning.

        Raises:
            ConfigError: the budget cannot be reached.
        """
        return [table]

    @abstractmethod
    def start(
        self,
        network: DynamicResNet,
        table: CostTable,
        sensitivity: Sensitivity | None,
        request: Request,
        sample: Tensor,
    ) -> TuningTarget:
        """Start from what was measured, and say what to tune for.

        Args:
            sample: held-out images (N, C, H, W).
        """

    def settle(self, table: CostTable) -> CostTable:
        """The costs where this controller decides, once it has started: ``table``, or one that is more exact."""
        return table

    def uses_hard_crops(self, spend: bool) -> bool:
        """Whether the operating point is set on harder crops than those of training: where it is a matter of confidence or
        accuracy, of which the original has too much on images it has been trained on.

        Args:
            spend: see :class:`Request`.
        """
        return False

    def policies(self) -> list[Tensor]:
        """Policies, (L,) each, that together run every layer at each of its bitwidths but floating point."""
        return [torch.full((self.blocks,), i) for i, bits in enumerate(self.bits) if bits != FULL_BITS]

    def first_policy(self) -> Tensor | None:
        """The options (L,) that all images begin tuning with; None: different ones, or all blocks in full."""
        return None

    @abstractmethod
    def set_operating_point(
        self,
        network: DynamicResNet,
        table: CostTable,
        held_out: HeldOut,
        request: Request,
        tell: Tell = lambda value, cost: None,
    ) -> OperatingPoint:
        """Set the operating point so that the mean cost keeps the budget, on the held-out images and on others like them.

        Without ``request.spend`` less is spent where more gains nothing on the held-out images.

        Args:
            tell: called with each operating point or cost multiplier that is tried, and the mean cost at it.
        """

    @abstractmethod
    def movable(self, table: CostTable) -> tuple[float, float]:
        """The least and the largest mean cost that a tuned network can be moved to without tuning, under its limit."""

    def largest_cost(self, table: CostTable) -> float:
        """The largest cost that an image can have at the present operating point, whatever it shows."""
        return self.movable(table)[1]

    def check(self, table: CostTable) -> None:
        """Check what was loaded from a file.

        Raises:
            ValueError: the controller cannot decide by its state, or cannot have these costs.
        """
        if table.layer_bits:
            raise ValueError("only a static network has bitwidths of single layers")

    def freeze(self) -> None:
        """Round the parameters to what half precision can hold, once tuning is done."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(parameter.half())

    @abstractmethod
    def force(self, policies: Tensor) -> None:
        """Decide for ``policies`` from now on, whatever is seen, with all the work of deciding for one pass.

        Args:
            policies: (N, L), for the images of a batch in turn, and the first one where all images of a batch have the same
                decisions; or (L,), for all images.
        """


class Ceiling(nn.Module):
    """The dearest option that each block may have where images are decided on one by one.

    Args:
        blocks, options: L and K.

    ``highest`` (L,) holds option indices; at first, the last ones.
    """

    highest: Tensor

    def __init__(self, blocks: int, options: int) -> None:
        super().__init__()
        self.options = options
        self.register_buffer("highest", torch.full((blocks,), options - 1))

    def forbidden(self) -> Tensor:
        """Which options are dearer, (L, K)."""
        return torch.arange(self.options, device=self.highest.device) > self.highest[:, None]

    def extras(self, costs: Tensor) -> tuple[Tensor, Tensor]:
        """What options cost more than a block's cheapest one that is allowed, (L, K), and the sum of the cheapest ones.

        Args:
            costs: (L, K), of a pass.
        """
        least = costs.masked_fill(self.forbidden(), torch.inf).min(dim=1, keepdim=True).values
        return costs - least, least.sum()

    def cost(self, table: CostTable, index: int) -> float:
        """The cost of a pass with every block at its dearest."""
        costs = table.option_costs[index].masked_fill(self.forbidden().cpu(), 0.0)
        return table.fixed_cost(index) + float(costs.max(dim=1).values.sum())

    def check(self) -> None:
        """Raises ValueError where an option is none of those there are."""
        if not torch.equal(self.highest, self.highest.clamp(0, self.options - 1)):
            raise ValueError(f"controller.ceiling: an option is none of the {self.options} there are")


def controller_of(network: DynamicResNet) -> Controller:
    """The controller of ``network``, which knows no more of it than how to run."""
    return cast(Controller, network.controller)
