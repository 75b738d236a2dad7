"""``dfs convert``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfs_cli.cli import options
from dfs_cli.cli.memory import keep_freed_memory
from dfs_cli.cli.output import Output
from dfs_cli.config import check_budget
from dfs_cli.errors import BudgetMissedError, ConfigError

if TYPE_CHECKING:
    from dfs_cli.atomic import File
    from dfs_cli.conversion.converted import Converted

EXAMPLES = """
Examples:

  dfs convert resnet20_digits --budget 0.03

  dfs convert resnet50 --budget 0.03 --data imagenet/

  dfs convert resnet18 --gate static --budget 0.02 --data photos/ --num-classes 50 --checkpoint mine.safetensors
"""


def convert(
    model: options.ModelName,
    budget: Annotated[
        float,
        typer.Option(
            "--budget",
            "-b",
            help="What an image may cost in the mean, gate included, as a fraction of the dense 32-bit network's cost.",
        ),
    ],
    weights: options.ModelOptions,
    images: options.DataOptions,
    preprocessing: options.PreprocessingOptions,
    network: options.NetworkOptions,
    tuning: options.TuningOptions,
    sink: Output,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="Where to write.", rich_help_panel=options.OUTPUT),
    ] = Path("model.safetensors"),
    force: options.Force = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the plan and its costs; train and write nothing.", rich_help_panel=options.OUTPUT
        ),
    ] = False,
) -> None:
    """Convert a pretrained ResNet to a budget, tune it, and write it with a cost report."""
    check_budget(budget)
    data = images.config()
    if not output.name:
        raise ConfigError(f"--output {str(output)!r} is not a file name")
    reports = (output.with_suffix(".report.json"), output.with_suffix(".report.md"))

    from dfs_cli import api
    from dfs_cli.conversion.defaults import default_data, describe_source, resolve_device
    from dfs_cli.models.zoo import check_convertible
    from dfs_cli.outputs import reserve
    from dfs_cli.report.terminal import print_conversion

    keep_freed_memory()
    check_convertible(model)
    if dry_run:
        dynamic = network.config(budget, tuning.config(api.default_tuning(data)))
        _print_plan(model, budget, weights, preprocessing, dynamic, network.spend, sink)
        return
    with reserve((output, *reports), force, [weights.checkpoint, images.class_map]) as outputs:
        data = default_data(model.partition(".")[0], data)
        settings = tuning.config(api.default_tuning(data))
        dynamic = network.config(budget, settings)
        resolve_device(settings.device)
        module, origin = weights.load(model, settings.seed)
        if weights.checkpoint and origin != str(weights.checkpoint):
            sink.say(f"weights: {origin}")
        with sink.observer(logs=True, settings=True) as observer:
            converted = api.convert(
                module,
                budget,
                data,
                dynamic=dynamic,
                tuning=settings,
                preprocessing=preprocessing.resolve(module),
                source=describe_source(module, origin),
                spend=network.spend,
                observer=observer,
            )
        files, report = _files(converted, output, reports)
        written, failure = outputs.keep(files)
    sink.result(report, lambda console: print_conversion(console, report))
    if failure is not None:
        raise failure
    sink.say(f"wrote {', '.join(map(str, written))}")
    if not converted.keeps_budget:
        raise BudgetMissedError(
            f"the budget was missed: cost {report['cost']:.4f} on the validation split, {_promise(budget, network.spend)}; "
            f"{output} was written as it is"
        )


def _files(converted: Converted, output: Path, reports: tuple[Path, Path]) -> tuple[list[File], dict[str, Any]]:
    """The network and its reports, which name its digest; and the report."""
    from dfs_cli import api
    from dfs_cli.artifact.artifact import artifact_file
    from dfs_cli.atomic import File
    from dfs_cli.report.markdown import render_markdown

    file = artifact_file(output, converted.network, converted.manifest)
    report = api.cost_report(converted) | {"file_sha256": hashlib.sha256(file.data).hexdigest()}
    files = [
        file,
        File(reports[0], json.dumps(report, indent=1) + "\n"),
        File(reports[1], render_markdown(report)),
    ]
    return files, report


def _promise(budget: float, spend: bool) -> str:
    from dfs_cli.cost.operating_point import HIGHEST_SHARE, LOWEST_SHARE

    least = f"{LOWEST_SHARE * budget:.4f} to " if spend else "at most "
    return f"{least}{HIGHEST_SHARE * budget:.4f} is promised"


def _print_plan(
    model: str,
    budget: float,
    weights: options.ModelOptions,
    preprocessing: options.PreprocessingOptions,
    dynamic: Any,
    spend: bool,
    sink: Output,
) -> None:
    """Costs of the options, and what can be reached, without training."""
    from dfs_cli import api
    from dfs_cli.report.cost import plan_record
    from dfs_cli.report.terminal import print_plan

    module = weights.outline(model)
    table = api.plan(module, dynamic, preprocessing.resolve(module))
    sink.result(plan_record(model, table, budget), lambda console: print_plan(console, model, table, budget))
    table.check_budget(budget, spend)
