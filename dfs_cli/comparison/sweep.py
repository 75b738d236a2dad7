"""Dynamic networks compared with alternatives at equal cost, from the same weights and images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dfs_cli.checkpoint import Checkpoints
from dfs_cli.comparison.config import SweepConfig
from dfs_cli.comparison.jobs import Job, Settings, jobs, repeated_jobs, settings
from dfs_cli.comparison.results import open_results
from dfs_cli.comparison.rivals import tune_cascade, tune_skipnet
from dfs_cli.comparison.summary import STATIC, telling_budgets
from dfs_cli.comparison.tuner import Tuner
from dfs_cli.config import DataConfig, DynamicConfig, Preprocessing, TuningConfig
from dfs_cli.conversion.defaults import default_data, default_dynamic, default_tuning, describe_model
from dfs_cli.data.preprocessing import resolve_preprocessing
from dfs_cli.distributed import is_first, of_first
from dfs_cli.errors import ConfigError, DivergedError
from dfs_cli.models.zoo import load_model
from dfs_cli.observer import Observer
from dfs_cli.surgery.plan import plan_costs

_USUAL = (0.03,)  # whose fixed layers static networks have where budgets are not known yet


def sweep(
    model: nn.Module | str,
    config: SweepConfig,
    path: Path | str,
    data: DataConfig | None = None,
    *,
    tuning: TuningConfig | None = None,
    preprocessing: Preprocessing | None = None,
    observer: Observer | None = None,
    restart: bool = False,
    checkpoints: Checkpoints | None = None,
    dynamic: Callable[[float], DynamicConfig] | None = None,
) -> dict[str, Any]:
    """Tune and evaluate every network of a sweep, and write what was measured to ``path`` after each.

    A sweep whose file exists goes on where it stopped. The static networks, from which cascades are made, and their answers
    are in a folder beside it.

    Args:
        model: as for :func:`dfs_cli.convert`; so are the other arguments.
        path: the results, JSON: ``points`` is a list with ``method``, ``budget``, ``bits``, ``cost``, ``top1``, ``seed``,
            ``steps``, which ``images`` were answered ``right`` (as :func:`dfs_cli.comparison.intervals.answers_record` has it)
            and, where the network is dynamic, how dynamic it is; ``skipped`` lists jobs that failed, and why; ``summary``,
            ``verdicts`` and ``overall`` as :mod:`dfs_cli.comparison.summary` makes them.
        restart: delete the results of an earlier sweep, once the settings have been checked.
        checkpoints: how the network that is being tuned is saved, beside the results, and whether it is gone on with.
        dynamic: options and gate of the dynamic network for a budget; None: those that a conversion uses.

    Returns:
        The results.

    Raises:
        OutputError: the file is of another sweep.
        ConfigError: a budget cannot be reached, and nothing has been tuned; or there is none that tells.

    Example:
        >>> import dfs_cli, pathlib, tempfile
        >>> tuning = dfs_cli.TuningConfig(steps=2, batch_size=64, hflip=0.0)
        >>> config = dfs_cli.SweepConfig(budgets=(0.1,), baselines=())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     results = dfs_cli.sweep("resnet20_digits", config, pathlib.Path(folder) / "sweep.json", tuning=tuning)
        >>> [point["method"] for point in results["points"]]
        ['dfs']
    """
    module, path = load_model(model) if isinstance(model, str) else model, Path(path)
    data = default_data(describe_model(module)[0], data)
    tuning = tuning or default_tuning(data)
    preprocessing = preprocessing or resolve_preprocessing(module)
    of_budget = dynamic or (lambda budget: default_dynamic(budget, tuning, spend=config.spend))
    chosen = _checked(config.budgets, module, of_budget, preprocessing, config.spend)
    fixed_bits = max(of_budget(budget).fixed_bits for budget in config.budgets or _USUAL)
    for is_turn in (is_first(), not is_first()):  # the first process first
        if is_turn:
            results = open_results(
                path, module, chosen, config.spend, fixed_bits, tuning, data, preprocessing, restart and is_first()
            )
        of_first(None)

    def settings_of(job: Job) -> Settings:
        return settings(job, chosen, config.spend, fixed_bits)

    observer, checkpoints = observer or Observer(), checkpoints or Checkpoints()
    tuner = Tuner(module, settings_of, data, tuning, preprocessing, results, observer, checkpoints, restart)
    first = tuning.seed
    if not config.budgets:
        _run(tuner, jobs(config, first))
        config = config.replace(budgets=of_first(telling_budgets(results.record) if is_first() else ()))
        if not config.budgets:
            raise ConfigError(
                "no uniform static network loses half a point, or all lose more than four: pass --budgets"
            )
        observer.note(f"budgets: {', '.join(f'{budget:g}' for budget in config.budgets)}")
        chosen.update(_checked(config.budgets, module, of_budget, preprocessing, config.spend))
        results.add_budgets(chosen)
    for seed in range(first, first + config.seeds):
        planned = jobs(config, seed) if seed == first else repeated_jobs(config, of_first(results.record), seed)
        _run(tuner, planned)
    return results.record


def _checked(
    budgets: Sequence[float],
    model: nn.Module,
    of_budget: Callable[[float], DynamicConfig],
    preprocessing: Preprocessing,
    spend: bool,
) -> dict[float, DynamicConfig]:
    """Options and gate for each budget, which can be reached."""
    chosen = {budget: of_budget(budget) for budget in budgets}
    for budget, dynamic in chosen.items():
        plan_costs(model, dynamic, preprocessing.input_size).check_budget(budget, spend)
    return chosen


def _run(tuner: Tuner, planned: Sequence[Job]) -> None:
    """Tune and record the networks that are not done yet."""
    for number, job in enumerate(planned, 1):
        # The best pair of static networks may be another one now.
        if tuner.results.has(job) and job.method != "cascade":
            continue
        tuner.observer.job(f"{job.name} ({number} of {len(planned)})")
        try:
            _measure(tuner, job)
        except (ConfigError, DivergedError) as error:
            # A budget that a baseline cannot reach is a result, not a failure; so is any run that diverged.
            if job.method == "dfs" and isinstance(error, ConfigError):
                raise
            tuner.results.add(job, reason=str(error))


def _measure(tuner: Tuner, job: Job) -> None:
    """Tune a job's network, and record what it achieves."""
    if job.method == "skipnet":
        return tune_skipnet(tuner, job)
    if job.method == "cascade":
        return tune_cascade(tuner, job)
    with tuner.tuned(job) as tuned:
        if job.method not in STATIC:
            return tuner.results.add(job, **tuned.dynamic_point())
        tuner.save(job, tuned)
        return tuner.results.add(job, **tuned.point(), layer_bits=tuned.converted.manifest.table.layer_bits)
