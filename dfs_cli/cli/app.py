"""The ``dfs`` program."""

from __future__ import annotations

from typing import Annotated

import typer

from dfs_cli import __version__
from dfs_cli.cli import bench, convert, evaluate, export, list_models, profile, sweep
from dfs_cli.cli.errors import one_line_errors

app = typer.Typer(
    name="dfs",
    help="Make pretrained timm ResNets input-adaptive: every image pays only for the bits it needs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dfs {__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Make pretrained timm ResNets input-adaptive: every image pays only for the bits it needs."""


app.command("convert")(one_line_errors(convert.convert))
app.command("eval")(one_line_errors(evaluate.evaluate))
app.command("profile")(one_line_errors(profile.profile))
app.command("sweep")(one_line_errors(sweep.sweep))
app.command("export")(one_line_errors(export.export))
app.command("bench")(one_line_errors(bench.bench))
app.command("list")(one_line_errors(list_models.list_models))
