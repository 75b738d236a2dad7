"""``dfs profile``."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dfs_cli.cli import options
from dfs_cli.errors import ConfigError


def profile(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="What dfs convert wrote.")] = Path("model.safetensors"),
    data: options.DataDir = None,
    dataset: options.Dataset = "",
    val_split: options.ValSplit = None,
    num_samples: options.NumSamples = None,
    dataset_download: options.Download = False,
    measure: Annotated[bool, typer.Option("--measure", help="Measure anew; implied by --data and --dataset.")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images per batch.")] = 256,
    device: options.DeviceOption = "auto",
    workers: options.Workers = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print a CSV row per layer on stdout.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the choices per block (.png, .svg or .pdf).")
    ] = None,
    force: options.Force = False,
) -> None:
    """Show how often each layer ran at each bitwidth."""
    if as_json and as_csv:
        raise ConfigError("--json and --csv cannot be combined")
    data_config = options.data_config(data, dataset, None, val_split, num_samples, dataset_download)

    from rich.console import Console

    from dfs_cli import api
    from dfs_cli.artifact.file import read_manifest
    from dfs_cli.artifact.files import check_writable
    from dfs_cli.cli.progress import create_observer, stderr_console
    from dfs_cli.report.cost import dynamics_record, layer_rows
    from dfs_cli.report.plot import check_plot_path, plot_choices, save_plot
    from dfs_cli.report.terminal import print_profile

    if plot is not None:
        check_plot_path(plot)
        check_writable([plot], force)
    if measure or data is not None or dataset:
        converted = api.load(file, device)
        manifest = converted.manifest
        with create_observer(stderr_console(), quiet=True) as observer:
            evaluation = api.evaluate(converted, data_config, batch_size=batch_size, workers=workers, observer=observer)
    else:
        manifest = read_manifest(file)
        if manifest.validation is None:
            raise ConfigError(f"{file} holds no histograms: pass --data DIR to measure them")
        evaluation = manifest.validation
    rows = layer_rows(manifest.table, evaluation)
    if plot is not None:
        save_plot(plot_choices(manifest, evaluation), plot)
    if as_json:
        record: dict[str, Any] = {
            "model": manifest.architecture,
            "images": evaluation.images,
            "top1": evaluation.top1,
            "cost": evaluation.cost,
            "budget": manifest.budget,
            "options": manifest.table.options,
            "dynamics": dynamics_record(evaluation),
            "layers": rows,
        }
        typer.echo(json.dumps(record))
    elif as_csv:
        bits = sorted({b for row in rows for b in row["histogram"]})
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(["layer", "block", "macs", "runs", *(f"bits_{b}" for b in bits), "mean_bits", "mean_cost"])
        for row in rows:
            shares = [row["histogram"].get(b, 0.0) for b in bits]
            writer.writerow(
                [row["name"], row["block"], row["macs"], row["runs"], *shares, row["mean_bits"], row["mean_cost"]]
            )
    else:
        print_profile(Console(), manifest, evaluation)
