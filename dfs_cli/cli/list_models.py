"""``dfs list``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from dfs_cli.errors import UnsupportedModelError


def list_models(
    pattern: Annotated[str, typer.Argument(metavar="[PATTERN]", help="Wildcards, as 'seresne*'.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list on stdout.")] = False,
) -> None:
    """List the architectures that can be converted."""
    from dfs_cli.models.zoo import ModelSummary, close_matches, list_convertible

    found: list[ModelSummary] = []
    row = "{:32} {:10} {:>6} {:>9} {:>9} {:>5}  {}"
    for model in list_convertible(pattern):
        if not found and not as_json:
            typer.echo(row.format("model", "block", "blocks", "GMACs", "params M", "size", "weights"))
        found.append(model)
        if not as_json:
            tags = ", ".join(w.partition(".")[2] or w for w in model.weights) or "-"
            typer.echo(
                row.format(
                    model.name, model.family, model.blocks, f"{model.macs / 1e9:.3f}", f"{model.params / 1e6:.2f}",
                    model.image_size, tags,
                )
            )  # fmt: skip
    if not found:
        raise UnsupportedModelError(f"no convertible model matches {pattern!r}{close_matches(pattern)}")
    if as_json:
        typer.echo(json.dumps([model._asdict() for model in found]))
