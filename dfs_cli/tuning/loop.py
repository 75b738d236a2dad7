"""The tuning loop: towards a target cost, with the original network as teacher."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from dfs_cli.config import TuningConfig
from dfs_cli.cost.table import CostTable
from dfs_cli.data.images import Batch, Images, UnreadableLog
from dfs_cli.data.loading import EpochSampler
from dfs_cli.distributed import alone, largest, of_all, size, together, total
from dfs_cli.errors import DivergedError
from dfs_cli.nn.passes import TuningTarget
from dfs_cli.records import StepRecord
from dfs_cli.tuning.state import TuningState
from dfs_cli.tuning.step import Figures, StepLoss

_MULTIPLIER_RATE = 0.1
_EXPLODED = 100  # times the loss of a network that guesses
_LEAST_MULTIPLIER = 1e-3  # steps multiply it: zero would stay zero; this low, it changes no decision


def seed_everything(seed: int) -> None:
    """Seed every generator that tuning and augmentation use."""
    random.seed(seed)
    torch.manual_seed(seed)


def tune(
    state: TuningState,
    teacher: nn.Module,
    table: CostTable,
    target: TuningTarget,
    loader: DataLoader[Batch],
    config: TuningConfig,
    device: torch.device,
    unreadable: UnreadableLog,
    on_step: Callable[[StepRecord], None] = lambda record: None,
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Run the remaining steps of ``state``, which is up to date after each.

    Of several processes each has its part of every batch; all of them have the same network after each step.

    Args:
        teacher: the original network, for distillation.
        target: what the network is tuned for.
        loader: over an :class:`EpochSampler`.
        on_step: called with the record of each step; nothing else is reported.
        note: told where the device's memory does not suffice for a whole batch.

    Raises:
        DivergedError: the loss is NaN, infinite, or a hundred times that of guessing.
        DataError: too many images are unreadable.
        LostProcessError: another process ended.
    """
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    network = state.network.to(memory_format=layout).train()
    step_loss = StepLoss(network, teacher.to(memory_format=layout), table, config)
    module: nn.Module | None = None
    try:
        for batch in _batches(state, loader):
            unreadable.add(batch.unreadable)
            images = batch.images.to(device, non_blocking=True, memory_format=layout)
            targets = batch.targets.to(device, non_blocking=True)
            if module is None:
                module = _distributed(step_loss, state, images, targets, target, note)
            on_step(tuning_step(state, module, images, targets, target, config, note))
    finally:
        network.to(memory_format=torch.contiguous_format).eval()


def _batches(state: TuningState, loader: DataLoader[Batch]) -> Iterator[Batch]:
    """The batches that remain; those of which a process has no readable image are left out."""
    sampler = loader.sampler
    assert isinstance(sampler, EpochSampler)
    while state.step < state.total_steps:
        sampler.epoch, done = divmod(state.step, state.steps_per_epoch)
        sampler.start = done * (sampler.batch_size or loader.batch_size or 1)
        cast(Images, loader.dataset).draw = sampler.draw
        for batch in loader:
            if min(of_all(len(batch.targets))):
                yield batch
            else:
                state.step += 1
            if state.step >= state.total_steps:
                break
        sampler.start = 0


def _distributed(
    step_loss: StepLoss,
    state: TuningState,
    images: Tensor,
    targets: Tensor,
    target: TuningTarget,
    note: Callable[[str], None],
) -> nn.Module:
    """``step_loss`` whose gradients are those of all processes together, in as many pieces as fit into the memory of each."""
    if size() == 1:
        return step_loss
    pieces = before = state.pieces
    while True:  # alone: a process that fails among others cannot try again
        parts = images.tensor_split(pieces)[:1], targets.tensor_split(pieces)[:1]
        try:
            with alone(), torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
                _differentiate(step_loss, *parts, target)
            break
        except torch.OutOfMemoryError:
            if pieces >= len(images):
                raise
        finally:
            state.optimizer.zero_grad(set_to_none=True)
        pieces = _more(pieces, len(images))
    (state.pieces,) = largest(pieces)
    if state.pieces > before:
        note(_in_pieces(state.pieces))
    # Routing leaves some parameters without a gradient in some process, or in all of them.
    return DistributedDataParallel(step_loss, broadcast_buffers=False, find_unused_parameters=True)


def tuning_step(
    state: TuningState,
    step_loss: nn.Module,
    images: Tensor,
    targets: Tensor,
    target: TuningTarget,
    config: TuningConfig,
    note: Callable[[str], None] = lambda text: None,
) -> StepRecord:
    """One step: forward, backward, update of the parameters and of the cost multiplier.

    Where the device's memory does not suffice, the batch is divided into pieces, whose gradients are added up.

    Args:
        step_loss: a :class:`StepLoss`, or what is wrapped around it.
        images: (N, C, H, W), channels last for speed.
        targets: (N,), class indices.

    Raises:
        DivergedError: the loss is NaN, infinite, or a hundred times that of guessing.
    """
    network = state.network
    while True:
        pieces = min(state.pieces, *of_all(len(images)))
        generators = torch.get_rng_state()
        try:
            figures = _differentiate(step_loss, images.tensor_split(pieces), targets.tensor_split(pieces), target)
            break
        except torch.OutOfMemoryError:
            if size() > 1 or pieces >= len(images):
                raise
        state.optimizer.zero_grad(set_to_none=True)
        torch.set_rng_state(generators)
        state.pieces = _more(pieces, len(images))
        note(_in_pieces(state.pieces))
    lr = max(group["lr"] for group in state.optimizer.param_groups)
    guessing = math.log(figures.classes) * (config.label_weight + config.distillation * config.temperature**2)
    _check_healthy("loss", figures.loss, _EXPLODED * guessing, state.step, lr)
    if state.sizes:
        state.sizes.scale_gradients()
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
    _check_healthy("gradient's norm", float(norm), math.inf, state.step, lr)
    with state.sizes.proportional() if state.sizes else nullcontext():
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)  # now, to free their memory for the next forward pass
    state.scheduler.step_update(state.step + 1)
    if not math.isnan(figures.chosen_cost):
        ratio = (figures.chosen_cost / target.cost) ** _MULTIPLIER_RATE
        network.controller.cost_multiplier = max(network.controller.cost_multiplier * ratio, _LEAST_MULTIPLIER)
    state.step += 1
    multiplier = network.controller.cost_multiplier
    return StepRecord(
        state.step, state.total_steps, figures.loss, figures.accuracy, figures.cost, target.cost, multiplier, lr
    )


def _differentiate(
    step_loss: nn.Module, images: Sequence[Tensor], targets: Sequence[Tensor], target: TuningTarget
) -> Figures:
    """Give the parameters their gradients, added up over pieces of a batch (N, C, H, W each); the batch's figures."""
    counts = total(torch.tensor([len(piece) for piece in images], dtype=torch.float64))
    shares = (counts / counts.sum()).tolist()
    found: list[Figures] = []
    for number, share in enumerate(shares):
        is_last = number == len(images) - 1
        is_kept = not is_last and isinstance(step_loss, DistributedDataParallel)
        with together(), step_loss.no_sync() if is_kept else nullcontext():  # type: ignore[operator]
            loss, figures = step_loss(images[number], targets[number], target)
            if is_last and number and size() > 1:
                # What only earlier pieces used would be taken for unused, and its gradient stay this process's own.
                loss = loss + sum(0.0 * p.sum() for p in step_loss.parameters() if p.grad is not None)
            (loss * share if len(images) > 1 else loss).backward()
        found.append(figures)
    return Figures.mean(found, shares)


def _more(pieces: int, images: int) -> int:
    """Twice as many pieces of a batch, and memory for them."""
    torch.cuda.empty_cache()
    return min(2 * pieces, images)


def _in_pieces(pieces: int) -> str:
    return (
        f"the device's memory does not suffice for a batch: it is divided into {pieces} pieces, whose gradients are added up, "
        f"as with --grad-accum-steps {pieces}"
    )


def _check_healthy(name: str, value: float, limit: float, step: int, lr: float) -> None:
    """Raises DivergedError where ``value`` is NaN, infinite, or above ``limit``."""
    if not math.isfinite(value) or value > limit:
        raise DivergedError(f"the {name} is {value:.3g} at step {step + 1}, learning rate {lr:.2g}: try a smaller --lr")
