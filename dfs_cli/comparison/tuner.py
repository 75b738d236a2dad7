"""Tunes and measures the networks of a sweep, one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dfs_cli.artifact.artifact import artifact_file
from dfs_cli.atomic import write_atomically
from dfs_cli.checkpoint import Checkpoints
from dfs_cli.comparison.cascade import Answers, StaticNetwork, save_answers
from dfs_cli.comparison.intervals import answers_record
from dfs_cli.comparison.jobs import Job, Settings
from dfs_cli.comparison.results import Results
from dfs_cli.config import DataConfig, Preprocessing, TuningConfig
from dfs_cli.conversion import stages
from dfs_cli.conversion.convert import run
from dfs_cli.conversion.converted import Converted
from dfs_cli.conversion.setup import Setup, hard_crops, prepare
from dfs_cli.data.images import Images, UnreadableLog
from dfs_cli.distributed import is_first, of_first, share
from dfs_cli.errors import printable
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.observer import Observer
from dfs_cli.records import Evaluation
from dfs_cli.report.cost import dynamics_record, option_shares


class TunedNetwork(NamedTuple):
    """A tuned network, how it came about, and its answers to validation images and to held-out ones as hard as new ones."""

    setup: Setup
    converted: Converted
    validation: Answers
    held_out: Answers

    @property
    def evaluation(self) -> Evaluation:
        """On the validation split."""
        evaluation = self.converted.manifest.validation
        assert evaluation is not None, "a conversion ends with an evaluation"
        return evaluation

    @property
    def answers(self) -> StaticNetwork:
        """What a static network answers, at which cost."""
        return StaticNetwork(self.evaluation.cost, self.held_out, self.validation)

    def point(self) -> dict[str, Any]:
        """What the results record of every network."""
        manifest, evaluation = self.converted.manifest, self.evaluation
        return {
            "cost": evaluation.cost,
            "top1": evaluation.top1,
            "top5": evaluation.top5,
            "held_out_top1": self.held_out.top1,
            "steps": self.setup.steps,
            "agreement": manifest.agreement.to_dict() if manifest.agreement else None,
            **answers_record(self.validation.right.numpy(), evaluation.unreadable),
        }

    def dynamic_point(self) -> dict[str, Any]:
        """The same, and how dynamic the network is."""
        manifest, evaluation = self.converted.manifest, self.evaluation
        return self.point() | {
            "option_shares": {str(b): n for b, n in option_shares(manifest.table, evaluation).items() if n},
            "gate": self.setup.dynamic.gate,
            "keeps_budget": self.converted.keeps_budget,
            "dynamics": dynamics_record(evaluation),
        }


@dataclasses.dataclass
class Tuner:
    """Tunes the networks of a sweep, with the same weights to begin with and, unless a baseline gains from others, the same
    images and as many steps.

    Args:
        settings: of a job.
        restart: checkpoints are of no use.
    """

    model: nn.Module
    settings: Callable[[Job], Settings]
    data: DataConfig
    tuning: TuningConfig
    preprocessing: Preprocessing
    results: Results
    observer: Observer
    checkpoints: Checkpoints
    restart: bool
    _has_told: bool = False

    @contextmanager
    def tuned(
        self,
        job: Job,
        part: str = "",
        settings: Settings | None = None,
        change: Callable[[Setup], Setup] = lambda setup: setup,
    ) -> Iterator[TunedNetwork]:
        """Tune and evaluate a network. Its checkpoint is there until the end of the context, in which it is recorded.

        Args:
            part: where a job has several networks, a name for each.
            settings: in place of the job's.
            change: what is different from a conversion of these settings.
        """
        budget, dynamic, spend = settings or self.settings(job)
        tuning = self.tuning.replace(seed=job.seed)
        with self.checkpoints.at(self.results.checkpoint_path(job, part), self.restart) as checkpoint:
            told = Observer() if self._has_told else self.observer  # the images are those of the first network
            setup = prepare(
                self.model,
                budget,
                self.data,
                dynamic,
                tuning,
                self.preprocessing,
                None,
                spend,
                told,
                checkpoint=checkpoint,
            )
            self._has_told = True
            setup, validation = change(setup), list[Answers]()
            original = self._original(setup)

            def on_logits(logits: Tensor, targets: Tensor) -> None:
                validation.append(Answers.of(logits, targets))

            converted = run(setup, self.observer, original, checkpoint, on_logits)
            held_out = self._held_out_answers(setup, converted.network)
            yield TunedNetwork(setup, converted, Answers.join(validation), held_out)

    def _original(self, setup: Setup) -> tuple[float, float]:
        """Top-1 and top-5 of the original network, which are measured once."""
        if of_first(self.results.record["original"]) is None:
            with stages.own_generators(setup.tuning.seed):
                top1, top5 = stages.evaluate_original(setup, self.observer)
            with self.results.update() as record:
                record["original"] = {"top1": top1, "top5": top5}
        original = of_first(self.results.record["original"])
        return original["top1"], original["top5"]

    def _held_out_answers(self, setup: Setup, network: DynamicResNet) -> Answers:
        images = hard_crops(setup.splits.calibration, setup.preprocessing, setup.tuning)
        self.observer.stage("held-out images", len(share(len(images))))
        return _answers(network, images, setup, self.observer)

    def save(self, job: Job, tuned: TunedNetwork) -> None:
        """Save a static network and its answers, from which cascades are made."""
        if is_first():
            save_answers(self.results.answers_path(job), tuned.answers)
            file = artifact_file(self.results.network_path(job), *tuned.converted)
            write_atomically(file.path, file.data, file.check)


def least_sure(network: DynamicResNet, setup: Setup, part: float, observer: Observer) -> Images:
    """The ``part`` of the training images that ``network`` is least sure of, as hard as new ones; at least one batch."""
    images = hard_crops(setup.splits.train, setup.preprocessing, setup.tuning)
    observer.stage("training images", len(share(len(images))))
    names, log = images.names(), UnreadableLog("training", len(images))
    found = _answers(network, images, setup, observer, log)
    readable = [index for index, name in enumerate(names) if printable(name) not in log.reasons]
    count = max(round(part * len(readable)), min(setup.tuning.batch_size, len(readable)))
    least = found.confidence.argsort(stable=True)[:count].sort().values
    return setup.splits.train.subset([readable[index] for index in least.tolist()])


@torch.inference_mode()
def _answers(
    network: DynamicResNet, images: Images, setup: Setup, observer: Observer, log: UnreadableLog | None = None
) -> Answers:
    """What ``network`` answers to ``images``, of which each process has its share."""
    network, found = network.to(setup.device).eval(), list[Answers]()
    for batch in stages.own_batches(images, setup):
        observer.advance(len(batch.targets) + len(batch.unreadable))
        if log is not None:
            log.add(batch.unreadable)
        if len(batch.targets):
            found.append(Answers.of(network.run(batch.images.to(setup.device)).logits, batch.targets))
    if log is not None:
        log.join()
    return Answers.join(found)
