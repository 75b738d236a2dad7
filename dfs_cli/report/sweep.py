"""What a sweep found: summary over seeds, verdicts, CSV, and the figure of accuracy over cost."""

from __future__ import annotations

import csv
import io
import statistics
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from dfs_cli.cost.operating_point import HIGHEST_SHARE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = ("method", "budget", "bits", "cost", "top1", "top5", "seed", "steps")
_STYLES = {
    "dfs": ("tab:red", "o", "DFS"),
    "uniform": ("tab:blue", "s", "static, uniform"),
    "mixed": ("tab:cyan", "D", "static, mixed"),
    "skipnet": ("tab:green", "^", "SkipNet gate (0/32)"),
    "cascade": ("tab:orange", "v", "cascade of two static"),
}


def points_csv(results: dict[str, Any]) -> str:
    """A row per point."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(results["points"])
    return text.getvalue()


def summarise(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Mean cost and top-1 over seeds of each method at each budget or bitwidth; ``spread`` is top-1's largest less smallest."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for point in results["points"]:
        groups.setdefault((point["method"], point["budget"], point["bits"]), []).append(point)
    rows = []
    for (method, budget, bits), points in groups.items():
        top1 = [p["top1"] for p in points]
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
                "dynamics": points[0].get("dynamics"),
                "members": points[0].get("members"),
            }
        )
    return rows


def verdicts(results: dict[str, Any]) -> list[dict[str, Any]]:
    """For each budget: DFS, the best baseline at equal or lower cost, and the difference in points of top-1.

    A baseline counts where it costs no more than the budget allows, or than DFS did: DFS may end a little below it.
    """
    rows = summarise(results)
    found = []
    for own in sorted((r for r in rows if r["method"] == "dfs"), key=lambda r: -r["budget"]):
        limit = max(own["cost"], HIGHEST_SHARE * own["budget"])
        rivals = [r for r in rows if r["method"] != "dfs" and r["cost"] <= limit * (1 + 1e-9)]
        static = [r for r in rivals if r["method"] in ("uniform", "mixed")]
        best = max(rivals, key=lambda r: r["top1"], default=None)
        best_static = max(static, key=lambda r: r["top1"], default=None)
        found.append(
            {
                "budget": own["budget"],
                "dfs": own,
                "best": best,
                "difference": None if best is None else own["top1"] - best["top1"],
                "best_static": best_static,
                "difference_to_static": None if best_static is None else own["top1"] - best_static["top1"],
            }
        )
    return found


def _name(row: dict[str, Any]) -> str:
    if row["members"]:
        return f"{row['method']} ({' + '.join(m.removeprefix('uniform ') for m in row['members'])})"
    return f"{row['method']} {row['bits']} bit" if row["bits"] else row["method"]


def print_sweep(console: Console, results: dict[str, Any]) -> None:
    """All points from dear to cheap, and the verdicts."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    repeated = any(row["seeds"] > 1 for row in summarise(results))
    headings = ["method", "budget", "cost", "top-1 (%)", *(["spread"] if repeated else []), "policies", "one for all"]
    for heading in headings:
        grid.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for row in sorted(summarise(results), key=lambda r: (-r["cost"], r["method"])):
        dynamics = row["dynamics"]
        grid.add_row(
            _name(row),
            "" if row["budget"] is None else f"{row['budget']:g}",
            f"{row['cost']:.4f}",
            f"{row['top1']:.2f}",
            *([f"{row['spread']:.2f}"] if repeated else []),
            str(dynamics["policies"]) if dynamics else "1" if row["method"] != "cascade" else "2",
            f"{dynamics['common_top1']:.2f} {dynamics['common_cost']:.4f}" if dynamics else "",
            style="bold" if row["method"] == "dfs" else "",
        )
    console.print(
        f"{results['model']}, dense top-1 {results['original']['top1']:.2f} %; one for all: top-1 and cost when every image "
        "gets the most common policy",
        highlight=False,
    )
    console.print(grid)
    for skipped in results["skipped"]:
        what = f"{skipped['bits']} bit" if skipped["bits"] else f"{skipped['budget']:g}"
        console.print(f"without {skipped['method']} {what}: {skipped['reason']}", highlight=False, style="dim")
    console.print()
    for verdict in verdicts(results):
        console.print(verdict_line(verdict), highlight=False)


def verdict_line(verdict: dict[str, Any]) -> str:
    """A verdict in words; where a baseline wins, that is said."""
    own, best = verdict["dfs"], verdict["best"]
    missed = "" if own["keeps_budget"] else " (budget missed)"
    line = f"budget {verdict['budget']:g}: DFS {own['top1']:.2f} at {own['cost']:.4f}{missed}"
    if best is None:
        return f"{line}; no baseline costs as little"
    difference = round(verdict["difference"], 2)
    outcome = (
        f"wins by {difference:.2f}" if difference > 0 else f"loses by {-difference:.2f}" if difference else "draws"
    )
    return f"{line}; best baseline {_name(best)} {best['top1']:.2f} at {best['cost']:.4f}: DFS {outcome}"


def plot_sweep(results: dict[str, Any]) -> Figure:
    """Accuracy over cost (logarithmic), a line per method and the dense network's accuracy; every point is labelled.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(8.6, 5.2), layout="constrained")
    axes: Axes = figure.subplots()
    rows = summarise(results)
    dense = results["original"]["top1"]
    axes.axhline(dense, color="0.6", linewidth=1, linestyle="--", zorder=1)
    axes.annotate(
        f"dense {dense:.2f}", (0.002, dense), xycoords=("axes fraction", "data"), fontsize=7, color="0.4", va="bottom"
    )
    # Points far below the rest (2 bits, hardly any blocks) would flatten everything else.
    lowest = min(r["top1"] for r in rows if r["method"] == "dfs")
    floor = min(lowest, dense) - max(6.0, 2 * (dense - lowest))
    for method, (colour, marker, label) in _STYLES.items():
        own = sorted((r for r in rows if r["method"] == method), key=lambda r: r["cost"])
        if not own:
            continue
        shown = [max(r["top1"], floor) for r in own]
        axes.plot(
            [r["cost"] for r in own], shown, color=colour, marker=marker, markersize=5, linewidth=1.2, label=label,
            zorder=3 if method == "dfs" else 2,
        )  # fmt: skip
        for row, y in zip(own, shown, strict=True):
            text = f"{row['bits']} bit" if row["bits"] else f"{row['budget']:g}"
            below = f" ({row['top1']:.1f})" if row["top1"] < floor else ""
            offset = {"dfs": (0, 6), "cascade": (0, -11), "mixed": (9, -9), "uniform": (-8, -11), "skipnet": (6, 4)}[
                method
            ]
            axes.annotate(
                text + below, (row["cost"], y), xytext=offset, textcoords="offset points", fontsize=6.5, color=colour,
                ha="center",
            )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("cost: bit-weighted MACs, fraction of the dense 32-bit network's")
    axes.set_ylabel("top-1 (%)")
    axes.set_title(f"{results['model']}: accuracy over cost", fontsize=10)
    axes.grid(True, which="major", color="0.92", zorder=0)
    figure.legend(frameon=False, loc="outside lower center", ncols=len(_STYLES), fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure
