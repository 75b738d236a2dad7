"""The outcome of a sweep: summary over seeds, a verdict for each budget, and one over all budgets; and which budgets tell."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from dfs_cli.comparison.intervals import Interval, difference_interval, top1_interval
from dfs_cli.cost.operating_point import HIGHEST_SHARE

STATIC = ("uniform", "mixed")
"""The methods that give all images the same bitwidths."""

_RIVALS = 2

LOST = (0.5, 1.0, 2.0, 4.0)
"""In points of top-1: where static networks have lost so much, a dynamic one may have something to win."""


Points = list[dict[str, Any]]


def _groups(results: dict[str, Any]) -> dict[tuple[Any, ...], Points]:
    """The points, one for each seed, of each method at each budget or bitwidth and number of views."""
    groups: dict[tuple[Any, ...], Points] = {}
    for point in results["points"]:
        groups.setdefault(_key(point), []).append(point)
    return groups


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["method"], row["budget"], row["bits"], row["views"]


def _ends(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)


def summarise(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Means over seeds of each method at each budget or bitwidth and number of views.

    ``spread`` is top-1's largest less smallest. ``top1_interval`` holds the ends of the 95% interval of ``top1``, in percent;
    None: the answers are not known, or not of the same images.
    """
    rows = []
    for (method, budget, bits, views), points in _groups(results).items():
        top1 = [p["top1"] for p in points]
        dynamics = [p["dynamics"] for p in points if p.get("dynamics")]
        members = {tuple(p["members"]) for p in points if p.get("members")}
        rows.append(
            {
                "method": method,
                "budget": budget,
                "bits": bits,
                "views": views,
                "cost": statistics.fmean(p["cost"] for p in points),
                "top1": statistics.fmean(top1),
                "top1_interval": _ends(top1_interval(points)),
                "spread": max(top1) - min(top1),
                "seeds": len(points),
                "keeps_budget": all(p.get("keeps_budget", True) for p in points),
                "dynamics": {
                    key: statistics.fmean(d[key] for d in dynamics) for key in (dynamics[0] if dynamics else ())
                },
                # The best pair may differ between seeds.
                "members": list(members.pop()) if len(members) == 1 else [],
            }
        )
    return rows


def verdicts(results: dict[str, Any]) -> list[dict[str, Any]]:
    """For each budget: DFS, the best baseline within the budget, and the difference in points of top-1.

    A baseline counts if it costs no more than the budget allows, or than DFS does; where there are several seeds, if it is one
    of the :func:`rivals`, which have as many. The best baseline is the most accurate one; of equally accurate ones, the
    cheapest. It is chosen by the validation images, which flatters it a little.

    ``interval``, the ends of the difference's 95% interval, and ``outcome`` (``win``, ``draw`` or ``loss`` of DFS) are None
    where the answers of the networks are not known, or not of the same images. The best static baseline likewise.
    """

    def best_of(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
        return max(rows, key=lambda r: (round(r["top1"], 4), -r["cost"]), default=None)

    rows, groups = summarise(results), _groups(results)

    def beside(dfs: dict[str, Any], other: dict[str, Any] | None, suffix: str = "") -> dict[str, Any]:
        known = None if other is None else difference_interval([(groups[_key(dfs)], groups[_key(other)])])
        return {
            f"difference{suffix}": None if other is None else dfs["top1"] - other["top1"],
            f"interval{suffix}": _ends(known),
            f"outcome{suffix}": known and known.outcome,
        }

    verdict_rows = []
    for dfs in sorted((r for r in rows if r["method"] == "dfs"), key=lambda r: -r["budget"]):
        baselines = within_budget([r for r in rows if r["method"] != "dfs"], dfs["budget"], dfs["cost"])
        best_static = best_of([r for r in baselines if r["method"] in STATIC])
        if dfs["seeds"] > 1:
            chosen = [_key(point) for point in rivals(results, dfs["budget"])]
            baselines = [r for r in baselines if _key(r) in chosen]
        best = best_of(baselines)
        verdict_rows.append(
            {
                "budget": dfs["budget"],
                "dfs": dfs,
                "best": best,
                **beside(dfs, best),
                "best_static": best_static,
                **beside(dfs, best_static, "_to_static"),
            }
        )
    return verdict_rows


def within_budget(rows: Points, budget: float, cost: float = 0.0) -> Points:
    """Those that cost no more than ``budget`` allows, or than ``cost``."""
    limit = max(cost, HIGHEST_SHARE * budget)
    return [row for row in rows if row["cost"] <= limit * (1 + 1e-9)]


def of_first_seed(points: Points) -> Points:
    """Those of the smallest seed."""
    first = min((point["seed"] for point in points), default=0)
    return [point for point in points if point["seed"] == first]


def rivals(results: dict[str, Any], budget: float) -> Points:
    """The points of the two baselines within a budget that are the best on held-out images, with the first seed: neither luck
    with a seed nor the validation images choose them."""
    points = [point for point in of_first_seed(results["points"]) if point["method"] != "dfs"]
    return sorted(within_budget(points, budget), key=lambda point: -point["held_out_top1"])[:_RIVALS]


def telling_budgets(results: dict[str, Any]) -> tuple[float, ...]:
    """The budgets at which uniform static networks, of one view, have lost :data:`LOST` points of top-1, the largest first.

    They are those of the first seed. Between two of them the loss is interpolated over the logarithm of the cost. They say
    where to compare, not who is compared there: at each budget stand other ones, too. What even the cheapest of them has not
    lost has no budget.
    """
    dense = results["original"]["top1"]
    points = of_first_seed(results["points"])
    uniform = [point for point in points if point["method"] == "uniform" and point["views"] == 1]
    by_cost = sorted(uniform, key=lambda point: -point["cost"])
    curve = [(point["cost"], dense - point["top1"]) for point in by_cost]
    budgets = []
    for lost in LOST:
        for (cost, less), (cheaper, more) in pairwise(curve):
            if less <= lost < more:
                share = (lost - less) / (more - less)
                budgets.append(float(f"{math.exp((1 - share) * math.log(cost) + share * math.log(cheaper)):.2g}"))
                break
    return tuple(sorted(set(budgets), reverse=True))


def overall(sweeps: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """How far DFS is above the best baselines in the mean over all budgets of one sweep, or of several of other networks.

    One pair of networks leaves much to chance; the mean of several pairs on the same images leaves less.

    Returns:
        ``budgets``, how many were averaged; ``difference``, in points of top-1; ``interval`` and ``outcome``, as of
        :func:`verdicts`. None: there are fewer than two budgets with a baseline.
    """
    pairs, differences = [], []
    for results in sweeps:
        groups = _groups(results)
        for verdict in verdicts(results):
            if verdict["best"] is not None:
                pairs.append((groups[_key(verdict["dfs"])], groups[_key(verdict["best"])]))
                differences.append(verdict["difference"])
    if len(pairs) < 2:
        return None
    known = difference_interval(pairs)
    return {
        "budgets": len(pairs),
        "difference": statistics.fmean(differences),
        "interval": _ends(known),
        "outcome": known and known.outcome,
    }
