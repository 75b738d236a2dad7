"""How a budget is divided between a first pass for all images and a second one for some."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from dfs_cli.control.base import Request, affordable
from dfs_cli.control.static import NEGLIGIBLE_HARM, best_block_mix, sufficient_cost, within
from dfs_cli.cost.operating_point import sampling_error
from dfs_cli.cost.table import CostTable
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.passes import FULL_VIEW, View, uncertainty
from dfs_cli.nn.quantization import BYTE_BITS

# Of the budget, what the first pass costs, unless the cheapest mix costs more.
_FIRST_SHARE = 0.65
# Of what all costs at 8 bits, more than this for all images is wasted on the first pass: six bits lose next to nothing.
_FIRST_LIMIT = 0.64
# The share of images planned for the second pass; more where each would cost more than eight bits do.
_SECOND_SHARE = 0.2
# A second pass costs at least this share of the first: a much poorer look has nothing to add.
_SECOND_LEAST = 0.6
# Left for the second pass at least, where the first can cost no less than the budget.
_LEAST_REST = 1e-3
# Largest share of the budget that the mean cost of two samples may differ by (one standard error), as planned.
_PLANNED_ERROR = 0.02
# How many mixes are tried for a first and for a second pass where costs are those of a device.
_FIRSTS, _SECONDS = 8, 3

Policy = tuple[int, ...]
"""The option of each of L blocks."""


class Division(NamedTuple):
    """A budget, divided.

    Args:
        first: (L,), the options of the first pass.
        again: (L,), a mix for the second one; None: any that costs ``second``.
        second: cost of a second pass.
        share: of the images, how many take it; 0: no second pass can be paid.
    """

    first: Tensor
    again: Tensor | None
    second: float
    share: float


def divide_by_rule(table: CostTable, harm: Tensor, request: Request) -> Division:
    """The best static mix for the first pass's part of the budget, and what remains for a share of the images.

    The fewer images the operating point is set on, the larger that share and the cheaper the second pass: the mean cost of few
    images says less about others' the more the images differ. The rule is for costs that fall with the square of the bitwidth,
    where a good first look costs little. Under a limit both passes together cost no more; where it pays for no second one, all
    of it is the first one's.

    Args:
        harm: (L, K), see :class:`dfs_cli.control.base.Sensitivity`.
    """
    dearest, all_8_bit = table.dearest_pass(1), table.uniform_cost(BYTE_BITS)
    budget = whole = min(request.budget, request.limit)
    limit = _FIRST_LIMIT * all_8_bit
    if not request.spend:
        # More bits in the first pass gain nothing.
        enough = sufficient_cost(table, harm, NEGLIGIBLE_HARM)
        budget = min(budget, max(min(enough, limit), table.cheapest) / _FIRST_SHARE)
    # No more than what the budget's part allows, no less than what the second pass cannot spend.
    cost = max(min(_FIRST_SHARE * budget, limit), min(table.cheapest, budget), budget - dearest)
    # What the limit leaves for a second pass is worth a look.
    most = max(min(request.limit / (1 + _SECOND_LEAST), request.limit - table.cheapest_pass(1)), table.cheapest)
    first = _first_mix(table, harm, min(cost, most), request.limit)
    left = request.limit - float(table.pass_cost(first[None], 0))
    if left < table.cheapest_pass(1):
        return Division(_first_mix(table, harm, whole, request.limit), None, table.cheapest_pass(1), 0.0)
    rest = max(budget - float(table.pass_cost(first[None], 0)), _LEAST_REST * budget)
    share = _SECOND_SHARE
    # The deviation of the cost between images is rest * sqrt((1 - share) / share).
    allowed = _PLANNED_ERROR * budget / (rest * sampling_error(1.0, request.held_out, request.images))
    share = max(share, 1 / (1 + allowed**2))
    share = min(1.0, max(share, rest / min(dearest, all_8_bit)))
    second = min(max(rest / share, _SECOND_LEAST * (budget - rest)), left)
    return Division(first, None, second, min(1.0, rest / second))


@torch.no_grad()
def divide(
    network: DynamicResNet,
    table: CostTable,
    harm: Tensor,
    budget: float,
    images: Tensor,
    views: Sequence[View],
    limit: float = math.inf,
) -> Division:
    """The division of least :func:`regret` over the network's own answers at its widest, both full views averaged, as measured
    before tuning.

    Args:
        harm: (L, K), see :class:`dfs_cli.control.base.Sensitivity`.
        images: (N, C, H, W), held out; for large networks fewer are used.
        views: what the two passes see.
        limit: what both passes together may cost.
    """
    images = affordable(images, table, _FIRSTS + 2 * _SECONDS)

    @cache
    def answers(view: View, policy: Policy) -> Tensor:
        """The logits (N, classes) of a pass."""
        options = torch.tensor(policy, device=images.device)
        return network.follow(images, options.expand(len(images), -1), view=view)[0]

    widest = (len(table.options) - 1,) * len(table.blocks)
    wanted = (answers(FULL_VIEW, widest).softmax(dim=1) + answers(views[1], widest).softmax(dim=1)) / 2
    firsts = _mixes(table, harm, 0, table.cheapest, min(budget, limit), _FIRSTS)
    seconds = _mixes(table, harm, 1, _SECOND_LEAST * table.dearest_pass(1), torch.inf, _SECONDS)
    divisions: list[tuple[float, Division]] = []
    for first, second in product(firsts, seconds):
        policies = torch.tensor([first, second])
        cost = float(table.after(policies[0]).pass_cost(policies[1:], 1))
        first_cost = float(table.pass_cost(policies[:1], 0))
        if first_cost + cost > limit:
            continue
        share = min(1.0, (budget - first_cost) / cost)
        looked, again = answers(views[0], first), answers(views[1], second)
        rows = uncertainty(looked).argsort(descending=True)[: round(share * len(images))]
        both = looked.index_copy(0, rows, (looked[rows] + again[rows]) / 2)
        divisions.append((regret(both, wanted), Division(policies[0], policies[1], cost, share)))
    if not divisions:  # the limit pays for no second pass
        return Division(torch.tensor(firsts[-1]), None, table.cheapest_pass(1), 0.0)
    return min(divisions, key=lambda found: found[0])[1]


def regret(logits: Tensor, wanted: Tensor) -> float:
    """By how much the answers are less probable than the most probable ones, in the mean.

    Only which class is named counts, not how sure it is: a first pass may be as sure as it likes of what is right. Doubtful
    images count for less than others.

    Args:
        logits: (N, classes), of which the largest is the answer.
        wanted: (N, classes), probabilities.
    """
    named = wanted.gather(1, logits.argmax(dim=1, keepdim=True))[:, 0]
    return float((wanted.max(dim=1).values - named).mean())


def _first_mix(table: CostTable, harm: Tensor, cost: float, limit: float) -> Tensor:
    """The mix (L,) of least harm for a first pass that costs at most ``cost``, and ``limit``, exactly."""
    return within(
        limit,
        lambda most: best_block_mix(table, harm, most),
        cost,
        lambda mix: float(table.pass_cost(mix[None], 0)),
    )


def _mixes(table: CostTable, harm: Tensor, index: int, least: float, most: float, count: int) -> list[Policy]:
    """Different mixes of least harm for a pass, at costs from ``least`` to ``most``, and no more than there can be."""
    low, high = max(least, table.cheapest_pass(index)), min(most, table.dearest_pass(index))
    costs = torch.linspace(low, high, count, dtype=torch.float64).tolist()
    mixes = (best_block_mix(table, harm, cost, passes=(index,)) for cost in costs)
    return list(dict.fromkeys(tuple(mix.tolist()) for mix in mixes))
