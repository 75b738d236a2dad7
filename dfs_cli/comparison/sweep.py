"""Dynamic networks compared with alternatives at equal cost, steps, data and starting weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfs_cli.checkpoint import Checkpoint, Checkpoints
from dfs_cli.comparison.cascade import (
    Cascade,
    StaticNetwork,
    best_cascade,
    confident_answers,
    load_answers,
    save_answers,
)
from dfs_cli.comparison.config import SweepConfig
from dfs_cli.comparison.intervals import answers_record
from dfs_cli.comparison.jobs import Job, jobs, settings
from dfs_cli.comparison.results import Results, answers_folder, open_results
from dfs_cli.comparison.summary import STATIC
from dfs_cli.config import DataConfig, Preprocessing, TuningConfig
from dfs_cli.control.base import join_batches
from dfs_cli.conversion import stages
from dfs_cli.conversion.convert import run
from dfs_cli.conversion.converted import Converted
from dfs_cli.conversion.defaults import default_data, default_dynamic, default_tuning, describe_model
from dfs_cli.conversion.setup import Setup, prepare
from dfs_cli.data.images import UnreadableLog
from dfs_cli.data.preprocessing import resolve_preprocessing
from dfs_cli.distributed import is_first, of_first
from dfs_cli.errors import ConfigError, DivergedError
from dfs_cli.models.zoo import load_model
from dfs_cli.observer import Observer
from dfs_cli.report.cost import dynamics_record, option_shares
from dfs_cli.surgery.plan import plan_costs


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
) -> dict[str, Any]:
    """Tune and evaluate every network of a sweep, and write what was measured to ``path`` after each.

    A sweep whose file exists goes on where it stopped. The answers of the static networks, from which cascades are made, are
    in a folder beside it.

    Args:
        model: as for :func:`dfs_cli.convert`; so are the other arguments.
        path: the results, JSON: ``points`` is a list with ``method``, ``budget``, ``bits``, ``cost``, ``top1``, ``seed``,
            ``steps``, which ``images`` were answered ``right`` (as :func:`dfs_cli.comparison.intervals.answers_record` has it)
            and, where the network is dynamic, how dynamic it is; ``skipped`` lists jobs that failed, and why; ``summary``,
            ``verdicts`` and ``overall`` as :mod:`dfs_cli.comparison.summary` makes them.
        restart: delete the results of an earlier sweep, once the settings have been checked.
        checkpoints: how the network that is being tuned is saved, beside the results, and whether it is gone on with.

    Returns:
        The results.

    Raises:
        OutputError: the file is of another sweep.
        ConfigError: a budget cannot be reached; nothing has been tuned then.

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
    chosen = {b: config.dynamic.get(b) or default_dynamic(b, tuning, spend=config.spend) for b in config.budgets}
    config = config.replace(dynamic=chosen)
    for budget, dynamic in config.dynamic.items():
        plan_costs(module, dynamic, preprocessing.input_size).check_budget(budget, config.spend)
    for is_turn in (is_first(), not is_first()):  # the first process first
        if is_turn:
            results = open_results(path, module, config, tuning, data, preprocessing, restart and is_first())
        of_first(None)
    observer, checkpoints = observer or Observer(), checkpoints or Checkpoints()
    told = observer
    for seed in range(tuning.seed, tuning.seed + config.seeds):
        planned = jobs(config, seed)
        for number, job in enumerate(planned, 1):
            if results.has(job):
                continue
            observer.job(f"{job.name} ({number} of {len(planned)})")
            budget, dynamic, spend = settings(job, config)
            try:
                seeded = tuning.replace(seed=seed)
                with checkpoints.at(results.checkpoint_path(job), restart) as checkpoint:
                    setup = prepare(
                        module, budget, data, dynamic, seeded, preprocessing, None, spend, told, checkpoint=checkpoint
                    )
                    told = Observer()  # the images are those of the first network
                    _measure(job, setup, results, observer, checkpoint)
            except (ConfigError, DivergedError) as error:
                # A budget that a baseline cannot reach is a result, not a failure; so is any run that diverged.
                if job.method == "dfs" and isinstance(error, ConfigError):
                    raise
                results.add(job, reason=str(error))
        if "cascade" in config.baselines and is_first():
            _update_cascades(seed, config, results)
    return results.record


def _measure(job: Job, setup: Setup, results: Results, observer: Observer, checkpoint: Checkpoint) -> None:
    """Tune a job's network, and record what it achieves."""
    if of_first(results.record["original"]) is None:
        with stages.own_generators(setup.tuning.seed):
            top1, top5 = stages.evaluate_original(setup, observer)
        with results.update() as record:
            record["original"] = {"top1": top1, "top5": top5}
    original = of_first(results.record["original"])
    told: list[Tensor] = []
    converted = run(setup, observer, (original["top1"], original["top5"]), checkpoint, on_right=told.append)
    manifest = converted.manifest
    evaluation = manifest.validation
    assert evaluation is not None, "a conversion ends with an evaluation"
    point: dict[str, Any] = {
        "cost": evaluation.cost,
        "top1": evaluation.top1,
        "top5": evaluation.top5,
        "steps": setup.steps,
        "agreement": manifest.agreement.to_dict() if manifest.agreement else None,
        **answers_record(told[0].numpy(), evaluation.unreadable),
    }
    if job.method in STATIC:
        point["layer_bits"] = manifest.table.layer_bits
        _save_answers(results.answers_path(job), setup, converted, observer)
    else:
        point["option_shares"] = {str(b): n for b, n in option_shares(manifest.table, evaluation).items() if n}
        point["gate"] = setup.dynamic.gate
        point["keeps_budget"] = converted.keeps_budget
        point["dynamics"] = dynamics_record(evaluation)
    results.add(job, **point)


@torch.inference_mode()
def _save_answers(path: Path, setup: Setup, converted: Converted, observer: Observer) -> None:
    """Save the answers of a static network and its confidence in them, from which cascades are made."""
    network, manifest = converted
    splits, log = setup.splits, UnreadableLog("held-out", len(setup.splits.calibration))
    held_out = stages.held_out_images(
        splits.calibration, True, setup.preprocessing, setup.tuning, setup.workers, setup.device, log, observer
    )
    targets: list[Tensor] = []

    def validation_logits() -> Iterator[Tensor]:
        for batch in stages.validation_loader(setup):
            if len(batch.targets):
                targets.append(batch.targets)
                yield network.run(batch.images.to(setup.device)).logits

    validation = confident_answers(validation_logits())
    answers = confident_answers(network.run(images).logits for images in held_out.batches)
    assert manifest.validation is not None and held_out.targets is not None, "both were measured"
    static = StaticNetwork(manifest.validation.cost, answers, validation)
    validation_targets = join_batches(targets)
    if is_first():
        save_answers(path, static, held_out.targets, validation_targets)


def _update_cascades(seed: int, config: SweepConfig, results: Results) -> None:
    """Update the best cascade of two static networks for each budget, from all static networks so far.

    Where the answers of some of them are missing, a cascade of the others might be worse: an earlier record is kept. So it is
    where they answered different images.
    """
    points = results.record["points"]
    static_points = [p for p in points if p["method"] in STATIC and p["seed"] == seed]
    static = [Job(p["method"], p["seed"], p["budget"], p["bits"], p["views"]) for p in static_points]
    missing = [job for job in static if not results.answers_path(job).is_file()]
    loaded = [] if missing else [load_answers(results.answers_path(job)) for job in static]
    problem = None
    if missing:
        problem = f"the answers of {len(missing)} static networks are not in {answers_folder(results.path)}"
    elif any(not torch.equal(*both) for found in loaded for both in zip(found[1:], loaded[0][1:], strict=True)):
        problem = "the static networks answered different images: some could not be read each time"
    steps = {p["steps"] for p in points if p["seed"] == seed}
    for budget in sorted({*config.budgets, *(p["budget"] for p in points if p["budget"])}, reverse=True):
        job = Job("cascade", seed, budget)
        if problem and any(job.matches(p) for p in results.record["points"]):
            continue
        cascade = None
        if loaded and not problem:
            cascade = best_cascade([network for network, _, _ in loaded], budget, *loaded[0][1:])
        if cascade is None:
            results.add(job, reason=problem or f"no two of {len(static)} static networks fit the budget")
            continue
        results.add(
            job,
            cost=cascade.cost,
            top1=cascade.top1,
            steps=max(steps),
            members=[static[i].network for i in (cascade.cheap, cascade.expensive)],
            second_share=cascade.share,
            **_cascade_answers(cascade, [static_points[i] for i in (cascade.cheap, cascade.expensive)]),
        )


def _cascade_answers(cascade: Cascade, members: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of a cascade's answers; empty where those of its members are not of the same images.

    Its members' answers were given in another pass over the images than their own records.
    """
    first, second = members
    is_same = first["unreadable"] == second["unreadable"]
    is_same = is_same and len(cascade.right) == first["images"] == second["images"]
    return answers_record(cascade.right.numpy(), first["unreadable"]) if is_same else {}
