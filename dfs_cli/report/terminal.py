"""Tables and bars for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dfs_cli.artifact.manifest import Evaluation, Manifest
from dfs_cli.cost.table import CostTable
from dfs_cli.report.cost import LayerRow, dynamics_record, layer_rows

# Grey for skipped, then from blue to red, in the 256 colours of terminals.
_COLOURS = (240, 21, 27, 33, 39, 45, 51, 49, 47, 82, 118, 154, 190, 226, 220, 214, 208, 202, 196)
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def _colours(options: Sequence[int]) -> dict[int, str]:
    """A colour per bitwidth, spread from grey (skipped) to red (most bits)."""
    spread = (len(_COLOURS) - 1) / max(1, len(options) - 1)
    return {bits: f"color({_COLOURS[round(i * spread)]})" for i, bits in enumerate(sorted(options))}


def _lengths(histogram: dict[int, float], width: int) -> dict[int, int]:
    """Characters per bitwidth, ``width`` in all (largest remainders)."""
    exact = {bits: share * width for bits, share in histogram.items()}
    lengths = {bits: int(value) for bits, value in exact.items()}
    rest = width - sum(lengths.values())
    for bits in sorted(exact, key=lambda b: lengths[b] - exact[b])[:rest]:
        lengths[bits] += 1
    return lengths


def _bar(row: LayerRow, colours: dict[int, str], width: int, plain: bool) -> Text:
    bar = Text()
    for bits, length in sorted(_lengths(row["histogram"], width).items()):
        # Without colour, a bitwidth is written as a digit of base 36, so that bars stay readable.
        bar.append((_DIGITS[bits] if plain else "█") * length, style="" if plain else colours[bits])
    return bar


def print_profile(console: Console, manifest: Manifest, evaluation: Evaluation, width: int = 32) -> None:
    """Bitwidth histograms: a row per layer, a colour per bitwidth."""
    table = manifest.table
    plain = console.color_system is None
    rows = layer_rows(table, evaluation)
    colours = _colours(sorted({bits for row in rows for bits in row["histogram"]}))
    grid = Table(box=None, pad_edge=False, header_style="bold")
    grid.add_column("layer", no_wrap=True)
    grid.add_column(
        "bitwidths over images" if table.passes == 1 else "bitwidths over images and passes",
        no_wrap=True,
        min_width=width,
    )
    for heading in ("mean bits", "mean cost"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        style = "" if row["block"] is not None else "dim"
        grid.add_row(
            Text(row["name"], style=style),
            _bar(row, colours, width, plain),
            f"{row['mean_bits']:.2f}",
            f"{row['mean_cost']:.5f}",
        )
    legend = Text("bits  ")
    for bits, colour in colours.items():
        label = "skipped" if bits == 0 else str(bits)
        legend.append(f"{_DIGITS[bits]}={label}  " if plain else "██ ", style="" if plain else colour)
        if not plain:
            legend.append(f"{label}  ")
    console.print(f"{manifest.architecture}, {evaluation.images} images", highlight=False)
    console.print(grid)
    console.print(legend, soft_wrap=True)
    console.print(
        f"top-1 {evaluation.top1:.2f}   cost {evaluation.cost:.4f} of dense"
        + (f" (budget {manifest.budget:g}" if manifest.budget else " (no budget")
        + f"; all at 8 bits: {table.uniform_cost(8):.4f})",
        highlight=False,
    )
    console.print(dynamics_text(dynamics_record(evaluation)), highlight=False)


def print_plan(console: Console, name: str, table: CostTable, budget: float) -> None:
    """The plan of a conversion: MACs of each block and the cost of each option."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    grid.add_column("block", no_wrap=True)
    grid.add_column("MMACs", justify="right", no_wrap=True)
    for bits in table.options:
        grid.add_column("skip" if bits == 0 else f"{bits} bit", justify="right", no_wrap=True)
    for block, macs, prices in zip(table.blocks, table.block_macs, table.prices.tolist(), strict=True):
        grid.add_row(block, f"{macs / 1e6:.2f}", *(f"{price:.4f}" for price in prices))
    always = sum(layer.macs for layer in table.layers if layer.block is None)
    grid.add_row("always", f"{always / 1e6:.2f}", f"{table.edges_cost:.4f}")
    grid.add_row("gate", f"{sum(table.gate_macs) / 1e6:.2f}", f"{table.gate_cost:.4f}")
    console.print(f"{name}: cost of each option, as a fraction of the dense network", highlight=False)
    console.print(grid)
    for line in (
        f"dense network      {table.dense_macs / 1e9:.4g} GMACs",
        f"reachable budgets  {table.cheapest:.4f} to {table.dearest:.4f}, asked for {budget:g}",
        f"for comparison     {table.uniform_cost(8):.4f} with everything statically at 8 bits",
    ):
        console.print(line, highlight=False)


def dynamics_text(dynamics: dict[str, Any]) -> str:
    """How dynamic a network is, in two lines."""
    return (
        f"{dynamics['policies']} policies, {dynamics['passes']:.2f} passes per image, "
        f"{dynamics['choice_entropy']:.2f} bits of entropy per choice, "
        f"{dynamics['variance_between_images']:.1%} of cost variance between images\n"
        f"the most common policy ({dynamics['common_share']:.1%} of images) for all: "
        f"top-1 {dynamics['common_top1']:.2f} at cost {dynamics['common_cost']:.4f}"
    )


def print_evaluation(console: Console, record: dict[str, Any]) -> None:
    """The figures of ``dfs eval``."""
    grid = Table(show_header=False, box=None, pad_edge=False)
    grid.add_column(style="bold")
    grid.add_column()
    budget = "" if record["budget"] is None else f"   budget {record['budget']:g}"
    grid.add_row("model", f"{record['model']}, {record['param_count']} M parameters")
    grid.add_row(
        "images", f"{record['images']} at {record['img_size']} pixels, {record['images_per_second']:.1f} per second"
    )
    grid.add_row("top-1", f"{record['top1']:.2f} %")
    grid.add_row("top-5", f"{record['top5']:.2f} %")
    grid.add_row(
        "cost", f"{record['cost']:.4f} of dense 32-bit{budget}   all at 8 bits: {record['cost_all_8_bit']:.4f}"
    )
    grid.add_row("", f"median {record['cost_p50']:.4f}, p95 {record['cost_p95']:.4f}, max {record['cost_max']:.4f}")
    grid.add_row("GMACs", f"{record['gmacs_bitweighted']:.4g} bit-weighted, {record['gmacs_dense']:.4g} dense")
    shares = "   ".join(
        f"{'skip' if b == 0 else f'{b} bit'} {share:.1%}" for b, share in record["option_shares"].items()
    )
    grid.add_row("chosen", shares)
    grid.add_row("dynamic", dynamics_text(record["dynamics"]))
    console.print(grid, highlight=False)
