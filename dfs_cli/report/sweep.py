"""The results of a sweep for people: table, verdicts in words, CSV, and the figure of accuracy over cost."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = ("method", "budget", "bits", "views", "cost", "top1", "top5", "seed", "steps")
_STYLES = {
    "dfs": ("tab:red", "o", "DFS"),
    "uniform": ("tab:blue", "s", "static, uniform"),
    "mixed": ("tab:cyan", "D", "static, mixed"),
    "uniform, 2 views": ("tab:purple", "s", "static, uniform, 2 views"),
    "mixed, 2 views": ("tab:pink", "D", "static, mixed, 2 views"),
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


def _name(row: dict[str, Any]) -> str:
    if row["members"]:
        return f"{row['method']} ({' + '.join(m.removeprefix('uniform ') for m in row['members'])})"
    return f"{row['method']} {row['bits']} bit" + _views(row) if row["bits"] else _line(row)


def _line(row: dict[str, Any]) -> str:
    """The line of the plot that a row is on."""
    return f"{row['method']}{_views(row)}"


def _views(row: dict[str, Any]) -> str:
    return "" if row["views"] == 1 else f", {row['views']} views"


def print_sweep(console: Console, results: dict[str, Any]) -> None:
    """All points, the most expensive first, and the verdicts."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    repeated = any(row["seeds"] > 1 for row in results["summary"])
    spread = ["spread"] if repeated else []
    headings = ["method", "budget", "cost", "top-1 (%)", "±", *spread, "policies", "one for all"]
    for heading in headings:
        grid.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=heading != "method")
    for row in sorted(results["summary"], key=lambda r: (-r["cost"], r["method"])):
        dynamics = row["dynamics"]
        grid.add_row(
            _name(row),
            "" if row["budget"] is None else f"{row['budget']:g}",
            f"{row['cost']:.4f}",
            f"{row['top1']:.2f}",
            _half_width(row["top1_interval"]),
            *([f"{row['spread']:.2f}" if row["seeds"] > 1 else "-"] if repeated else []),
            f"{dynamics['policies']:.0f}" if dynamics else "1" if row["method"] != "cascade" else "2",
            f"{dynamics['common_top1']:.2f} {dynamics['common_cost']:.4f}" if dynamics else "",
            style="bold" if row["method"] == "dfs" else "",
        )
    console.print(
        f"{results['model']}, dense top-1 {results['original']['top1']:.2f} %; ±: half of its 95% interval over images "
        "(differences are judged image by image, below); one for all: top-1 and cost when every image gets the most common "
        "policy",
        highlight=False,
    )
    console.print(grid)
    for skipped in results["skipped"]:
        what = f"{skipped['bits']} bit" if skipped["bits"] else f"{skipped['budget']:g}"
        what += _views(skipped)
        console.print(f"without {skipped['method']} {what}: {skipped['reason']}", highlight=False, style="dim")
    for point in results["points"]:
        if point.get("tried"):
            console.print(tried_line(point), highlight=False, style="dim")
    console.print()
    for verdict in results["verdicts"]:
        console.print(verdict_line(verdict), highlight=False)
    if results["overall"] is not None:
        console.print(overall_line(results["overall"]), highlight=False)


def _half_width(interval: list[float] | None) -> str:
    return "" if interval is None else f"{(interval[1] - interval[0]) / 2:.2f}"


def tried_line(point: dict[str, Any]) -> str:
    """What was tried for a point, in words."""
    ways = ", ".join(
        f"{'static' if t['gate'] == 'static' else 'gated'} {t['held_out_top1']:.2f} after {t['steps']} steps"
        for t in point["tried"]
    )
    unfinished = "; not finished" if point.get("unfinished") else ""
    return f"{point['method']} {point['budget']:g}, top-1 on held-out images: {ways}{unfinished}"


def verdict_line(verdict: dict[str, Any]) -> str:
    """A verdict in words, also where a baseline wins."""
    dfs, best = verdict["dfs"], verdict["best"]
    notes = [f"mean of {dfs['seeds']} seeds"] if dfs["seeds"] > 1 else []
    notes += [] if dfs["keeps_budget"] else ["budget missed"]
    line = f"budget {verdict['budget']:g}: DFS {dfs['top1']:.2f} at {dfs['cost']:.4f}"
    line += f" ({', '.join(notes)})" if notes else ""
    if best is None:
        return f"{line}; no baseline keeps the budget"
    line += f"; best baseline {_name(best)} {best['top1']:.2f} at {best['cost']:.4f}: "
    line += _outcome(verdict["difference"], verdict["interval"], verdict["outcome"])
    static = verdict["best_static"]
    if static not in (None, best):
        line += f"; best static one {_name(static)} {static['top1']:.2f} at {static['cost']:.4f}: "
        line += _outcome(verdict["difference_to_static"], verdict["interval_to_static"], verdict["outcome_to_static"])
    return line


def overall_line(overall: dict[str, Any]) -> str:
    """The verdict over all budgets in words."""
    outcome = _outcome(overall["difference"], overall["interval"], overall["outcome"])
    return f"mean over {overall['budgets']} budgets, beside the best baselines: {outcome}"


def _outcome(difference: float, interval: list[float] | None, outcome: str | None) -> str:
    """A difference in points of top-1, with its interval; only what is outside of it is called a win or a loss."""
    if interval is None or outcome is None:
        return f"difference {difference:+.2f}, which may be chance (no interval: answers unknown, or of other images)"
    low, high = interval
    if outcome == "draw":
        return f"draw: {difference:+.2f} (95%: {low:.2f} to {high:.2f})"
    if outcome == "loss":
        return f"DFS loses by {-difference:.2f} (95%: {-high:.2f} to {-low:.2f})"
    return f"DFS wins by {difference:.2f} (95%: {low:.2f} to {high:.2f})"


def plot_sweep(results: dict[str, Any]) -> Figure:
    """Accuracy over cost (logarithmic), a line per method and the dense network's accuracy; every point is labelled.

    Pale bars are 95% intervals of top-1 over images, bars with caps are the spread over seeds. At the dynamic networks stands
    whether they win.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(8.6, 5.2), layout="constrained")
    axes: Axes = figure.subplots()
    rows = results["summary"]
    dense = results["original"]["top1"]
    outcomes = {v["budget"]: v["outcome"] for v in results["verdicts"] if v["outcome"] is not None}
    axes.axhline(dense, color="0.6", linewidth=1, linestyle="--", zorder=1)
    axes.annotate(
        f"dense {dense:.2f}", (0.002, dense), xycoords=("axes fraction", "data"), fontsize=7, color="0.4", va="bottom"
    )
    # Points far below the rest (2 bits, hardly any blocks) would flatten everything else.
    lowest = min((r["top1"] for r in rows if r["method"] == "dfs"), default=dense)
    floor = min(lowest, dense) - max(6.0, 2 * (dense - lowest))
    labels: list[tuple[float, float, str, str]] = []
    for method, (colour, marker, label) in _STYLES.items():
        points = sorted((r for r in rows if _line(r) == method), key=lambda r: r["cost"])
        if not points:
            continue
        clipped = [max(r["top1"], floor) for r in points]
        axes.plot(
            [r["cost"] for r in points], clipped, color=colour, marker=marker, markersize=5, linewidth=1.2, label=label,
            zorder=3 if method == "dfs" else 2,
        )  # fmt: skip
        for row, y in zip(points, clipped, strict=True):
            text = f"{row['bits']} bit" if row["bits"] else f"{row['budget']:g}"
            text += f" {outcomes[row['budget']]}" if method == "dfs" and row["budget"] in outcomes else ""
            below = f" ({row['top1']:.1f})" if row["top1"] < floor else ""
            labels.append((row["cost"], y, text + below, colour))
            if below:
                continue
            if row["top1_interval"] is not None:
                axes.vlines(row["cost"], *row["top1_interval"], color=colour, linewidth=3, alpha=0.15, zorder=1.5)
            if row["seeds"] > 1:
                axes.errorbar(row["cost"], y, row["spread"] / 2, color=colour, elinewidth=0.8, capsize=2)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("cost: bit-weighted MACs, fraction of the dense 32-bit network's")
    axes.set_ylabel("top-1 (%)")
    meant = (
        f" ({', '.join(sorted(set(outcomes.values())))}: DFS beside the best baseline at no more cost)"
        if outcomes
        else ""
    )
    axes.set_title(f"{results['model']}: accuracy over cost{meant}", fontsize=10)
    axes.grid(True, which="major", color="0.92", zorder=0)
    if any(row["top1_interval"] for row in rows):
        axes.plot([], [], color="0.5", linewidth=3, alpha=0.3, label="95% over images")
    if any(row["seeds"] > 1 for row in rows):
        axes.errorbar([], [], [], fmt="none", color="0.5", elinewidth=0.8, capsize=2, label="spread over seeds")
    if rows:
        figure.legend(
            frameon=False, loc="outside lower center", ncols=5, columnspacing=1.2, handletextpad=0.5, fontsize=7
        )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _label(figure, axes, labels)
    return figure


def _label(figure: Figure, axes: Axes, labels: list[tuple[float, float, str, str]]) -> None:
    """Write each text (x, y, text, colour) beside its point, in the nearest free place."""
    from matplotlib.patheffects import withStroke

    size = 6.5
    figure.draw_without_rendering()  # positions are known only after drawing
    point = figure.dpi / 72
    spots = axes.transData.transform([(x, y) for x, y, _, _ in labels]) / point
    occupied = [(x - 3, y - 3, x + 3, y + 3) for x, y in spots]
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
                    for b in occupied
                )
                places.append((overlap, dx, dy, box))
        _, dx, dy, box = min(places, key=lambda place: place[0])
        occupied.append(box)
        axes.annotate(
            text, (cost, top1), xytext=(dx, dy), textcoords="offset points", fontsize=size, color=colour, ha="center",
            va="center", zorder=4, path_effects=[withStroke(linewidth=2, foreground="white")],
        )  # fmt: skip
