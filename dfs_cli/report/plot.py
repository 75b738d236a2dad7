"""Figures, with matplotlib (an optional dependency)."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfs_cli.artifact.manifest import Manifest
from dfs_cli.atomic import File
from dfs_cli.errors import ConfigError, MissingDependencyError
from dfs_cli.records import Evaluation
from dfs_cli.report.cost import block_shares

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def why_not() -> str | None:
    """Why figures cannot be drawn; None: they can."""
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError:
        return "plots need matplotlib: pip install 'dfs-cli[plot]'"
    except Exception as error:  # whatever a broken installation or a broken setting of it raises
        return f"plots need matplotlib, which cannot be imported here: {' '.join(str(error).split())}"
    return None


def check_plot_path(path: Path) -> None:
    """Raises ConfigError where the suffix names no format, MissingDependencyError without matplotlib."""
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise ConfigError(f"plot {path}: expected a name that ends in {', '.join(PLOT_SUFFIXES)}")
    if reason := why_not():
        raise MissingDependencyError(reason)


def plot_choices(manifest: Manifest, evaluation: Evaluation) -> Figure:
    """Stacked bars, one per block: how often each bitwidth was chosen (after figure 5 of DFS, Shen et al., 2020).

    Returns:
        A matplotlib figure.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    table = manifest.table
    # Not pyplot: a library must not switch the caller's backend.
    figure = Figure(figsize=(max(6.0, 0.32 * len(table.blocks) + 3.0), 3.6), layout="constrained")
    axes = figure.subplots()
    colours = colormaps["viridis_r"]
    bottoms = [0.0] * len(table.blocks)
    blocks = block_shares(table, evaluation)
    for column, bits in enumerate(table.options):
        shares = [100 * row[bits] for row in blocks]
        colour = "0.85" if bits == 0 else colours(column / max(1, len(table.options) - 1))
        label = "skipped" if bits == 0 else f"{bits} bit"
        axes.bar(range(len(shares)), shares, bottom=bottoms, width=0.82, color=colour, label=label)
        bottoms = [b + s for b, s in zip(bottoms, shares, strict=True)]
    axes.set_xticks(range(len(table.blocks)), table.blocks, rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("images (%)" if table.passes == 1 else "images and passes (%)")
    axes.set_ylim(0, 100)
    axes.set_xlim(-0.6, len(table.blocks) - 0.4)
    axes.set_title(
        f"{manifest.architecture}: cost {evaluation.cost:.4f} of dense, top-1 {evaluation.top1:.2f} %", fontsize=10
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, reverse=True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def plot_times(record: dict[str, Any]) -> Figure:
    """Top-1 over the mean time of an image, for every candidate in ONNX Runtime, one image at a time; bars: the least and the
    largest mean of a pass over all images, and the standard error of top-1.

    Args:
        record: a :class:`dfs_cli.bench.inference.InferenceBench` as a dictionary, with the name of the ``model``.

    Returns:
        A matplotlib figure.

    Raises:
        ConfigError: no candidate has both.
    """
    from matplotlib.figure import Figure

    nothing: dict[str, Any] = {"name": "", "pairings": []}
    verdict = next((verdict for verdict in record["verdicts"] if verdict["batch"] == 1), nothing)
    own, others = verdict["name"], [pairing["name"] for pairing in verdict["pairings"]]
    rows = [
        row for row in record["rows"] if row["name"] in (own, *others) and row["batch"] == 1 and row["top1"] is not None
    ]
    if not rows:
        raise ConfigError("--plot: there is nothing to draw without ONNX Runtime and real images")
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        share = row["top1"] / 100
        error = 100 * math.sqrt(share * (1 - share) / record["images"])
        mean, low, high = row["mean_ms"], row["low_ms"], row["high_ms"]
        times = [[mean - low], [high - mean]]
        is_own = row["name"] == own
        axes.errorbar(
            [mean],
            [row["top1"]],
            xerr=times,
            yerr=[error],
            fmt="D" if is_own else "o",
            capsize=3,
            color="C3" if is_own else "C0",
        )
        axes.annotate(
            Path(record["model"]).stem if is_own else row["name"],
            (mean, row["top1"]), xytext=(6, 6), textcoords="offset points", fontsize=9,
        )  # fmt: skip
    axes.set_xlim(left=0, right=1.25 * max(row["high_ms"] for row in rows))
    axes.set_xlabel(
        f"mean time of an image (ms), ONNX Runtime, {record['threads']} thread{'s' * (record['threads'] > 1)}"
    )
    axes.set_ylabel(f"top-1 (%), {record['images']} images")
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def plot_file(figure: Figure, path: Path) -> File:
    """The figure, ready to be written to ``path``, in the format of its suffix."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lower()[1:], dpi=150)
    return File(path, buffer.getvalue())
