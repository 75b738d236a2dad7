"""Dynamic networks beside what a user would run instead, at equal cost, steps, data and starting weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfs_cli.artifact.file import tensor_digest
from dfs_cli.artifact.files import write_atomically
from dfs_cli.config import (
    PRESET_EDGE_BITS,
    PRESETS,
    DataConfig,
    DynamicConfig,
    Preprocessing,
    SweepConfig,
    TuningConfig,
)
from dfs_cli.data.preprocessing import resolve_preprocessing
from dfs_cli.data.splits import open_splits
from dfs_cli.errors import ConfigError, DivergedError, OutputError
from dfs_cli.evaluation.cascade import StaticNetwork, best_cascade, confident_answers, load_answers, save_answers
from dfs_cli.models.zoo import load_model
from dfs_cli.pipeline import Observer, Run
from dfs_cli.report.cost import dynamics_record, option_shares
from dfs_cli.report.sweep import summarise, verdicts
from dfs_cli.resolve import default_data, default_dynamic, default_tuning, describe_model
from dfs_cli.surgery.convert import plan_costs

RECIPE = 5
"""Raised with every change of how networks are tuned: results of different recipes do not belong into one file."""
UNIFORM_BITS = (8, 6, 5, 4, 3, 2)
STATIC_OPTIONS = (2, 3, 4, 5, 6, 8, 16, 32)

Point = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """One network to tune: ``budget`` of all but uniform ones, ``bits`` of those."""

    method: str
    seed: int
    budget: float | None = None
    bits: int | None = None

    @property
    def name(self) -> str:
        return f"{self.method} {f'{self.bits} bit' if self.bits else f'{self.budget:g}'}, seed {self.seed}"

    def matches(self, point: Point) -> bool:
        return all(point[key] == value for key, value in dataclasses.asdict(self).items())


def jobs(config: SweepConfig, seed: int) -> list[Job]:
    """The networks to tune, dynamic ones first; a cascade needs none of its own."""
    found = [Job("dfs", seed, budget=budget) for budget in config.budgets]
    if "uniform" in config.baselines or "cascade" in config.baselines:
        found += [Job("uniform", seed, bits=bits) for bits in UNIFORM_BITS]
    for method in ("mixed", "skipnet"):
        if method in config.baselines:
            found += [Job(method, seed, budget=budget) for budget in config.budgets]
    return found


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
) -> dict[str, Any]:
    """Tune and evaluate every network of a sweep, and write what was measured to ``path`` after each.

    A sweep whose file exists goes on where it stopped. The answers of the static networks, from which cascades are made, lie
    in a folder beside it.

    Args:
        model: as for :func:`dfs_cli.pipeline.convert`; so are the other arguments.
        path: the results, JSON: ``points`` is a list with ``method``, ``budget``, ``bits``, ``cost``, ``top1``, ``seed``,
            ``steps`` and, where the network is dynamic, how dynamic it is; ``skipped`` names what could not be had, and why;
            ``summary`` and ``verdicts`` as :mod:`dfs_cli.report.sweep` makes them.
        restart: delete what is there of an earlier sweep, once the settings have been checked.

    Returns:
        The results.

    Raises:
        OutputError: the file is of another sweep.
        ConfigError: a budget cannot be reached; nothing has been tuned then.
    """
    module, path = load_model(model) if isinstance(model, str) else model, Path(path)
    data = default_data(describe_model(module)[0], data)
    tuning = tuning or default_tuning(data)
    preprocessing = preprocessing or resolve_preprocessing(module)
    config = dataclasses.replace(
        config, dynamic={b: config.dynamic.get(b) or default_dynamic(b, tuning) for b in config.budgets}
    )
    for budget, dynamic in config.dynamic.items():
        plan_costs(module, dynamic, preprocessing.input_size).check_budget(budget)
    results = _open_results(path, module, config, tuning, data, preprocessing, restart)
    observer = observer or Observer()
    for seed in range(tuning.seed, tuning.seed + config.seeds):
        start = partial(
            Run,
            module,
            data=data,
            tuning=dataclasses.replace(tuning, seed=seed),
            preprocessing=preprocessing,
            observer=observer,
        )
        planned = jobs(config, seed)
        for number, job in enumerate(planned, 1):
            if any(job.matches(p) for p in (*results["points"], *results["skipped"])):
                continue
            observer.job(f"{job.name} ({number} of {len(planned)})")
            try:
                cost, dynamic = _settings(job, config)
                run = start(cost=cost, dynamic=dynamic)
                point = _measure(job, run, results, _answers_path(path, job))
            except (ConfigError, DivergedError) as error:
                # What a baseline cannot reach is a result, not a failure; of ours, what could not be foreseen is.
                if job.method == "dfs" and isinstance(error, ConfigError):
                    raise
                results["skipped"].append({**dataclasses.asdict(job), "reason": str(error)})
            else:
                results["points"].append(point)
            _write(path, results)
        if "cascade" in config.baselines:
            _update_cascades(seed, config, results, path)
            _write(path, results)
    return results


def _open_results(
    path: Path,
    model: nn.Module,
    config: SweepConfig,
    tuning: TuningConfig,
    data: DataConfig,
    preprocessing: Preprocessing,
    restart: bool,
) -> dict[str, Any]:
    """The results so far; an empty record where there are none, or none are wanted."""
    splits = open_splits(data, preprocessing, tuning.seed)
    identity = {
        "recipe": RECIPE,
        "model": describe_model(model)[0],
        "weights_sha256": tensor_digest(model.state_dict()),
        "preprocessing": preprocessing.to_dict(),
        "tuning": tuning.to_dict() | {"workers": None, "device": None},
        # Folders may move; what is in them must not change.
        "data": data.to_dict() | {"data_dir": None},
        "images": {name: len(getattr(splits, name)) for name in ("train", "calibration", "validation")},
        "classes": len(splits.class_names),
        "static_edge_bits": _static_edge_bits(config),
    }
    # Budgets may be added later; those that are there keep their options and gate.
    dynamic = {str(budget): own.to_dict() for budget, own in config.dynamic.items()}
    fresh: dict[str, Any] = {**identity, "dynamic": dynamic, "original": None, "points": [], "skipped": []}
    if restart:
        path.unlink(missing_ok=True)
        shutil.rmtree(answers_folder(path), ignore_errors=True)
    if not path.exists():
        return fresh
    try:
        found = json.loads(path.read_text())
        wanted = json.loads(json.dumps({**identity, "dynamic": dynamic}))
        own = found["dynamic"]
        same = all(found[key] == wanted[key] for key in identity)
        same = same and all(own.get(budget, value) == value for budget, value in wanted["dynamic"].items())
        found["dynamic"] = own | wanted["dynamic"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path} exists and is not the result of a sweep: {error}") from None
    if not same:
        raise OutputError(f"{path} is of a sweep with other settings: pass --force to start again, or another --output")
    return dict(found)


def _static_edge_bits(config: SweepConfig) -> int:
    return max(own.edge_bits for own in config.dynamic.values())


def _settings(job: Job, config: SweepConfig) -> tuple[float, DynamicConfig]:
    """Cost, options and gate of a job's network."""
    if job.budget is None:
        return 1.0, DynamicConfig(STATIC_OPTIONS, _static_edge_bits(config))
    if job.method == "dfs":
        return job.budget, config.dynamic[job.budget]
    if job.method == "skipnet":
        return job.budget, DynamicConfig(PRESETS["skipnet"], PRESET_EDGE_BITS["skipnet"], gate="rnn")
    return job.budget, DynamicConfig((0, *STATIC_OPTIONS), _static_edge_bits(config))


def _measure(job: Job, run: Run, results: dict[str, Any], answers: Path) -> Point:
    static = job.method in ("uniform", "mixed")
    with run.own_generators():
        if static:
            run.plan_static(job.bits)
        else:
            run.plan_dynamic()
        if results["original"] is None:
            top1, top5 = run.evaluate_original()
            results["original"] = {"top1": top1, "top5": top5}
        run.tune()
        if not static:
            run.calibrate()
        converted = run.finish(results["original"]["top1"], results["original"]["top5"])
    evaluation = converted.manifest.validation
    assert evaluation is not None
    point: Point = {
        **dataclasses.asdict(job),
        "cost": evaluation.cost,
        "top1": evaluation.top1,
        "top5": evaluation.top5,
        "steps": run.steps,
    }
    if run.layer_bits:
        point["layer_bits"] = run.layer_bits
    else:
        point["option_shares"] = {str(b): n for b, n in option_shares(run.table, evaluation).items() if n}
    if static:
        _save_answers(answers, run, evaluation.cost)
    else:
        point["gate"] = run.dynamic.gate
        point["keeps_budget"] = converted.keeps_budget
        point["dynamics"] = dynamics_record(evaluation)
    return point


def answers_folder(path: Path) -> Path:
    """Where the static networks' answers lie, for the results ``path``."""
    return path.with_suffix(".answers")


def _answers_path(path: Path, job: Job) -> Path:
    return answers_folder(path) / f"{job.name.replace(', ', '-').replace(' ', '-')}.safetensors"


@torch.inference_mode()
def _save_answers(path: Path, run: Run, cost: float) -> None:
    """Keep what a static network answers, and how sure it is: cascades are made of them."""
    held_out, held_out_targets = run.unfamiliar_images()
    targets: list[Tensor] = []

    def validation_logits() -> Iterator[Tensor]:
        for batch in run.validation_loader():
            if len(batch.targets):
                targets.append(batch.targets)
                yield run.network.run(batch.images.to(run.device)).logits

    validation = confident_answers(validation_logits())
    held_out_answers = confident_answers(run.network.run(images).logits for images in held_out)
    network = StaticNetwork(cost, held_out_answers, validation)
    save_answers(path, network, held_out_targets, torch.cat(targets))


def _update_cascades(seed: int, config: SweepConfig, results: dict[str, Any], path: Path) -> None:
    """Make the best cascade of two of the static networks for each budget anew, of all that there are by now.

    Where the answers of some of them are not there any more, a cascade of the others might be a poorer one: what is recorded
    stays then.
    """
    static = [
        Job(p["method"], p["seed"], p["budget"], p["bits"])
        for p in results["points"]
        if p["method"] in ("uniform", "mixed") and p["seed"] == seed
    ]
    lost = [job for job in static if not _answers_path(path, job).is_file()]
    loaded = [] if lost else [load_answers(_answers_path(path, job)) for job in static]
    steps = {p["steps"] for p in results["points"] if p["seed"] == seed}
    for budget in sorted({*config.budgets, *(p["budget"] for p in results["points"] if p["budget"])}, reverse=True):
        job = Job("cascade", seed, budget)
        if lost and any(job.matches(p) for p in results["points"]):
            continue
        for kind in ("points", "skipped"):
            results[kind] = [p for p in results[kind] if not job.matches(p)]
        found = best_cascade([network for network, _, _ in loaded], budget, *loaded[0][1:]) if loaded else None
        if found is None:
            reason = f"no two of {len(static)} static networks fit the budget"
            if lost:
                reason = f"the answers of {len(lost)} static networks are not in {answers_folder(path)}"
            results["skipped"].append({**dataclasses.asdict(job), "reason": reason})
            continue
        results["points"].append(
            {
                **dataclasses.asdict(job),
                "cost": found.cost,
                "top1": found.top1,
                "steps": max(steps),
                "members": [static[i].name.partition(",")[0] for i in (found.cheap, found.dear)],
                "second_share": found.share,
            }
        )


def _write(path: Path, results: dict[str, Any]) -> None:
    results["summary"], results["verdicts"] = summarise(results), verdicts(results)
    write_atomically(path, json.dumps(results, indent=1) + "\n")
