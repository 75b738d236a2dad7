"""The outcome of a sweep: summary over seeds, and a verdict for each budget."""

from __future__ import annotations

import statistics
from typing import Any

from dfs_cli.cost.operating_point import HIGHEST_SHARE

STATIC = ("uniform", "mixed")
"""The methods that give all images the same bitwidths."""


def summarise(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Means over seeds of each method at each budget or bitwidth; ``spread`` is top-1's largest less smallest."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for point in results["points"]:
        groups.setdefault((point["method"], point["budget"], point["bits"]), []).append(point)
    rows = []
    for (method, budget, bits), points in groups.items():
        top1 = [p["top1"] for p in points]
        dynamics = [p["dynamics"] for p in points if p.get("dynamics")]
        members = {tuple(p["members"]) for p in points if p.get("members")}
        rows.append(
            {
                "method": method,
                "budget": budget,
                "bits": bits,
                "cost": statistics.fmean(p["cost"] for p in points),
                "top1": statistics.fmean(top1),
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

    A baseline counts if it costs no more than the budget allows, or than DFS does. The best baseline is the most accurate one;
    of equally accurate ones, the cheapest.
    """

    def best_of(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
        return max(rows, key=lambda r: (round(r["top1"], 4), -r["cost"]), default=None)

    rows = summarise(results)
    verdict_rows = []
    for dfs in sorted((r for r in rows if r["method"] == "dfs"), key=lambda r: -r["budget"]):
        limit = max(dfs["cost"], HIGHEST_SHARE * dfs["budget"])
        baselines = [r for r in rows if r["method"] != "dfs" and r["cost"] <= limit * (1 + 1e-9)]
        best, best_static = best_of(baselines), best_of([r for r in baselines if r["method"] in STATIC])
        verdict_rows.append(
            {
                "budget": dfs["budget"],
                "dfs": dfs,
                "best": best,
                "difference": None if best is None else dfs["top1"] - best["top1"],
                "best_static": best_static,
                "difference_to_static": None if best_static is None else dfs["top1"] - best_static["top1"],
            }
        )
    return verdict_rows
