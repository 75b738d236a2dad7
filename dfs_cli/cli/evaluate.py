"""``dfs eval``."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfs_cli.cli import options
from dfs_cli.cli.output import Output
from dfs_cli.distributed import is_first, join
from dfs_cli.errors import BudgetMissedError, ConfigError

if TYPE_CHECKING:
    from dfs_cli.atomic import File
    from dfs_cli.conversion.converted import Converted

EXAMPLES = """
Examples:

  dfs eval model.safetensors --data imagenet/

  dfs eval model.safetensors --data imagenet/ --budget 0.02 --output cheaper.safetensors

  dfs eval model.safetensors --data imagenet/ --limit 0.05
"""


def evaluate(
    file: options.FileName,
    images: options.EvalDataOptions,
    sink: Output,
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget", "-b", help="Move the network to another budget first, on its held-out training images."
        ),
    ] = None,
    spend: options.Spend = False,
    limit: options.Limit = None,
    batch_size: options.EvalBatchSize = 256,
    amp: options.Amp = False,
    channels_last: options.ChannelsLast = False,
    device: options.DeviceOption = "auto",
    workers: options.Workers = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="With --budget or --limit: write the network moved to it.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    results_file: Annotated[
        Path | None,
        typer.Option(
            "--results-file",
            metavar="FILE",
            help="Write the figures: JSON for .json, else CSV.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    force: options.Force = False,
) -> None:
    """Evaluate a converted network: accuracy, cost, and what it chose."""
    if budget is None and spend:
        raise ConfigError("--spend goes with --budget: pass --budget too")
    if budget is None and limit is None and output is not None:
        raise ConfigError("--output goes with --budget or --limit: pass one of them too")
    if output is not None and (amp or images.num_samples is not None):
        raise ConfigError(
            "--output records figures of the whole split without --amp: pass neither --amp nor --num-samples"
        )
    data = images.config()
    join(device)

    from dfs_cli import api
    from dfs_cli.conversion.original import original_top1
    from dfs_cli.outputs import reserve
    from dfs_cli.report.cost import evaluation_record
    from dfs_cli.report.terminal import print_evaluation

    wanted = [path for path in (output, results_file) if path is not None and is_first()]
    with reserve(wanted, force, [file, images.class_map]) as outputs:
        converted = api.load(file, device)
        with sink.observer() as observer:
            if budget is not None or limit is not None:
                converted = api.recalibrate(
                    converted, budget, data, limit=limit, spend=spend, workers=workers, observer=observer
                )
            evaluation = api.evaluate(
                converted,
                data,
                batch_size=batch_size,
                workers=workers,
                amp=amp,
                channels_last=channels_last,
                observer=observer,
            )
            is_data_free = converted.manifest.is_data_free
            if is_data_free:
                top1 = original_top1(converted.manifest, data, converted.network.device, workers, observer)
        evaluated = converted._replace(manifest=converted.manifest.replace(validation=evaluation))
        parameters = sum(p.numel() for p in converted.network.parameters())
        record = evaluation_record(evaluated.manifest, evaluation, round(parameters / 1e6, 2))
        if is_data_free:
            record |= {"data_free": True, "original_top1": top1}
        failure = None
        if is_first():
            _, failure = outputs.keep(_files(evaluated, record, output, results_file))
    if evaluation.unreadable:
        names = ", ".join(evaluation.unreadable[:10])
        sink.say(f"left out {len(evaluation.unreadable)} unreadable images: {names}")
    sink.result(record, lambda console: print_evaluation(console, record))
    if failure is not None:
        raise failure
    if budget is not None and not evaluated.keeps_budget:
        raise BudgetMissedError(f"the budget was missed: cost {evaluation.cost:.4f} where {budget:g} was asked for")
    if evaluated.manifest.keeps_limit is False:
        raise BudgetMissedError(
            f"the limit was missed: an image costs {evaluation.cost_max:.6g}, above {record['limit']:g}"
        )


def _files(evaluated: Converted, record: dict[str, Any], output: Path | None, results_file: Path | None) -> list[File]:
    """What is to be written: the network, the figures, both or nothing."""
    from dfs_cli.artifact.artifact import artifact_file
    from dfs_cli.atomic import File

    files = [] if output is None else [artifact_file(output, evaluated.network, evaluated.manifest)]
    if results_file is not None:
        text = json.dumps(record, indent=1) if results_file.suffix == ".json" else _to_csv(record)
        files.append(File(results_file, text))
    return files


def _to_csv(record: dict[str, Any]) -> str:
    """One header line and one row; lists and mappings are left out."""
    flat = {k: v for k, v in record.items() if not isinstance(v, (list, dict))}
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(flat), lineterminator="\n")
    writer.writeheader()
    writer.writerow(flat)
    return text.getvalue()
