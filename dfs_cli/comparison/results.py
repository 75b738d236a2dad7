"""The results of a sweep on disk: a JSON file, written after every network; beside it the static networks and their answers."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from dfs_cli.artifact.artifact import tensor_digest
from dfs_cli.atomic import File, held, write_files
from dfs_cli.comparison.intervals import right_answers
from dfs_cli.comparison.jobs import Job
from dfs_cli.comparison.summary import overall, summarise, verdicts
from dfs_cli.config import DataConfig, DynamicConfig, Preprocessing, TuningConfig
from dfs_cli.conversion.defaults import describe_model
from dfs_cli.data.splits import open_splits
from dfs_cli.distributed import is_first, of_first
from dfs_cli.errors import OutputError

RECIPE = 9
"""Raised with every change of how networks are tuned or recorded: results of different recipes must not share a file."""

_GROWING = ("dynamic", "original", "points", "skipped")
"""What changes while a sweep runs; all the rest is its identity."""


class Results:
    """The results so far, which several sweeps may add to at the same time.

    Args:
        path: the JSON file.
        fresh: its content where it does not exist: the identity of the sweep and ``dynamic``; no ``points`` and ``skipped``.
        restart: remove the results of an earlier sweep first.

    Raises:
        OutputError: the file is the result of another sweep, or of none.
    """

    def __init__(self, path: Path, fresh: dict[str, Any], restart: bool = False) -> None:
        self.path, self.fresh = path, fresh
        if restart:
            self._empty()
        self.record = self._read() or copy.deepcopy(fresh)

    def add_budgets(self, dynamic: dict[float, DynamicConfig]) -> None:
        """Budgets may be added; those that are there keep their options and gate.

        Raises:
            OutputError: one of them has others.
        """
        self.fresh["dynamic"] |= _named(dynamic)
        with self.update():  # which compares and stores them
            pass

    def has(self, job: Job) -> bool:
        """Whether a job is done, or could not be done; also by another sweep meanwhile."""
        self.record = (self._read() if is_first() else None) or self.record
        points = [point for point in self.record["points"] if not point.get("unfinished")]
        return of_first(any(job.matches(point) for point in (*points, *self.record["skipped"])))

    def get(self, job: Job) -> dict[str, Any] | None:
        """The point of a job; None: there is none."""
        return of_first(next((point for point in self.record["points"] if job.matches(point)), None))

    def add(self, job: Job, **values: Any) -> None:
        """Record a point or, with a ``reason``, a skipped job, in place of earlier records of the job."""
        with self.update() as record:
            for kind in ("points", "skipped"):
                record[kind] = [point for point in record[kind] if not job.matches(point)]
            record["skipped" if "reason" in values else "points"].append({**dataclasses.asdict(job), **values})

    @contextlib.contextmanager
    def update(self) -> Iterator[dict[str, Any]]:
        """The record as it is on disk now, to change it. It is written at the end of the block; nobody else does meanwhile.

        Raises:
            OutputError: another sweep was started again in the same file, or it cannot be written.
        """
        if not is_first():
            yield self.record
            return
        with held(self.path):
            self.record = self._read() or self.record
            yield self.record
            self.record["summary"], self.record["verdicts"] = summarise(self.record), verdicts(self.record)
            self.record["overall"] = overall([self.record])
            self._write(self.record)

    def _write(self, record: dict[str, Any]) -> None:
        write_files([File(self.path, json.dumps(record, indent=1) + "\n")], replace=True)

    def _empty(self) -> None:
        """Remove earlier results, and the answers of the static networks."""
        with held(self.path):
            if self.path.exists():
                self._write(self.fresh)
            shutil.rmtree(os.path.realpath(answers_folder(self.path)), ignore_errors=True)

    def _read(self) -> dict[str, Any] | None:
        """The content of the file, with this sweep's budgets; None: there is no file."""
        if not self.path.exists():
            return None
        try:
            record: dict[str, Any] = json.loads(self.path.read_text())
            stored, dynamic = record["dynamic"], self.fresh["dynamic"]
            same = all(record.get(key) == value for key, value in self.fresh.items() if key not in _GROWING)
            same = same and all(stored.get(budget, value) == value for budget, value in dynamic.items())
            for point in (*record["points"], *record["skipped"]) if same else ():
                Job.of(point)
                right_answers(point)
            record["dynamic"] = stored | dynamic
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise OutputError(f"{self.path} exists and is not the result of a sweep: {error}") from None
        if not same:
            raise OutputError(
                f"{self.path} holds a sweep with other settings: pass --force to start again, or another --output"
            )
        return record

    def checkpoint_path(self, job: Job, part: str = "") -> Path:
        """The file from which a network that is being tuned can be gone on with; several, one after the other, have a ``part``
        of a job each."""
        return self.path.with_name(f"{self.path.stem}.{_slug(job)}{part}.checkpoint")

    def answers_path(self, job: Job) -> Path:
        """The file of a static network's answers."""
        return answers_folder(self.path) / f"{_slug(job)}.safetensors"

    def network_path(self, job: Job) -> Path:
        """The file of a static network."""
        return answers_folder(self.path) / f"{_slug(job)}.network.safetensors"


def _slug(job: Job) -> str:
    return job.name.replace(", ", "-").replace(" ", "-")


def answers_folder(path: Path) -> Path:
    """The folder of the static networks and their answers, for the results ``path``."""
    return path.with_suffix(".answers")


def open_results(
    path: Path,
    model: nn.Module,
    dynamic: dict[float, DynamicConfig],
    spend: bool,
    static_fixed_bits: int,
    tuning: TuningConfig,
    data: DataConfig,
    preprocessing: Preprocessing,
    restart: bool,
) -> Results:
    """The results so far; an empty record where there are none, or with ``restart``.

    Args:
        dynamic: options and gate of the dynamic network for each budget.
        static_fixed_bits: bitwidth of the fixed layers of static networks.

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
        "static_fixed_bits": static_fixed_bits,
        "spend": spend,
    }
    fresh: dict[str, Any] = {**identity, "dynamic": _named(dynamic), "original": None, "points": [], "skipped": []}
    return Results(path, fresh, restart)


def _named(dynamic: dict[float, DynamicConfig]) -> dict[str, Any]:
    return {str(budget): settings.to_dict() for budget, settings in dynamic.items()}
