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
                # Other seeds may have found other pairs.
                "members": list(members.pop()) if len(members) == 1 else [],
            }
        )
    return rows


def verdicts(results: dict[str, Any]) -> list[dict[str, Any]]:
    """For each budget: DFS, the best baseline within the budget, and the difference in points of top-1.

    A baseline counts where it costs no more than the budget allows, or than DFS did: DFS may end a little below it. Of equally
    accurate ones the cheapest is the best.
    """

    def best_of(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
        return max(rows, key=lambda r: (round(r["top1"], 4), -r["cost"]), default=None)

    rows = summarise(results)
    found = []
    for own in sorted((r for r in rows if r["method"] == "dfs"), key=lambda r: -r["budget"]):
        limit = max(own["cost"], HIGHEST_SHARE * own["budget"])
        rivals = [r for r in rows if r["method"] != "dfs" and r["cost"] <= limit * (1 + 1e-9)]
        best, best_static = best_of(rivals), best_of([r for r in rivals if r["method"] in ("uniform", "mixed")])
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
        grid.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=heading != "method")
    for row in sorted(summarise(results), key=lambda r: (-r["cost"], r["method"])):
        dynamics = row["dynamics"]
        grid.add_row(
            _name(row),
            "" if row["budget"] is None else f"{row['budget']:g}",
            f"{row['cost']:.4f}",
            f"{row['top1']:.2f}",
            *([f"{row['spread']:.2f}" if row["seeds"] > 1 else "-"] if repeated else []),
            f"{dynamics['policies']:.0f}" if dynamics else "1" if row["method"] != "cascade" else "2",
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
    notes = [f"mean of {own['seeds']} seeds"] if own["seeds"] > 1 else []
    notes += [] if own["keeps_budget"] else ["budget missed"]
    line = f"budget {verdict['budget']:g}: DFS {own['top1']:.2f} at {own['cost']:.4f}"
    line += f" ({', '.join(notes)})" if notes else ""
    if best is None:
        return f"{line}; no baseline keeps the budget"
    line += (
        f"; best baseline {_name(best)} {best['top1']:.2f} at {best['cost']:.4f}: DFS {_outcome(verdict['difference'])}"
    )
    static = verdict["best_static"]
    if static not in (None, best):
        line += f"; best static one {_name(static)} {static['top1']:.2f} at {static['cost']:.4f}: "
        line += f"DFS {_outcome(verdict['difference_to_static'])}"
    return line


def _outcome(difference: float) -> str:
    points = round(difference, 2)
    return f"wins by {points:.2f}" if points > 0 else f"loses by {-points:.2f}" if points else "draws"


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
    lowest = min((r["top1"] for r in rows if r["method"] == "dfs"), default=dense)
    floor = min(lowest, dense) - max(6.0, 2 * (dense - lowest))
    labels: list[tuple[float, float, str, str]] = []
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
            labels.append((row["cost"], y, text + below, colour))
            if row["seeds"] > 1 and not below:
                axes.errorbar(row["cost"], y, row["spread"] / 2, color=colour, elinewidth=0.8, capsize=2)
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
    _label(figure, axes, labels)
    return figure


def _label(figure: Figure, axes: Axes, labels: list[tuple[float, float, str, str]]) -> None:
    """Write each text (x, y, text, colour) beside its point, in the nearest place that is still free."""
    from matplotlib.patheffects import withStroke

    size = 6.5
    figure.draw_without_rendering()  # places are known only then
    point = figure.dpi / 72
    spots = axes.transData.transform([(x, y) for x, y, _, _ in labels]) / point
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in spots]
    around = [(0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0)]
    for (x, y), (cost, top1, text, colour) in zip(spots, labels, strict=True):
        width, height = 0.58 * size * len(text), 1.1 * size
        places = []
        for far in (1.0, 1.6, 2.2, 2.8):
            for right, up in around:
                dx = right * (width / 2 + 4) * (far if not up else 1)
                dy = up * (height / 2 + 5) * far
                box = (x + dx - width / 2, y + dy - height / 2, x + dx + width / 2, y + dy + height / 2)
                overlap = sum(
                    max(0.0, min(box[2], b[2]) - max(box[0], b[0])) * max(0.0, min(box[3], b[3]) - max(box[1], b[1]))
                    for b in taken
                )
                places.append((overlap, dx, dy, box))
        _, dx, dy, box = min(places, key=lambda place: place[0])
        taken.append(box)
        axes.annotate(
            text, (cost, top1), xytext=(dx, dy), textcoords="offset points", fontsize=size, color=colour, ha="center",
            va="center", zorder=4, path_effects=[withStroke(linewidth=2, foreground="white")],
        )  # fmt: skip
