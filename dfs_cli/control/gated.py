"""A gate before every block: the recurrent one of DFS, or a feed-forward one per block."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dfs_cli.control.base import Ceiling, Controller, HeldOut, Need, Request, Sensitivity, Tell
from dfs_cli.control.gates import Gate, shift_preference
from dfs_cli.control.static import NEGLIGIBLE_HARM, best_block_mix, sufficient_cost
from dfs_cli.cost.decisions import Decisions
from dfs_cli.cost.operating_point import (
    HIGHEST_SHARE,
    OperatingPoint,
    cheapest_of_the_best,
    find_operating_point,
    target_cost,
)
from dfs_cli.cost.table import CostTable
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.passes import Answer, Output, TuningTarget, View

_LEAD = 0.1  # of the first choice over any other, in units of the gate's scores
_TRIED, _HIGHEST, _RATIO = 52, 64.0, 1.15
"""Cost multipliers at which it is tried whether less than the budget does as well: how many, the highest, in units of one over
the mean cost of a block at its widest, and the ratio of each to the next."""


class GatedController(Controller):
    """One pass in which a gate scores the options of each block from the features that enter it.

    Decisions maximise ``scores - operating_point * option costs``; while tuning, the operating point is the cost multiplier,
    raised where the cost is above the target and lowered where it is below (dual ascent). No block has a dearer option than
    ``ceiling`` says, and none that leaves too little of ``limit`` for the cheapest options of the blocks behind it.

    Args:
        gate: scores the options.
    """

    needs = Need.BLOCKS
    gate: Gate

    def __init__(self, table: CostTable, gate: Gate) -> None:
        super().__init__(table, (View(),))
        self.gate = gate
        self.ceiling = Ceiling(self.blocks, len(self.bits))
        self._operating_point = 0.0
        self._forced: Tensor | None = None
        self._first: Tensor | None = None

    @property
    def operating_point(self) -> float:
        """The cost multiplier at which decisions are made."""
        return self._operating_point

    @operating_point.setter
    def operating_point(self, value: float) -> None:
        self._operating_point = value

    cost_multiplier = operating_point

    def run(
        self,
        network: DynamicResNet,
        images: Tensor,
        decisions: Decisions | None = None,
        target: TuningTarget | None = None,
    ) -> Output:
        """See :meth:`dfs_cli.nn.network.DynamicResNet.run`."""
        state, forbidden = self.gate.start(len(images), images), self.ceiling.forbidden()
        extras, least = self.extras()
        left = (self.limit - least).clamp_min(0).expand(len(images))
        chosen: list[Tensor] = []
        probs: list[Tensor] = []
        pooled: Tensor | None = None
        followed = decisions
        if followed is None and self._forced is not None:
            rows = torch.arange(len(images)) % len(self._forced)
            followed = Decisions.of_pass(self._forced[rows].to(images.device))

        def choose(block: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
            nonlocal state, pooled, left
            if decisions is None or self.training:
                pooled = self.gate.pool(x, pooled, _changed(network, block, chosen))
                scores, state = self.gate(block, pooled, state)
                scores = scores - self._operating_point * self.option_costs[0, block].to(scores.dtype)
                scores = scores.masked_fill(forbidden[block], -torch.inf)
            if followed is None and self.limit < math.inf:
                scores = scores.masked_fill(extras[block] > left[:, None], -torch.inf)
                left = left - extras[block][scores.argmax(dim=1)]
            chosen.append(followed.in_pass(0)[:, block] if followed is not None else scores.argmax(dim=1))
            if self.training:
                probs.append(scores.softmax(dim=1))
            return chosen[-1], probs[-1] if probs else None

        logits, _ = network.run_pass(images, choose, target.explored if target else 0.0)
        answer = Answer(None, logits, torch.stack(probs, dim=1) if probs else None)
        return Output(logits, Decisions.of_pass(torch.stack(chosen, dim=1)), (answer,))

    def extras(self) -> tuple[Tensor, Tensor]:
        """What options cost more than a block's cheapest one, (L, K), and the cost of the cheapest decision."""
        extras, least = self.ceiling.extras(self.option_costs[0])
        return extras, self.fixed_costs[0] + least

    def start(
        self,
        network: DynamicResNet,
        table: CostTable,
        sensitivity: Sensitivity | None,
        request: Request,
        sample: Tensor,
    ) -> TuningTarget:
        """The gate prefers what does little harm, and the best mix that the budget pays for to all else: images learn to
        deviate from it. Where no image may cost more than the budget, that mix is the ceiling."""
        assert sensitivity is not None, "declared as needed"
        shift_preference(self.gate.preference, sensitivity.blocks)
        self._normalise_inputs(network, sample)
        self.limit = request.limit
        cost = min(request.budget, request.limit, table.dearest)
        if not (request.spend or request.is_bound):
            cost = min(cost, sufficient_cost(table, sensitivity.blocks, NEGLIGIBLE_HARM))
        cost = max(cost, table.cheapest)
        self._first = best_block_mix(table, sensitivity.blocks, cost)
        self._operating_point = self._prefer(self._first)
        if request.is_bound:
            self.ceiling.highest.copy_(self._first)
            cost = self.ceiling.cost(table, 0)
        return TuningTarget(cost)

    @torch.no_grad()
    def _prefer(self, mix: Tensor) -> float:
        """Prefer the options ``mix`` (L,) to all others, at the cost multiplier that makes most of them the best anyway."""
        preference, costs = self.gate.preference, self.option_costs[0].to(self.gate.preference.dtype)

        def cost_at(multiplier: float) -> Tensor:
            return costs.gather(1, (preference - multiplier * costs).argmax(dim=1, keepdim=True)).sum()

        multiplier = find_operating_point(cost_at, float(costs.gather(1, mix[:, None]).sum())).value
        scores = preference - multiplier * costs
        lacking = scores.max(dim=1, keepdim=True).values - scores.gather(1, mix[:, None])
        preference.scatter_add_(1, mix[:, None], lacking + _LEAD)
        return multiplier

    def first_policy(self) -> Tensor | None:
        return self._first

    def _normalise_inputs(self, network: DynamicResNet, images: Tensor) -> None:
        """Scale the gate's inputs to zero mean and unit deviation over ``images`` (N, C, H, W), run in full precision."""
        handles = []
        for i, block in enumerate(network.blocks):

            def normalise(_: nn.Module, inputs: tuple[Tensor, ...], index: int = i) -> None:
                self.gate.normalise_input(index, inputs[0])

            handles.append(block.module.register_forward_pre_hook(normalise))
        try:
            network.run_in_full(images)
        finally:
            for handle in handles:
                handle.remove()

    def set_operating_point(
        self,
        network: DynamicResNet,
        table: CostTable,
        held_out: HeldOut,
        request: Request,
        tell: Tell = lambda value, cost: None,
    ) -> OperatingPoint:
        """Set the cost multiplier. Where images differ in cost, the aim is a little below the budget (see
        :func:`dfs_cli.cost.operating_point.target_cost`)."""
        network.eval()
        if request.is_bound:  # the ceiling keeps the budget
            costs, top1 = self._at(network, table, held_out, 0.0)
            return OperatingPoint(0.0, float(costs.mean()), top1)
        point = None
        if not request.spend and held_out.targets is not None:
            point = self._cheapest_of_the_best(network, table, held_out, request, tell)
        if point is None:
            point = self._dearest_affordable(network, table, held_out, request, tell)
        self.operating_point = point.value
        return point

    def _at(
        self, network: DynamicResNet, table: CostTable, held_out: HeldOut, value: float
    ) -> tuple[Tensor, float | None]:
        """The costs (N,) of the held-out images at a cost multiplier, and their top-1."""
        self.operating_point = value
        return held_out.measure(network, table)

    def _dearest_affordable(
        self, network: DynamicResNet, table: CostTable, held_out: HeldOut, request: Request, tell: Tell
    ) -> OperatingPoint:
        """The point whose cost is closest to what the budget allows, by bisection."""
        tried: dict[float, tuple[Tensor, float | None]] = {}

        def cost_at(value: float) -> Tensor:
            tried[value] = self._at(network, table, held_out, value)
            tell(value, float(tried[value][0].mean()))
            return tried[value][0]

        point = find_operating_point(cost_at, min(request.budget, self.limit), start=self.operating_point)
        deviation = float(tried[point.value][0].std(unbiased=False))
        target = target_cost(request.budget, deviation, len(held_out), request.images)
        if target < request.budget:
            point = find_operating_point(cost_at, target, start=point.value)
        return point._replace(top1=tried[point.value][1])

    def _cheapest_of_the_best(
        self, network: DynamicResNet, table: CostTable, held_out: HeldOut, request: Request, tell: Tell
    ) -> OperatingPoint | None:
        """Of multipliers that are the same for every budget, from the cheapest on, the best one that the budget pays for: a
        larger budget can choose from all that a smaller one can. None where it pays for none of them."""
        unit = 1 / float(self.option_costs[0, :, -1].mean())
        points = []
        for i in range(_TRIED):
            value = _HIGHEST * unit * _RATIO**-i
            costs, top1 = self._at(network, table, held_out, value)
            cost, deviation = float(costs.mean()), float(costs.std(unbiased=False))
            tell(value, cost)
            if cost <= target_cost(request.budget, deviation, len(held_out), request.images):
                points.append(OperatingPoint(value, cost, top1))
            elif cost > HIGHEST_SHARE * request.budget:
                break
        return cheapest_of_the_best(points) if points else None

    def uses_hard_crops(self, spend: bool) -> bool:
        """Where accuracies are compared."""
        return not spend

    def movable(self, table: CostTable) -> tuple[float, float]:
        return table.cheapest, max(min(self.ceiling.cost(table, 0), self.limit), table.cheapest)

    def check(self, table: CostTable) -> None:
        super().check(table)
        self.ceiling.check()

    @torch.no_grad()
    def force(self, policies: Tensor) -> None:
        """The gate itself decides for the first policy, whatever it sees; in batches the policies are put in its place."""
        self._forced, self.limit = torch.atleast_2d(policies), math.inf
        for head in self.gate.heads_of_scores():
            nn.init.zeros_(head.weight)
        self.gate.preference.copy_(nn.functional.one_hot(self._forced[0], self.gate.options))
        self.operating_point = 0.0


def _changed(network: DynamicResNet, block: int, chosen: Sequence[Tensor]) -> Tensor | None:
    """The images (indices) whose features the block before has changed; None: any, or it is not worth finding out."""
    if not chosen or torch.is_grad_enabled() or chosen[-1].device.type != "cpu":
        return None
    if network.bits[0] != 0 or not network.blocks[block - 1].keeps_input:
        return None
    return chosen[-1].nonzero().flatten()
