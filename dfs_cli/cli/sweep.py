"""``dfs sweep``."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Annotated

import typer

from dfs_cli.cli import options
from dfs_cli.cli.long_runs import LongRunOptions, how_to_resume, signals_wait_for
from dfs_cli.cli.output import Output
from dfs_cli.comparison.config import BASELINES, SweepConfig
from dfs_cli.distributed import is_first, join
from dfs_cli.errors import ConfigError, LostProcessError, OutputError
from dfs_cli.ranges import check_budget

EXAMPLES = """
Examples:

  dfs sweep resnet20_digits --budgets 0.03,0.015

  dfs sweep resnet50 --data imagenet/ --budgets auto --views 2 --seeds 3
"""


def sweep(
    model: options.ModelName,
    weights: options.ModelOptions,
    images: options.DataOptions,
    preprocessing: options.PreprocessingOptions,
    network: options.NetworkOptions,
    tuning: options.TuningOptions,
    long_run: LongRunOptions,
    sink: Output,
    budgets: Annotated[
        str,
        typer.Option(
            "--budgets",
            "-b",
            metavar="B,B,...|auto",
            help="Budgets of the dynamic networks; auto: where uniform static ones have lost 0.5, 1, 2 and 4 points.",
        ),
    ] = "0.4,0.1,0.05,0.03,0.015",
    baselines: Annotated[
        str, typer.Option("--baselines", help="What to compare with: some of these, or none.")
    ] = ",".join(BASELINES),
    seeds: Annotated[
        int,
        typer.Option(
            "--seeds", metavar="N", help="N seeds for dynamic networks and the two best rivals of each budget."
        ),
    ] = 1,
    views: Annotated[
        int,
        typer.Option("--views", metavar="N", help="2: compare with static networks that see every image twice, too."),
    ] = 1,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Results: JSON; a CSV and a plot beside it.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = Path("sweep.json"),
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Go on with the network that was being tuned when the sweep was interrupted.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = True,
    force: options.Force = False,
) -> None:
    """Compare dynamic networks with static ones and others at equal cost. An interrupted sweep goes on where it stopped."""
    wanted = options.numbers("--budgets", None if budgets == "auto" else budgets) or ()
    if not wanted and budgets != "auto":
        raise ConfigError("--budgets: expected numbers separated by commas, or auto")
    for budget in wanted:
        check_budget(budget)
    names = tuple(name for name in baselines.split(",") if name != "none")
    if output.suffix != ".json":
        raise ConfigError(f"--output {output}: expected a name that ends in .json")
    beside = output.with_suffix(".csv"), output.with_suffix(".png")

    from dfs_cli import api
    from dfs_cli.atomic import File, held
    from dfs_cli.checkpoint import Checkpoints, StopRequest
    from dfs_cli.cli.step_log import StepLog
    from dfs_cli.comparison.results import answers_folder
    from dfs_cli.conversion.defaults import default_data, resolve_device
    from dfs_cli.models.zoo import check_convertible
    from dfs_cli.outputs import check_writable, reserve
    from dfs_cli.report.plot import plot_file, why_not
    from dfs_cli.report.sweep import plot_sweep, points_csv, print_sweep

    check_convertible(model)
    join(tuning.device)
    # What lies beside the results of a sweep belongs to it.
    inputs = [weights.checkpoint, images.class_map]
    log_path = [] if long_run.log is None else [long_run.log]
    if is_first():
        check_writable([output, *beside, *log_path], force or output.exists(), inputs)
    if not answers_folder(output).is_dir() and os.path.lexists(answers_folder(output)):
        raise OutputError(f"{answers_folder(output)}, which is for answers, is not a folder: pass another --output")
    data = default_data(model.partition(".")[0], images.config())
    settings = tuning.config(api.default_tuning(data))
    resolve_device(settings.device)
    config = SweepConfig(
        budgets=wanted,
        baselines=names,  # type: ignore[arg-type]  # checked by the class
        seeds=seeds,
        views=views,
        spend=network.spend,
    )
    module = weights.load(model, settings.seed).model
    stop = StopRequest()
    with contextlib.ExitStack() as stack:
        log = None
        if long_run.log is not None and is_first():
            stack.enter_context(reserve([long_run.log], True, inputs))
            log = StepLog(long_run.log, has_jobs=True, restart=force)
        stack.enter_context(signals_wait_for(stop))
        observer = stack.enter_context(sink.observer(logs=True, log=log))
        try:
            api.sweep(
                module,
                config,
                output,
                data,
                tuning=settings,
                preprocessing=preprocessing.resolve(module),
                observer=observer,
                restart=force,
                checkpoints=Checkpoints(resume, long_run.checkpoint_minutes, stop, sink.say),
                dynamic=lambda budget: network.config(budget, settings),
            )
        except (KeyboardInterrupt, LostProcessError):
            sink.say(f"to go on: {how_to_resume()}")
            raise
    if not is_first():
        return
    with held(output):  # other sweeps may have added to it
        results = json.loads(output.read_text())
        files = [File(beside[0], points_csv(results))]
        if why_not() is None:
            files.append(plot_file(plot_sweep(results), beside[1]))
        with reserve([file.path for file in files], force=True) as outputs:
            outputs.write(files)
    sink.result(results, lambda console: print_sweep(console, results))
    sink.say(f"wrote {', '.join(map(str, (output, *(file.path for file in files))))}")
