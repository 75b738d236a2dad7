"""``dfs list``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from dfs_cli.cli.output import Output
from dfs_cli.errors import UnsupportedModelError

EXAMPLES = """
Examples:

  dfs list

  dfs list 'seresne*' --json
"""


def list_models(
    sink: Output,
    pattern: Annotated[str, typer.Argument(metavar="[PATTERN]", help="Wildcards, as 'seresne*'.")] = "*",
) -> None:
    """List the architectures that can be converted."""
    from dfs_cli.catalogue import list_convertible
    from dfs_cli.report.models import print_models

    models = list_convertible(pattern)
    if not models:
        from dfs_cli.models.zoo import close_matches, current_name

        models = list_convertible(current_name(pattern).partition(".")[0])
    if not models:
        raise UnsupportedModelError(f"no convertible model matches {pattern!r}{close_matches(pattern)}")

    def render(console: Console) -> None:
        print_models(console, models)

    sink.result([model.to_dict() for model in models], render)
