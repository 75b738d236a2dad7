"""Tables and bars for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dfs_cli.artifact.manifest import Manifest
from dfs_cli.cost.table import CostTable
from dfs_cli.records import Evaluation
from dfs_cli.report.cost import LayerRow, agreement_text, dynamics_record, layer_rows

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
    kind = "synthetic images" if evaluation.is_synthetic else "images"
    console.print(f"{manifest.architecture}, {evaluation.images} {kind}", highlight=False)
    console.print(grid)
    console.print(legend, soft_wrap=True)
    answers = "same answers as the original" if evaluation.is_synthetic else "top-1"
    console.print(
        f"{answers} {evaluation.top1:.2f}   cost {evaluation.cost:.4f} of dense"
        + (f" (budget {manifest.budget:g}" if manifest.budget else " (no budget")
        + f"; all at 8 bits: {table.uniform_cost(8):.4f})",
        highlight=False,
    )
    console.print(dynamics_text(dynamics_record(evaluation), evaluation.is_synthetic), highlight=False)


def print_plan(console: Console, name: str, table: CostTable, budget: float) -> None:
    """The plan of a conversion: MACs of each block and the cost of each option."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    grid.add_column("block", no_wrap=True)
    grid.add_column("MMACs", justify="right", no_wrap=True)
    for bits in table.options:
        grid.add_column("skip" if bits == 0 else f"{bits} bit", justify="right", no_wrap=True)
    for block, macs, costs in zip(table.blocks, table.block_macs, table.option_costs[-1].tolist(), strict=True):
        grid.add_row(block, f"{macs / 1e6:.2f}", *(f"{cost:.4f}" for cost in costs))
    always = sum(layer.macs for layer in table.layers if layer.block is None)
    grid.add_row("always", f"{always / 1e6:.2f}", f"{table.fixed_layers_costs[-1]:.4f}")
    gate_macs, gate_cost = sum(map(sum, table.controller_macs)), sum(table.controller_costs)
    if gate_macs:
        grid.add_row("gate", f"{gate_macs / 1e6:.2f}", f"{gate_cost:.4f}")
    console.print(f"{name}: cost of each option, as a fraction of the dense network", highlight=False)
    console.print(grid)
    for line in (
        f"dense network      {table.dense_macs / 1e9:.4g} GMACs",
        f"reachable budgets  {table.cheapest:.4f} to {table.dearest:.4f}, asked for {budget:g}",
        f"for comparison     {table.uniform_cost(8):.4f} with everything statically at 8 bits",
    ):
        console.print(line, highlight=False)


def dynamics_text(dynamics: dict[str, Any], is_synthetic: bool = False) -> str:
    """How dynamic a network is, in two lines."""
    return (
        f"{dynamics['policies']} policies, {dynamics['passes']:.2f} passes per image, "
        f"{dynamics['choice_entropy']:.2f} bits of entropy per choice, "
        f"{dynamics['variance_between_images']:.1%} of cost variance between images\n"
        f"the most common policy ({dynamics['common_share']:.1%} of images) for all: "
        f"{'same answers' if is_synthetic else 'top-1'} {dynamics['common_top1']:.2f} at cost {dynamics['common_cost']:.4f}"
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
    original = record.get("original_top1")
    lost = "" if original is None else f"   the original has {original:.2f}: {record['top1'] - original:+.2f}"
    grid.add_row("top-1", f"{record['top1']:.2f} %{lost}")
    grid.add_row("top-5", f"{record['top5']:.2f} %")
    grid.add_row(
        "cost", f"{record['cost']:.4f} of {record['scale']}{budget}   all at 8 bits: {record['cost_all_8_bit']:.4f}"
    )
    limit = "" if record["limit"] is None else f"   limit {record['limit']:g}"
    grid.add_row(
        "", f"median {record['cost_p50']:.4f}, p95 {record['cost_p95']:.4f}, max {record['cost_max']:.4f}{limit}"
    )
    grid.add_row("GMACs", f"{record['gmacs_bitweighted']:.4g} bit-weighted, {record['gmacs_dense']:.4g} dense")
    shares = "   ".join(
        f"{'skip' if b == 0 else f'{b} bit'} {share:.1%}" for b, share in record["option_shares"].items()
    )
    grid.add_row("chosen", shares)
    grid.add_row("dynamic", dynamics_text(record["dynamics"]))
    grid.add_row("agrees", agreement_text(record["agreement"]))
    if record.get("data_free"):
        kept = "kept" if record["keeps_budget"] else "missed"
        grid.add_row("data-free", f"tuned without images: the budget is {kept} on these; dfs convert --data gives more")
    console.print(grid, highlight=False)


def print_conversion(console: Console, report: dict[str, Any]) -> None:
    """The result of a conversion, in a few lines."""
    unreadable = report["unreadable_images"] + report["configuration"]["unreadable_training_images"]
    lines = [
        _accuracy_text(report),
        f"cost    {report['cost']:.4f} of {report['scale']}, budget {report['budget']:g} "
        f"(everything statically at 8 bits: {report['cost_all_8_bit']:.4f})",
        f"spent   {spending_text(report)}",
        f"agrees  {agreement_text(report['agreement'])}",
    ]
    if unreadable:
        lines.append(f"left out {len(unreadable)} unreadable images: {', '.join(unreadable[:10])}")
    if report["limit"] is not None:
        lines.insert(2, f"limit   {report['limit']:g}; the dearest image costs {report['cost_max']:.4f}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _accuracy_text(report: dict[str, Any]) -> str:
    if report["data_free"]:
        return (
            f"answers {report['same_answers']:.2f} % as the original on {report['images']} synthetic images; top-1 is not "
            "known: dfs eval FILE --data DIR measures it, dfs convert MODEL --data DIR gives more"
        )
    return f"top-1   {report['top1_before']:.2f} % -> {report['top1_after']:.2f} % on {report['images']} images"


def spending_text(report: dict[str, Any]) -> str:
    """How much of the budget was spent, and why."""
    share = f"{report['cost'] / report['budget']:.0%} of the budget"
    if report["data_free"]:
        return f"{share}; no image, whatever it shows, costs more than {report['bound']:.4f}: a bound, not an estimate"
    if report["spend"]:
        return f"{share}, which was to be spent"
    if report["cost"] > 0.9 * report["budget"]:
        return share
    least, most = report["reachable_budgets"]
    if least == most:
        return f"{share}: more bits would change next to nothing, or its options have no more"
    if most < 0.9 * report["budget"]:
        share += f", of which this network can spend {most:.4f}"
    return f"{share}: on the held-out images more gains nothing (--spend reaches for the budget itself)"


def print_export(console: Console, record: dict[str, Any], bits: Sequence[int]) -> None:
    """The graph that was written, and how it compares with the network."""
    kind = "images" if record["labelled"] else "random images"
    lines = [f"{record['onnx']}, {record['bytes'] / 2**20:.1f} MiB, blocks hand on {record['features']} features"]
    if record["batch"] != 1:
        size = "any number of" if record["batch"] == "dynamic" else record["batch"]
        lines.append(f"takes {size} images at once, each with its own decisions")
    if any(2 <= b <= 7 for b in bits):
        lines.append("options of 2 to 7 bits run on 8-bit kernels: they take as long as 8 bits")
    lines.append(f"compared on {record['images']} {kind}")
    lines.append(f"same decisions {record['same_decisions']:8.2%}, same answers {record['same_answers']:.2%}")
    if record["labelled"]:
        lines.append(f"top-1          {record['onnx_top1']:8.2f}, of the network {record['top1']:.2f}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
