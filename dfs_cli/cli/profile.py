"""``dfs profile``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfs_cli.cli import options
from dfs_cli.cli.output import Output
from dfs_cli.errors import ConfigError

EXAMPLES = """
Examples:

  dfs profile

  dfs profile model.safetensors --plot choices.png

  dfs profile model.safetensors --data imagenet/ --csv
"""


def profile(
    images: options.EvalDataOptions,
    sink: Output,
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="What dfs convert wrote.")] = Path("model.safetensors"),
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure anew; implied by --data and --dataset.", rich_help_panel=options.DATA),
    ] = False,
    batch_size: options.EvalBatchSize = 256,
    device: options.DeviceOption = "auto",
    workers: options.Workers = None,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print a CSV row per layer on stdout.", rich_help_panel=options.OUTPUT)
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Draw the choices per block (.png, .svg or .pdf).",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    force: options.Force = False,
) -> None:
    """Show how often each layer ran at each bitwidth."""
    if sink.as_json and as_csv:
        raise ConfigError("--json and --csv cannot be combined")
    data = images.config()

    from dfs_cli import api
    from dfs_cli.artifact.artifact import read_manifest
    from dfs_cli.outputs import reserve
    from dfs_cli.report.cost import layers_csv, profile_record
    from dfs_cli.report.plot import check_plot_path, plot_choices, plot_file
    from dfs_cli.report.terminal import print_profile

    if plot is not None:
        check_plot_path(plot)
    with reserve([plot] if plot else [], force, [file, images.class_map]) as outputs:
        if measure or data.names_data:
            converted = api.load(file, device)
            manifest = converted.manifest
            with sink.observer() as observer:
                evaluation = api.evaluate(converted, data, batch_size=batch_size, workers=workers, observer=observer)
        else:
            manifest = read_manifest(file)
            if manifest.validation is None:
                raise ConfigError(f"{file} holds no histograms: pass --data DIR to measure them")
            evaluation = manifest.validation
        if as_csv:
            typer.echo(layers_csv(manifest.table, evaluation), nl=False)
        else:
            record = profile_record(manifest, evaluation)
            sink.result(record, lambda console: print_profile(console, manifest, evaluation))
        if plot is not None:
            outputs.write([plot_file(plot_choices(manifest, evaluation), plot)])
