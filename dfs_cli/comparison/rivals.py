"""The baselines of a sweep that take more than one network: SkipNet's gate, and cascades."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dfs_cli.artifact.artifact import load_artifact
from dfs_cli.comparison.cascade import Cascade, StaticNetwork, best_pair, cascade_of, load_answers, percent
from dfs_cli.comparison.intervals import answers_record
from dfs_cli.comparison.jobs import Job, Settings
from dfs_cli.comparison.results import answers_folder
from dfs_cli.comparison.summary import STATIC
from dfs_cli.comparison.tuner import Tuner, least_sure
from dfs_cli.config import GateKind
from dfs_cli.conversion.setup import Setup
from dfs_cli.distributed import is_first, of_first
from dfs_cli.errors import ConfigError, DivergedError
from dfs_cli.nn.network import DynamicResNet

_MOST_LONGER = 16  # times the steps of the other networks
# Times their learning rate: on held-out images a ResNet-56 with half of its blocks has 84.8 then, and 82.9 with theirs.
_RATE = 3.0


def tune_skipnet(tuner: Tuner, job: Job) -> None:
    """SkipNet's gate (Wang et al., 2018), as strong as it can be made.

    It begins with the best static choice of skipped blocks and learns to deviate from it, in twice as many steps again and
    again, until that gains nothing on held-out images, or sixteen times as many are done; at a learning rate for networks in
    floating point. Where it never is better than the static choice, tuned, it is that.
    """
    budget, dynamic, spend = tuner.settings(job)
    best: dict[str, Any] = {}
    tried: list[dict[str, Any]] = []
    if (earlier := tuner.results.get(job)) is not None:  # it was interrupted
        tried = earlier["tried"]
        best = {name: value for name, value in earlier.items() if name not in ("tried", "unfinished")}

    def attempt(gate: GateKind, longer: int) -> float:
        """Top-1 on held-out images."""
        nonlocal best
        if known := [t["held_out_top1"] for t in tried if (t["gate"], t["longer"]) == (gate, longer)]:
            return float(known[0])
        tuner.observer.job(f"{job.name}, {gate}, {longer} times the steps")
        # The best static choice need not cost just the budget.
        settings = Settings(budget, dynamic.replace(gate=gate), spend and gate != "static")

        def for_floats(setup: Setup) -> Setup:
            steps, rate = longer * setup.steps, _RATE * setup.tuning.lr
            return dataclasses.replace(setup, tuning=setup.tuning.replace(steps=steps, epochs=None, lr=rate))

        with tuner.tuned(job, f"-{gate}-{longer}", settings, for_floats) as tuned:
            found = tuned.dynamic_point()
            kept = "held_out_top1", "gate", "steps", "cost", "top1"
            tried.append({"longer": longer, **{name: found[name] for name in kept}})
            if not best or found["held_out_top1"] > best["held_out_top1"]:
                best = found
            tuner.results.add(job, **best | {"tried": tried, "unfinished": True})
        return float(found["held_out_top1"])

    attempt("static", 1)
    last, longer = -math.inf, 1
    with contextlib.suppress(ConfigError, DivergedError):  # of a gate: what there is, is kept
        while longer <= _MOST_LONGER and (found := attempt("rnn", longer)) > last:
            last, longer = found, 2 * longer
    tuner.results.add(job, **best | {"tried": tried})


def tune_cascade(tuner: Tuner, job: Job) -> None:
    """The best cascade of two static networks for a budget. The second one is tuned again on the share of the training images
    that the first one is least sure of; where that gains nothing on held-out images, the cascade is that of both as they were.

    Where the answers of some static networks are missing, or are those of different images, a cascade of the others might be
    worse: an earlier record is kept.
    """
    results, budget = tuner.results, job.budget
    assert budget is not None, "a cascade has one"
    points = of_first([p for p in results.record["points"] if p["method"] in STATIC and p["seed"] == job.seed])
    static = [Job.of(point) for point in points]
    problem, networks = of_first(_load(tuner, static) if is_first() else (None, []))
    before = results.get(job)
    if problem:
        if before is None:
            results.add(job, reason=problem)
        return None
    best = best_pair(networks, budget)
    if best is None:
        results.add(job, reason=f"no two of {len(static)} static networks fit the budget")
        return None
    plain, *pair = best
    (first, second), members = (static[index] for index in pair), [points[index] for index in pair]
    names = [first.network, second.network]
    if before is not None and before["members"] == names:
        return None

    def record(cascade: Cascade, unreadable: Sequence[str]) -> None:
        results.add(
            job,
            cost=cascade.cost,
            top1=percent(cascade.right("validation")),
            held_out_top1=cascade.held_out_top1,
            steps=members[1]["steps"],
            members=names,
            second_share=cascade.share("validation"),
            second_is_tuned_for_it=cascade is not plain,
            **_answers_record(cascade, unreadable, members),
        )

    if (seen := plain.share("held_out")) < 1:  # else it is tuned for all of them already
        network = _network(tuner, first)

        def on_what_it_will_see(setup: Setup) -> Setup:
            images = least_sure(network, setup, seen, tuner.observer)
            batch = min(setup.tuning.batch_size, len(images))
            tuning = setup.tuning.replace(steps=setup.steps, epochs=None, batch_size=batch)
            splits = dataclasses.replace(setup.splits, train=images)
            return dataclasses.replace(setup, splits=splits, tuning=tuning)

        part = f"-for-{budget:g}-after-{first.network.replace(' ', '-')}"
        with contextlib.suppress(DivergedError), tuner.tuned(second, part, change=on_what_it_will_see) as tuned:
            answers = tuned.answers
            again = cascade_of(plain.cheap, answers, budget) if answers.is_comparable(plain.cheap) else None
            if again is not None and again.held_out_top1 > plain.held_out_top1:
                return record(again, tuned.evaluation.unreadable)
    return record(plain, members[1]["unreadable"])


def _load(tuner: Tuner, static: list[Job]) -> tuple[str | None, list[StaticNetwork]]:
    """What static networks answered, or why no cascade can be made of them."""
    results = tuner.results
    paths = [(results.answers_path(job), results.network_path(job)) for job in static]
    if missing := sum(not (answers.is_file() and network.is_file()) for answers, network in paths):
        return f"{missing} of {len(static)} static networks are not in {answers_folder(results.path)}", []
    networks = [load_answers(answers) for answers, _ in paths]
    if any(not network.is_comparable(networks[0]) for network in networks):
        return "the static networks answered different images: some could not be read each time", []
    return None, networks


def _network(tuner: Tuner, job: Job) -> DynamicResNet:
    """A static network of the sweep, which the first process alone has saved."""
    content = of_first(tuner.results.network_path(job).read_bytes() if is_first() else b"")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.safetensors"
        file.write_bytes(content)
        return load_artifact(file)[0]


def _answers_record(cascade: Cascade, unreadable: Sequence[str], members: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of a cascade's answers; empty where those of its members are not of the same images."""
    right = cascade.right("validation")
    seen = [(len(right), sorted(unreadable)), *((point["images"], point["unreadable"]) for point in members)]
    return answers_record(right.numpy(), unreadable) if all(one == seen[0] for one in seen) else {}
