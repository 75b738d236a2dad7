"""The table of convertible models."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from dfs_cli.catalogue import ModelSummary

_ROW = "{:32} {:26} {:>6} {:>9} {:>9} {:>5}  {}"


def print_models(console: Console, models: Sequence[ModelSummary]) -> None:
    """A line per architecture."""
    lines = [_ROW.format("model", "block", "blocks", "GMACs", "params M", "size", "weights")]
    for model in models:
        tags = ", ".join(name.partition(".")[2] or name for name in model.weights) or "-"
        macs, params = f"{model.macs / 1e9:.3f}", f"{model.params / 1e6:.2f}"
        lines.append(_ROW.format(model.name, model.family, model.blocks, macs, params, model.image_size, tags))
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
