"""The ``dfs`` program."""

from __future__ import annotations

from typing import Annotated

import typer

from dfs_cli import __version__
from dfs_cli.cli import bench, bench_tuning, convert, evaluate, export, list_models, profile, sweep
from dfs_cli.cli.errors import one_line_errors
from dfs_cli.cli.options import expand

app = typer.Typer(
    name="dfs",
    help="Make pretrained timm ResNets input-adaptive: every image pays only for the bits it needs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
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


for name, command, examples in (
    ("convert", convert.convert, convert.EXAMPLES),
    ("eval", evaluate.evaluate, evaluate.EXAMPLES),
    ("profile", profile.profile, profile.EXAMPLES),
    ("sweep", sweep.sweep, sweep.EXAMPLES),
    ("export", export.export, export.EXAMPLES),
    ("bench", bench.bench, bench.EXAMPLES),
    ("bench-tuning", bench_tuning.bench_tuning, bench_tuning.EXAMPLES),
    ("list", list_models.list_models, list_models.EXAMPLES),
):
    app.command(name, epilog=examples)(one_line_errors(expand(command)))
