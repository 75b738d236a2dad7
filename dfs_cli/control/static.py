"""The static controller: the same bitwidths for every image, the best mix under a cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import TypeVar

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from dfs_cli.control.base import Controller, HeldOut, Need, Request, Sensitivity, Tell
from dfs_cli.cost.decisions import Decisions
from dfs_cli.cost.operating_point import LOWEST_SHARE, OperatingPoint
from dfs_cli.cost.table import CostTable
from dfs_cli.cost.weighting import mac_cost
from dfs_cli.errors import ConfigError
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.passes import Answer, Output, TuningTarget, View

NEGLIGIBLE_HARM = 0.002
"""In nats, before tuning: a mix that does less harm is not worth more bits, unless a budget is to be spent."""

Mix = TypeVar("Mix")

_SECOND_LOOK = 0.01
"""What a second, mirrored look is worth at least, in nats, where that cannot be measured."""


class StaticController(Controller):
    """One policy for all images, in one pass or, with two views, in two: over the image and its mirror image, whose logits are
    averaged.

    The mix of bitwidths lies in the cost table, a bitwidth for each layer; a block whose layers have 0 bits is skipped. The
    policy follows from it: skipped, or the option of the block's widest layer. Of a table without a mix, every block takes
    its widest option.

    Args:
        mirror: show every image twice.
    """

    needs = Need.BLOCKS_AND_LAYERS
    policy: Tensor

    def __init__(self, table: CostTable, mirror: bool = False) -> None:
        super().__init__(table, (View(), View(mirrored=True)) if mirror else (View(),))
        self.has_mix = bool(table.layer_bits)
        self.register_buffer("policy", policy_of(table), persistent=False)

    def run(
        self,
        network: DynamicResNet,
        images: Tensor,
        decisions: Decisions | None = None,
        target: TuningTarget | None = None,
    ) -> Output:
        """See :meth:`dfs_cli.nn.network.DynamicResNet.run`."""
        decisions = Decisions.alike(self.policy, len(images), len(self.views)) if decisions is None else decisions
        explored = target.explored if target else 0.0
        logits, answers = images.new_zeros(()), []
        for index, view in enumerate(self.views[: decisions.passes]):
            seen, _ = network.follow(images, decisions.in_pass(index), explored=explored, view=view)
            logits = (index * logits + seen) / (index + 1)
            answers.append(Answer(None, logits))
        return Output(logits, decisions, tuple(answers))

    @property
    def operating_point(self) -> float:
        """There is nothing to move: always 0."""
        return 0.0

    @operating_point.setter
    def operating_point(self, value: float) -> None:
        if value:
            raise ConfigError("a static network has no operating point")

    @property
    def cost_multiplier(self) -> float:
        """Nothing is scored: always 0."""
        return 0.0

    @cost_multiplier.setter
    def cost_multiplier(self, value: float) -> None: ...

    def candidates(self, table: CostTable, sensitivity: Sensitivity | None, request: Request) -> list[CostTable]:
        """The best mix per layer and the best mix per block; one where they are the same, or where the other cannot be had.
        Where layers were not measured, the best mix per block. Where there is one option, all of that."""
        if len(table.options) == 1:
            (bits,) = table.options
            return [table.with_layer_bits({layer.name: bits for layer in table.layers if layer.block is not None})]
        assert sensitivity is not None, "declared as needed"
        budget, least = table.most_in_one_pass(request.budget), LOWEST_SHARE * request.budget
        if request.is_bound:
            # As many bits as there may be: what harm they do to real images is not known.
            budget, least = request.budget, 0.0
        elif not request.spend:
            enough = table.passes * sufficient_cost(table, sensitivity.blocks, NEGLIGIBLE_HARM)
            budget, least = min(budget, enough), 0.0

        def by_layer(cost: float) -> CostTable:
            return table.with_layer_bits(best_layer_mix(table, sensitivity, cost, least))

        def by_block(cost: float) -> CostTable:
            options = best_block_mix(table, sensitivity.blocks, cost, least, range(table.passes))
            layers = [layer for layer in table.layers if layer.block is not None]
            return table.with_layer_bits(
                {layer.name: table.options[int(options[layer.block or 0])] for layer in layers}
            )

        mixes = [] if sensitivity.layers is None else [within(request.limit, by_layer, budget, _static_cost)]
        with suppress(ConfigError) if mixes else nullcontext():  # blocks are coarser than layers
            mixes.append(within(request.limit, by_block, budget, _static_cost))
        return [mix for i, mix in enumerate(mixes) if mix not in mixes[:i]]

    def start(
        self,
        network: DynamicResNet,
        table: CostTable,
        sensitivity: Sensitivity | None,
        request: Request,
        sample: Tensor,
    ) -> TuningTarget:
        self.limit = request.limit
        return TuningTarget(_static_cost(table))

    def policies(self) -> list[Tensor]:
        """The policy; of a network that has no mix yet, those under which its sensitivities are measured."""
        return [self.policy] if self.has_mix else super().policies()

    def first_policy(self) -> Tensor | None:
        return self.policy

    def set_operating_point(
        self,
        network: DynamicResNet,
        table: CostTable,
        held_out: HeldOut,
        request: Request,
        tell: Tell = lambda value, cost: None,
    ) -> OperatingPoint:
        """Nothing is set: the cost is the same for all images."""
        cost, _ = self.movable(table)
        tell(0.0, cost)
        _, top1 = held_out.measure(network, table)
        return OperatingPoint(0.0, cost, top1)

    def movable(self, table: CostTable) -> tuple[float, float]:
        cost = table.cost(Decisions.alike(self.policy.cpu(), 1, table.passes)).item()
        return cost, cost

    def check(self, table: CostTable) -> None:
        """Nothing is loaded: the policy follows from the table."""

    def force(self, policies: Tensor) -> None:
        self.policy.copy_(torch.atleast_2d(policies)[0])


def _static_cost(table: CostTable) -> float:
    """The cost of an image in a static network with these costs."""
    return table.cost(Decisions.alike(policy_of(table), 1, table.passes)).item()


def policy_of(table: CostTable) -> Tensor:
    """The policy (L,) of a static network with these costs: see :class:`StaticController`."""
    widest = torch.full((len(table.blocks),), -1)
    for layer in table.layers:
        if layer.block is not None:
            bits = table.options[-1] if layer.bits is None else layer.bits
            widest[layer.block] = max(int(widest[layer.block]), table.options.index(bits))
    return widest


def best_block_mix(
    table: CostTable, sensitivity: Tensor, cost: float, least: float = 0.0, passes: Sequence[int] = (0,)
) -> Tensor:
    """Options (L,) of least total harm that cost at most ``cost``.

    Harms are taken to add up, as in HAWQ-V3 (Yao et al., 2021).

    Args:
        sensitivity: (L, K), what each option of each block does to the predictions alone.
        cost, least: at most and at least so much, as fractions of the dense network's cost.
        passes: which ones the mix is run in, and paid for, deciding included.

    Raises:
        ConfigError: no mix costs that.
    """
    blocks, options = sensitivity.shape
    one_each = np.kron(np.eye(blocks), np.ones(options))
    harm = sensitivity.double().cpu().numpy().ravel()
    prices = table.option_costs[list(passes)].sum(dim=0).numpy().ravel()
    chosen = _choose(harm, prices, one_each, sum(map(table.fixed_cost, passes)), cost, least)
    return torch.from_numpy(chosen.reshape(blocks, options).argmax(axis=1))


def within(limit: float, plan: Callable[[float], Mix], cost: float, cost_of: Callable[[Mix], float]) -> Mix:
    """What ``plan`` makes of ``cost``, or of a little less, so that it costs no more than ``limit``, exactly: solvers have
    tolerances.

    Raises:
        ConfigError: no mix costs so little.
    """
    cost, step = min(cost, limit), 1e-9
    while cost_of(mix := plan(cost)) > limit:
        cost, step = cost * (1 - step), 4 * step
    return mix


def sufficient_cost(table: CostTable, sensitivity: Tensor, harm: float) -> float:
    """Cost of the cheapest mix per block, in a first pass, whose total harm is at most ``harm`` nats.

    Of a pass with every block at its widest where all mixes do more harm.
    """
    blocks, options = sensitivity.shape
    costs, harms = table.option_costs[0].numpy().ravel(), sensitivity.double().cpu().numpy().ravel()
    one_each = np.kron(np.eye(blocks), np.ones(options))
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(harms[None], -np.inf, harm)]
    solution = milp(costs / costs.max(), constraints=constraints, integrality=np.ones(len(costs)), bounds=Bounds(0, 1))
    if not solution.success:  # no mix does so little
        return table.dearest_pass(0)
    return table.fixed_cost(0) + float(costs @ solution.x.round())


def mix_within(table: CostTable, sensitivity: Tensor, budget: float, limit: float = math.inf) -> tuple[Tensor, bool]:
    """Options (L,) for each pass, and whether there are two of them, that together cost at most ``budget``, and ``limit``,
    exactly.

    Two passes are taken, alike, unless one that has all of the budget does less harm. The answer is the mean of
    both, so that half of their harm is left; a little harm more is worth the second look.

    Args:
        sensitivity: (L, K), as for :func:`best_block_mix`.

    Raises:
        ConfigError: no mix costs so little.
    """
    harms = sensitivity.double().cpu()

    def best(*passes: int) -> Tensor:
        def cost_of(mix: Tensor) -> float:
            return sum(float(table.pass_cost(mix[None], index)) for index in passes)

        return within(limit, lambda cost: best_block_mix(table, sensitivity, cost, passes=passes), budget, cost_of)

    alone = best(0)
    try:
        mix = best(0, 1)
    except ConfigError:  # one pass can be paid, not two
        return alone, False
    harm_alone, harm_of_each = (float(harms.gather(1, m[:, None]).sum()) for m in (alone, mix))
    return (mix, True) if harm_of_each / 2 <= max(harm_alone, _SECOND_LOOK) else (alone, False)


def best_layer_mix(table: CostTable, sensitivity: Sensitivity, cost: float, least: float = 0.0) -> dict[str, int]:
    """Bitwidths of the blocks' layers, by name, of least total harm that cost at most ``cost`` in all passes, alike; 0 for all
    layers of a block that is skipped, where skipping is an option.

    Args:
        cost, least: at most and at least so much, as fractions of the dense network's cost.

    Raises:
        ConfigError: no mix costs that.
    """
    assert sensitivity.layers is not None, "asked for"
    layers = [layer for layer in table.layers if layer.block is not None]
    runs = [i for i, bits in enumerate(table.options) if bits]
    bits = np.array([table.options[i] for i in runs])
    blocks = range(len(table.blocks)) if len(runs) < len(table.options) else range(0)
    # A variable for each layer and option, and one for each block that may be skipped.
    member = np.array([[layer.block == block for block in blocks] for layer in layers], dtype=float)
    one_each = np.hstack([np.kron(np.eye(len(layers)), np.ones(len(runs))), member])
    shares = np.array([table.passes * layer.macs / table.dense_macs for layer in layers])
    costs = np.outer(shares, [mac_cost(b) for b in bits.tolist()])
    harm = sensitivity.layers[:, runs].double().cpu().numpy().ravel()
    skipping = sensitivity.blocks[list(blocks), 0].double().cpu().numpy()
    harms, prices = np.concatenate([harm, skipping]), np.concatenate([costs.ravel(), np.zeros(len(blocks))])
    chosen = _choose(harms, prices, one_each, sum(map(table.fixed_cost, range(table.passes))), cost, least)
    kept = chosen[: costs.size].reshape(costs.shape)
    return {layer.name: int(row @ bits) for layer, row in zip(layers, kept, strict=True)}


def _choose(
    harm: np.ndarray, costs: np.ndarray, one_each: np.ndarray, fixed: float, cost: float, least: float
) -> np.ndarray:
    """Which of V choices to make (V,), solved exactly as an integer program (HiGHS, by SciPy).

    Args:
        harm, costs: (V,), of each choice.
        one_each: (R, V), the choices of which exactly one is to be made, a row each.
        fixed: what is paid besides them.
        cost, least: at most and at least so much, all together.
    """
    spendable = cost - fixed
    to_spend = least - fixed if least > 0 else -np.inf
    # Costs as shares of the largest: the solver's tolerances are absolute.
    scale = (one_each * costs).max(axis=1).sum()
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(costs[None] / scale, to_spend / scale, spendable / scale * (1 + 1e-9) + 1e-12),
    ]
    # Of equal harm the cheaper one is taken.
    objective = harm / max(harm.max(), 1e-12) + 1e-9 * costs / costs.max()
    solution = milp(objective, constraints=constraints, integrality=np.ones(len(costs)), bounds=Bounds(0, 1))
    if not solution.success:
        limits = f"{least:g} to {cost:g}" if least > 0 else f"{cost:g} or less"
        raise ConfigError(f"no static mix of these options costs {limits}: {solution.message}")
    chosen: np.ndarray = solution.x.round().astype(int)
    return chosen
