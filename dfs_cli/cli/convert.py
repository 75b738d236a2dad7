"""``dfs convert``."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfs_cli.atomic import File
from dfs_cli.cli import options
from dfs_cli.cli.long_runs import LongRunOptions, how_to_resume, signals_wait_for
from dfs_cli.cli.output import Output
from dfs_cli.cli.synthetic import SyntheticOptions
from dfs_cli.config import SynthesisConfig
from dfs_cli.distributed import is_first, join, of_first
from dfs_cli.errors import BudgetMissedError, ConfigError, DivergedError, LostProcessError, OutputError
from dfs_cli.presets import PRESETS
from dfs_cli.ranges import check_budget, check_limit, check_range

if TYPE_CHECKING:
    from dfs_cli.checkpoint import Checkpoint
    from dfs_cli.conversion.converted import Converted
    from dfs_cli.cost.device import DeviceCosts

_COSTS = "costs"  # in the checkpoint: measured again, they would be others

EXAMPLES = """
Examples:

  dfs convert resnet50 --budget 0.4

  dfs convert resnet50 --budget 0.03 --data imagenet/

  dfs convert resnet50 --objective latency --budget 0.3 --data imagenet/

  dfs convert resnet18 --gate static --budget 0.02 --data photos/ --num-classes 50 --checkpoint mine.safetensors
"""


_OBJECTIVE = "Objective"


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
    synthetic: SyntheticOptions,
    preprocessing: options.PreprocessingOptions,
    network: options.NetworkOptions,
    tuning: options.TuningOptions,
    long_run: LongRunOptions,
    sink: Output,
    limit: options.Limit = None,
    objective: Annotated[
        str,
        typer.Option(
            "--objective",
            metavar="macs|latency|FILE",
            help="What costs count: bit-weighted MACs; time in ONNX Runtime, one image at a time, measured here first; or the "
            "costs in FILE, as dfs bench --cost-table writes them.",
            rich_help_panel=_OBJECTIVE,
        ),
    ] = "macs",
    threads: Annotated[
        int, typer.Option("--threads", metavar="N", help="With latency, of ONNX Runtime.", rich_help_panel=_OBJECTIVE)
    ] = 1,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="Where to write.", rich_help_panel=options.OUTPUT),
    ] = Path("model.safetensors"),
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run of the same options that was interrupted, if there is one.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
    force: options.Force = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the plan and its costs; train and write nothing.", rich_help_panel=options.OUTPUT
        ),
    ] = False,
) -> None:
    """Convert a pretrained ResNet to a budget, tune it, and write it with a cost report. Without images, they are made."""
    check_budget(budget)
    check_limit(limit)
    check_range("threads", threads, 1, 1024)
    data = images.config()
    if not output.name:
        raise ConfigError(f"--output {str(output)!r} is not a file name")
    reports = (output.with_suffix(".report.json"), output.with_suffix(".report.md"))
    sheet = output.with_suffix(".images.png")

    from dfs_cli import api
    from dfs_cli.checkpoint import Checkpoint, StopRequest
    from dfs_cli.cli.step_log import StepLog
    from dfs_cli.conversion.convert import run
    from dfs_cli.conversion.defaults import describe_source, resolve_device
    from dfs_cli.conversion.setup import prepare
    from dfs_cli.cost.device import DeviceCosts
    from dfs_cli.models.zoo import check_convertible
    from dfs_cli.outputs import check_writable, reserve
    from dfs_cli.report.terminal import print_conversion

    check_convertible(model)
    chosen = synthetic.choose(model, data)
    settings = tuning.config(api.default_tuning(chosen))
    costs = _read_costs(objective)
    measurable = None if objective == "macs" else PRESETS["lowbit"].bits
    dynamic = network.config(budget, settings, measurable if costs is None else costs.options)
    if dry_run:
        if objective == "latency":
            raise ConfigError(
                "--dry-run measures nothing: write a table with dfs bench --cost-table, and pass --objective FILE"
            )
        _print_plan(model, budget, weights, preprocessing, dynamic, network.spend, limit, costs, sink)
        return
    is_synthetic = isinstance(chosen, SynthesisConfig)
    names = (output, *reports, sheet) if is_synthetic else (output, *reports)
    join(settings.device)
    synthetic.check_folder(force or resume)
    saved, inputs = output.with_name(f"{output.name}.checkpoint"), [weights.checkpoint, images.class_map]
    stop = StopRequest()
    with contextlib.ExitStack() as stack:
        if is_first():
            own = [saved] if long_run.log is None else [saved, long_run.log]
            check_writable([*names, *own], True, inputs)  # of different names
            stack.enter_context(reserve(own, True, inputs))
            _check_free(saved, long_run.log, resume, force)
        checkpoint = Checkpoint(saved, resume, long_run.checkpoint_minutes, stop, sink.say)
        if not resume:
            checkpoint.remove()
        outputs = stack.enter_context(reserve(names if is_first() else (), force or checkpoint.wrote(names), inputs))
        stack.enter_context(_explained(checkpoint, sink))
        stack.enter_context(signals_wait_for(stop))
        resolve_device(settings.device)
        module, origin = weights.load(model, settings.seed)
        if weights.checkpoint and origin != str(weights.checkpoint):
            sink.say(f"weights: {origin}")
        log = None if long_run.log is None or not is_first() else StepLog(long_run.log, restart=not resume)
        with sink.observer(logs=True, settings=True, log=log) as observer:
            resolved = preprocessing.resolve(module)
            if objective == "latency":
                known = checkpoint.get(_COSTS)
                costs = (
                    DeviceCosts.from_dict(known)
                    if known
                    else of_first(
                        api.measure_costs(
                            module,
                            dynamic,
                            resolved.input_size,
                            (dynamic.gate,),
                            threads,
                            model,
                            settings.seed,
                            observer,
                        )
                    )
                )
                checkpoint.keep(_COSTS, costs.to_dict())
            setup = prepare(
                module,
                budget,
                chosen,
                dynamic,
                settings,
                resolved,
                describe_source(module, origin),
                network.spend,
                observer,
                costs,
                checkpoint,
                limit,
            )
            made = setup.splits.train.source if is_synthetic else None
            if made is not None and is_first():
                synthetic.save(made)
            converted = run(setup, observer, checkpoint=checkpoint)
        files, report = _files(converted, output, reports, None if made is None else File(sheet, made.sheet()))
        checkpoint.about_to_write(files)
        written, failure = outputs.keep(files) if is_first() else ((), None)
        if written:
            checkpoint.remove()
    sink.result(report, lambda console: print_conversion(console, report))
    if failure is not None:
        raise failure
    sink.say(f"wrote {', '.join(map(str, written))}")
    if not converted.keeps_budget:
        raise BudgetMissedError(
            f"the budget was missed: cost {report['cost']:.4f} on the validation split, {_promise(budget, network.spend)}; "
            f"{output} was written as it is"
        )
    if converted.manifest.keeps_limit is False:
        raise BudgetMissedError(f"the limit was missed: an image costs {report['cost_max']:.6g}, above {limit:g}")


def _check_free(saved: Path, log: Path | None, resume: bool, force: bool) -> None:
    """Raises OutputError where an earlier run has left something that would be lost."""
    if resume or force:
        return
    if saved.exists():
        raise OutputError(
            f"{saved} is of an interrupted run: pass --resume to go on with it, or --force to start again"
        )
    if log is not None and log.exists():
        raise OutputError(f"--log {log} exists already: pass --force to overwrite it, or another name")


@contextlib.contextmanager
def _explained(checkpoint: Checkpoint, sink: Output) -> Iterator[None]:
    """Say how an interrupted run can be gone on with. One that diverged cannot: it would do so again."""
    try:
        yield
    except DivergedError:
        checkpoint.remove()
        raise
    except (KeyboardInterrupt, LostProcessError):
        if checkpoint.path is not None and checkpoint.path.exists():
            sink.say(f"saved in {checkpoint.path}; to go on: {how_to_resume()}")
        raise


def _files(
    converted: Converted, output: Path, reports: tuple[Path, Path], sheet: File | None
) -> tuple[list[File], dict[str, Any]]:
    """The network, its reports, which name its digest, and synthetic images to look at; and the report."""
    from dfs_cli import api
    from dfs_cli.artifact.artifact import artifact_file
    from dfs_cli.report.markdown import render_markdown

    file = artifact_file(output, converted.network, converted.manifest)
    report = api.cost_report(converted) | {"file_sha256": hashlib.sha256(file.data).hexdigest()}
    report |= {} if sheet is None else {"sheet": sheet.path.name}
    files = [
        file,
        File(reports[0], json.dumps(report, indent=1) + "\n"),
        File(reports[1], render_markdown(report)),
    ]
    return files if sheet is None else [*files, sheet], report


def _promise(budget: float, spend: bool) -> str:
    from dfs_cli.cost.operating_point import HIGHEST_SHARE, LOWEST_SHARE

    least = f"{LOWEST_SHARE * budget:.4f} to " if spend else "at most "
    return f"{least}{HIGHEST_SHARE * budget:.4f} is promised"


def _read_costs(objective: str) -> DeviceCosts | None:
    """The costs in the file that ``objective`` names; None where it names none."""
    if objective in ("macs", "latency"):
        return None
    from dfs_cli.cost.device import read_costs

    if not Path(objective).is_file():
        raise ConfigError(f"--objective {objective}: expected macs, latency, or a file of costs")
    return read_costs(Path(objective))


def _print_plan(
    model: str,
    budget: float,
    weights: options.ModelOptions,
    preprocessing: options.PreprocessingOptions,
    dynamic: Any,
    spend: bool,
    limit: float | None,
    costs: DeviceCosts | None,
    sink: Output,
) -> None:
    """Costs of the options, and what can be reached, without training."""
    from dfs_cli import api
    from dfs_cli.report.cost import plan_record
    from dfs_cli.report.terminal import print_plan

    module = weights.outline(model)
    if costs is not None:
        dynamic = dynamic.replace(bits=costs.useful(dynamic.bits))
    table = api.plan(module, dynamic, preprocessing.resolve(module))
    if costs is not None:
        table = table.on_device(costs, dynamic.gate)
    sink.result(plan_record(model, table, budget), lambda console: print_plan(console, model, table, budget))
    table.check_budget(budget, spend, math.inf if limit is None else limit)
