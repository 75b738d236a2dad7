"""The results of a sweep on disk: a JSON file, written after every network, and the static networks' answers beside it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from dfs_cli.artifact.artifact import tensor_digest
from dfs_cli.atomic import write_atomically
from dfs_cli.comparison.jobs import Job, static_fixed_bits
from dfs_cli.comparison.summary import summarise, verdicts
from dfs_cli.config import DataConfig, Preprocessing, SweepConfig, TuningConfig
from dfs_cli.conversion.defaults import describe_model
from dfs_cli.data.splits import open_splits
from dfs_cli.errors import OutputError

RECIPE = 6
"""Raised with every change of how networks are tuned: results of different recipes must not share a file."""


class Results:
    """The results so far.

    Args:
        path: the JSON file.
        record: its content: the identity of the sweep, ``points``, ``skipped``, ``summary`` and ``verdicts``.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path, self.record = path, record

    def has(self, job: Job) -> bool:
        """Whether a job is done, or could not be done."""
        return any(job.matches(point) for point in (*self.record["points"], *self.record["skipped"]))

    def add(self, job: Job, **values: Any) -> None:
        """Record a point or, with a ``reason``, a skipped job, and write the file."""
        self.drop(job)
        self.record["skipped" if "reason" in values else "points"].append({**dataclasses.asdict(job), **values})
        self.write()

    def drop(self, job: Job) -> None:
        """Remove the records of a job."""
        for kind in ("points", "skipped"):
            self.record[kind] = [point for point in self.record[kind] if not job.matches(point)]

    def write(self) -> None:
        """Update summary and verdicts, and write the file."""
        self.record["summary"], self.record["verdicts"] = summarise(self.record), verdicts(self.record)
        write_atomically(self.path, json.dumps(self.record, indent=1) + "\n")

    def answers_path(self, job: Job) -> Path:
        """The file of a static network's answers."""
        name = job.name.replace(", ", "-").replace(" ", "-")
        return answers_folder(self.path) / f"{name}.safetensors"


def answers_folder(path: Path) -> Path:
    """The folder of the static networks' answers, for the results ``path``."""
    return path.with_suffix(".answers")


def open_results(
    path: Path,
    model: nn.Module,
    config: SweepConfig,
    tuning: TuningConfig,
    data: DataConfig,
    preprocessing: Preprocessing,
    restart: bool,
) -> Results:
    """The results so far; an empty record where there are none, or with ``restart``.

    Raises:
        OutputError: the file is the result of another sweep, or of none.
    """
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
        "static_fixed_bits": static_fixed_bits(config),
        "spend": config.spend,
    }
    # Budgets may be added later; those that are there keep their options and gate.
    dynamic = {str(budget): settings.to_dict() for budget, settings in config.dynamic.items()}
    fresh: dict[str, Any] = {**identity, "dynamic": dynamic, "original": None, "points": [], "skipped": []}
    if restart:
        path.unlink(missing_ok=True)
        shutil.rmtree(answers_folder(path), ignore_errors=True)
    if not path.exists():
        return Results(path, fresh)
    try:
        record = json.loads(path.read_text())
        stored = record["dynamic"]
        same = all(record[key] == value for key, value in identity.items())
        same = same and all(stored.get(budget, value) == value for budget, value in dynamic.items())
        record["dynamic"] = stored | dynamic
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OutputError(f"{path} exists and is not the result of a sweep: {error}") from None
    if not same:
        raise OutputError(f"{path} holds a sweep with other settings: pass --force to start again, or another --output")
    return Results(path, record)
