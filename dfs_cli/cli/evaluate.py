"""``dfs eval``."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dfs_cli.cli import options
from dfs_cli.errors import BudgetMissedError, ConfigError


def evaluate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What dfs convert wrote.")],
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget", "-b", help="Move the network to another budget first, on its held-out training images."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="With --budget: write the network moved to it."),
    ] = None,
    data: options.DataDir = None,
    dataset: options.Dataset = "",
    val_split: options.ValSplit = None,
    num_samples: options.NumSamples = None,
    dataset_download: options.Download = False,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Images per batch; decisions do not depend on it.")
    ] = 256,
    amp: options.Amp = False,
    channels_last: options.ChannelsLast = False,
    device: options.DeviceOption = "auto",
    workers: options.Workers = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    results_file: Annotated[
        Path | None, typer.Option("--results-file", metavar="FILE", help="Write the figures: JSON for .json, else CSV.")
    ] = None,
    force: options.Force = False,
) -> None:
    """Evaluate a converted network: accuracy, cost, and what it chose."""
    if output is not None and budget is None:
        raise ConfigError("--output writes the network that --budget moves: pass --budget too")
    if output is not None and (amp or num_samples is not None):
        raise ConfigError(
            "--output records figures of the whole split without --amp: pass neither --amp nor --num-samples"
        )
    data_config = options.data_config(data, dataset, None, val_split, num_samples, dataset_download)

    from rich.console import Console

    from dfs_cli import api
    from dfs_cli.artifact.files import check_writable, write_atomically
    from dfs_cli.cli.progress import create_observer, stderr_console
    from dfs_cli.cost.operating_point import HIGHEST_SHARE, LOWEST_SHARE
    from dfs_cli.report.cost import evaluation_record
    from dfs_cli.report.terminal import print_evaluation

    check_writable([path for path in (results_file, output) if path is not None], force)
    converted = api.load(file, device)
    console = stderr_console()
    with create_observer(console, quiet=True) as observer:
        if budget is not None:
            converted = api.recalibrate(converted, budget, data_config, workers=workers, observer=observer)
        evaluation = api.evaluate(
            converted,
            data_config,
            batch_size=batch_size,
            workers=workers,
            amp=amp,
            channels_last=channels_last,
            observer=observer,
        )
    evaluated = api.Converted(converted.network, dataclasses.replace(converted.manifest, validation=evaluation))
    if output is not None:
        api.save(evaluated, output, force)
    parameters = sum(p.numel() for p in converted.network.parameters())
    record = evaluation_record(converted.manifest, evaluation, round(parameters / 1e6, 2))
    if results_file is not None:
        write_atomically(
            results_file, _to_csv(record) if results_file.suffix != ".json" else json.dumps(record, indent=1)
        )
    if evaluation.unreadable:
        names = ", ".join(evaluation.unreadable[:10])
        console.print(f"skipped {len(evaluation.unreadable)} unreadable images: {names}", highlight=False, markup=False)
    if as_json:
        typer.echo(json.dumps(record))
    else:
        print_evaluation(Console(), record)
    if budget is not None and not evaluated.keeps_budget:
        raise BudgetMissedError(
            f"the budget was missed: cost {evaluation.cost:.4f} is outside {LOWEST_SHARE} to {HIGHEST_SHARE} of {budget:g}"
        )


def _to_csv(record: dict[str, Any]) -> str:
    """One header line and one row; lists and mappings are left out."""
    flat = {k: v for k, v in record.items() if not isinstance(v, (list, dict))}
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(flat), lineterminator="\n")
    writer.writeheader()
    writer.writerow(flat)
    return text.getvalue()
