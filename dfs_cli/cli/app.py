"""The ``dfs`` program."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from dfs_cli import __version__
from dfs_cli.cli import bench, bench_tuning, convert, evaluate, export, list_models, profile, sweep
from dfs_cli.cli.errors import explain, explain_usage, one_line_errors, say_error
from dfs_cli.cli.expand import expand
from dfs_cli.cli.streams import signals, standard_streams


class Program(typer.Typer):
    """A program that says in one line what is wrong with its command line, its surroundings or its output."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with standard_streams() as lost:
            code = self._run(*args, **kwargs)
            if error := lost():
                say_error(f"standard output cannot be written: {error.strerror}")
                code = code or 1
        sys.exit(code)

    def _run(self, *args: Any, **kwargs: Any) -> int:
        try:
            with signals():
                return super().__call__(*args, **kwargs, standalone_mode=False) or 0
        except SystemExit as error:  # of shell completion
            return error.code if isinstance(error.code, int) else 0
        except (Exception, KeyboardInterrupt) as error:
            code = explain(error)
            if code is None and isinstance(error, Exception):
                code = explain_usage(error)
            if code is None:
                raise
            return code


app = Program(
    name="dfs",
    help="Make pretrained timm ResNets input-adaptive: every image pays only for the bits it needs.",
    invoke_without_command=True,
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
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Make pretrained timm ResNets input-adaptive: every image pays only for the bits it needs."""
    if context.invoked_subcommand is None:
        if text := context.get_help():  # with rich it is printed already
            typer.echo(text)
        raise typer.Exit(2)


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
