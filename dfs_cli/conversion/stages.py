"""The stages of a conversion, one function each; what one gives, the next one takes."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dfs_cli.artifact.manifest import Manifest
from dfs_cli.config import DynamicConfig, Preprocessing, TuningConfig
from dfs_cli.control.base import HeldOut, Request, controller_of
from dfs_cli.conversion.converted import Converted
from dfs_cli.conversion.setup import Setup, eval_batch, hard_crops
from dfs_cli.cost.operating_point import OperatingPoint
from dfs_cli.cost.table import CostTable
from dfs_cli.data.images import Batch, Images, UnreadableLog
from dfs_cli.data.loading import EpochSampler, eval_loader, load_all, train_loader
from dfs_cli.data.preprocessing import train_transform
from dfs_cli.distributed import joined_rows, rank, share, size
from dfs_cli.evaluation.chance import chance_hint
from dfs_cli.evaluation.evaluate import evaluate_accuracy, evaluate_network
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.passes import TuningTarget
from dfs_cli.observer import Observer
from dfs_cli.records import Agreement, StepRecord, Tuned
from dfs_cli.tuning.loop import seed_everything, tune
from dfs_cli.tuning.state import TuningState, start_state

_TIMED_STEPS = 8


class Planned(NamedTuple):
    """A network that is ready to be tuned.

    Args:
        network: the network.
        dynamic: its options and gate: not what was asked for where one pass for all images is better.
        table: its costs.
        target: what it is tuned for.
        teacher: the original network, on the same device.
        unreadable: training images that could not be read.
        agreement: with the original, at 8 bits; None: not compared.
    """

    network: DynamicResNet
    dynamic: DynamicConfig
    table: CostTable
    target: TuningTarget
    teacher: nn.Module
    unreadable: UnreadableLog
    agreement: Agreement | None = None


@contextmanager
def own_generators(seed: int) -> Iterator[None]:
    """Seed everything random, and leave the caller's generators as they were."""
    python = random.getstate()
    # Of several processes, each leaves the others' devices alone.
    there = torch.cuda.device_count()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if size() > 1 and there else range(there)):
        seed_everything(seed)
        try:
            yield
        finally:
            random.setstate(python)


def unreadable_log(setup: Setup) -> UnreadableLog:
    """Of the training images, held-out ones among them."""
    return UnreadableLog("training", len(setup.splits.train) + len(setup.splits.calibration))


def evaluate_original(setup: Setup, observer: Observer) -> tuple[float, float]:
    """Top-1 and top-5 of the original network on the validation split, in percent."""
    validation = setup.splits.validation
    observer.stage("original", len(share(len(validation))))
    log = UnreadableLog("validation", len(validation))
    model = copy.deepcopy(setup.model).to(setup.device).eval()
    # A loader draws a number: tuning must not depend on whether the original was evaluated before.
    with torch.random.fork_rng(devices=[]):
        top1, top5 = evaluate_accuracy(model, validation_loader(setup), setup.device, log, observer.advance)
    hint = chance_hint("the original network", top1, len(validation), len(setup.splits.class_names))
    if hint and setup.source.weights != "random":
        observer.note(hint)
    return top1, top5


def validation_loader(setup: Setup) -> DataLoader[Batch]:
    """This process's share of the validation images, in order."""
    return own_batches(setup.splits.validation, setup)


def own_batches(images: Images, setup: Setup) -> DataLoader[Batch]:
    """This process's share of ``images``, in order."""
    own = images.subset(share(len(images)))
    return eval_loader(own, eval_batch(setup.preprocessing), setup.workers, setup.pin)


def start_tuning(setup: Setup, planned: Planned) -> TuningState:
    """The state of tuning before the first step. From here on, each process draws its own numbers."""
    state = start_state(planned.network, setup.tuning, setup.steps_per_epoch)
    if rank():
        seed_everything((setup.tuning.seed * 1_000_003 + rank()) % 2**63)
    return state


def tune_network(
    setup: Setup, planned: Planned, state: TuningState, observer: Observer, after_step: Callable[[], None]
) -> None:
    """Tune the network, in place, from ``state`` on."""
    tuning, train = setup.tuning, setup.splits.train
    if train.transform is not None:
        train = train.with_transform(train_transform(setup.preprocessing, tuning.hflip, tuning.min_crop))
    sampler = EpochSampler(len(train), tuning.seed, tuning.batch_size if size() > 1 else None)
    loader = train_loader(train, sampler, len(share(tuning.batch_size)), setup.workers, setup.pin)
    observer.stage("tuning", state.total_steps)
    tell = _with_estimate(observer)

    def on_step(record: StepRecord) -> None:
        tell(record)
        after_step()

    tune(
        state,
        planned.teacher,
        planned.table,
        planned.target,
        loader,
        tuning,
        setup.device,
        planned.unreadable,
        on_step,
        observer.note,
    )


def _with_estimate(observer: Observer) -> Callable[[StepRecord], None]:
    """Passes steps on to an observer, and says after the first ones how long tuning will take on this machine."""
    times: list[float] = []

    def on_step(record: StepRecord) -> None:
        observer.step(record)
        times.append(time.monotonic())
        if len(times) == _TIMED_STEPS and record.step < record.total_steps:
            # The very first step is slower than the others.
            seconds = (times[-1] - times[0]) / (_TIMED_STEPS - 1)
            observer.estimate(seconds * (record.total_steps - record.step))

    return on_step


def held_out_images(
    images: Images,
    use_hard_crops: bool,
    preprocessing: Preprocessing,
    tuning: TuningConfig,
    workers: int,
    device: torch.device,
    unreadable: UnreadableLog,
    observer: Observer,
) -> HeldOut:
    """Held-out images in memory (every operating point is tried on all of them), and their classes. Of several processes each
    has a share of the images.

    Args:
        use_hard_crops: as the controller's ``uses_hard_crops`` says.
    """
    shown = hard_crops(images, preprocessing, tuning) if use_hard_crops else images
    shown = shown.subset(share(len(shown)))
    observer.stage("loading held-out images", len(shown))
    batches, targets = load_all(shown, eval_batch(preprocessing), workers, device, unreadable, observer.advance)
    unreadable.join()
    return HeldOut(batches, joined_rows(targets)[0])


def set_operating_point(
    network: DynamicResNet, table: CostTable, held_out: HeldOut, request: Request, observer: Observer
) -> OperatingPoint:
    """Set the operating point on held-out images, in full precision, whatever tuning used."""
    observer.stage("setting the operating point", None)
    with torch.inference_mode():
        return controller_of(network).set_operating_point(network, table, held_out, request, observer.tried)


def finish(
    setup: Setup,
    planned: Planned,
    point: OperatingPoint,
    original: tuple[float, float] | None,
    observer: Observer,
    on_logits: Callable[[Tensor, Tensor], None] = lambda logits, targets: None,
) -> Converted:
    """Evaluate the network on the validation split, and describe it.

    Args:
        original: top-1 and top-5 of the original, which are recorded beside the network's own; None: its answers
            are the labels.
        on_logits: as for :func:`dfs_cli.evaluation.evaluate.evaluate_network`.
    """
    validation = setup.splits.validation
    observer.stage("validation", len(share(len(validation))))
    log = UnreadableLog("validation", len(validation))
    network, table = planned.network, planned.table
    evaluation = evaluate_network(
        network, table, validation_loader(setup), setup.device, log, on_batch=observer.advance, on_logits=on_logits
    )
    top1, top5 = original or (None, None)
    is_synthetic = setup.synthesis is not None
    manifest = Manifest(
        architecture=setup.architecture,
        model_args=setup.model_args,
        class_names=() if is_synthetic else setup.splits.class_names,
        preprocessing=setup.preprocessing,
        dynamic=planned.dynamic,
        table=table,
        budget=setup.request.budget,
        operating_point=point.value,
        limit=setup.configuration.limit,
        configuration=setup.configuration.replace(
            dynamic=planned.dynamic, unreadable_training_images=tuple(sorted(planned.unreadable.reasons))
        ),
        source=setup.source.replace(top1=top1, top5=top5),
        agreement=planned.agreement,
        held_out=Tuned(point.cost, point.top1),
        movable=controller_of(network).movable(table),
        bound=controller_of(network).largest_cost(table) if is_synthetic else None,
        validation=evaluation.replace(is_synthetic=is_synthetic),
    )
    return Converted(network, manifest)
