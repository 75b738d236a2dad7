"""The tuning loop: gate warm-up, then everything, towards the budget."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from dfs_cli.config import TuningConfig
from dfs_cli.cost.table import CostTable
from dfs_cli.data.images import Batch, Images, UnreadableLog
from dfs_cli.data.loading import EpochSampler
from dfs_cli.errors import DivergedError
from dfs_cli.nn.probe import ProbedResNet
from dfs_cli.tuning.losses import cost_excess, distillation_loss
from dfs_cli.tuning.state import TuningState

_EXPLORE = 0.1
_COST_WEIGHT = 0.2
_PRICE_RATE = 0.1
LEAST_PRICE = 1e-3
"""The price is multiplied, so it must stay above zero to come back; so low, it changes no decision."""


class StepRecord(NamedTuple):
    """One step's figures; ``cost`` and ``target`` are fractions of the dense network's cost.

    They are of the pass that the gate decides on: of the only one, or of the second.
    """

    step: int
    total_steps: int
    phase: str
    loss: float
    accuracy: float
    cost: float
    target: float
    price: float
    lr: float


class Goal(NamedTuple):
    """What a network is tuned for.

    Args:
        cost: mean cost of the pass that the gate decides on, of the only one or of the second.
        share: with two passes, the share of a batch's images that enter the second; 0 tunes the first alone.
    """

    cost: float
    share: float | None = None


def seed_everything(seed: int) -> None:
    """Seed every generator that tuning and augmentation use."""
    random.seed(seed)
    torch.manual_seed(seed)


def resolve_epochs(config: TuningConfig, steps_per_epoch: int) -> int:
    """Epochs as asked for, or as many as give ``TuningConfig.MIN_STEPS`` steps."""
    return config.epochs or math.ceil(config.MIN_STEPS / steps_per_epoch)


def target_at(step: int, total_steps: int, ramp: float, start: float, budget: float) -> float:
    """The target cost at a step: from ``start`` down to ``budget``, geometrically over the first ``ramp`` of the steps."""
    progress = min(1.0, step / max(1.0, ramp * total_steps))
    return float(start ** (1 - progress) * budget**progress)


def tune(
    state: TuningState,
    teacher: nn.Module,
    table: CostTable,
    goal: Goal,
    loader: DataLoader[Batch],
    config: TuningConfig,
    device: torch.device,
    unreadable: UnreadableLog,
    on_step: Callable[[StepRecord], None] = lambda record: None,
) -> None:
    """Run the steps that ``state`` has left; ``state`` is up to date after each.

    Args:
        teacher: the original network, for distillation.
        goal: what the network is tuned for.
        loader: over an :class:`EpochSampler`.
        on_step: called after each step; the only place where a run reports.

    Raises:
        DivergedError: the loss is NaN or infinite.
        DataError: too many images are unreadable.
    """
    network = state.network.to(memory_format=torch.channels_last).train()
    teacher = teacher.to(memory_format=torch.channels_last)
    gate = {id(p) for p in network.gate.parameters()}
    trained_later = [p for group in state.optimizer.param_groups for p in group["params"] if id(p) not in gate]
    # Two passes start from the best static mixes: there is nothing to approach slowly.
    approaches = goal.share is None
    warmup_steps = int(config.warmup * state.total_steps) if approaches else 0
    try:
        for batch in _batches(state, loader):
            unreadable.add(batch.unreadable)
            warming_up = state.step < warmup_steps
            for parameter in trained_later:
                parameter.requires_grad_(not warming_up)
            target = goal.cost
            if approaches:
                target = target_at(state.step, state.total_steps, config.ramp, table.dearest, goal.cost)
            images = batch.images.to(device, non_blocking=True, memory_format=torch.channels_last)
            targets = batch.targets.to(device, non_blocking=True)
            record = tuning_step(state, teacher, table, images, targets, goal._replace(cost=target), config)
            on_step(record._replace(phase="gate" if warming_up else "all"))
    finally:
        for parameter in trained_later:
            parameter.requires_grad_(True)
        network.to(memory_format=torch.contiguous_format).eval()


def _batches(state: TuningState, loader: DataLoader[Batch]) -> Iterator[Batch]:
    sampler = loader.sampler
    assert isinstance(sampler, EpochSampler)
    while state.step < state.total_steps:
        sampler.epoch, done = divmod(state.step, state.steps_per_epoch)
        sampler.start = done * (loader.batch_size or 1)
        cast(Images, loader.dataset).draw = sampler.draw
        for batch in loader:
            if len(batch.targets):
                yield batch
            else:
                state.step += 1
        sampler.start = 0


def tuning_step(
    state: TuningState,
    teacher: nn.Module,
    table: CostTable,
    images: Tensor,
    targets: Tensor,
    goal: Goal,
    config: TuningConfig,
) -> StepRecord:
    """One step: forward, backward, update of the parameters and of the price of cost.

    Args:
        images: (N, C, H, W), channels last for speed.
        targets: (N,), class indices.

    Raises:
        DivergedError: the loss is NaN or infinite.
    """
    network = state.network
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=config.amp):
        if isinstance(network, ProbedResNet):
            output = network.run(images, explore=_EXPLORE, share=goal.share)
        else:
            output = network.run(images, explore=_EXPLORE)
        taught = teacher_logits = None
        if config.distillation:
            mirrored = len(output.unsure) if output.unsure is not None and network.config.mirror else 0
            taught = _taught_images(len(images), output.unsure, mirrored)
            teacher_logits = _teacher_logits(teacher, images[taught], mirrored)
    logits, first, unsure = output.logits.float(), output.first, output.unsure
    cost = table.cost(output.decisions)
    loss = _task_loss(logits if first is None else first.float(), targets, teacher_logits, taught, config)
    decided_cost = None
    if output.probs is not None:
        decided = output.decisions
        if unsure is not None:
            # The images that entered the second pass are the first of those that the teacher saw.
            soft = None if teacher_logits is None else teacher_logits[: len(unsure)]
            loss = loss + _task_loss(logits[unsure], targets[unsure], soft, None, config) * (len(unsure) / len(targets))
            decided = decided[unsure, -len(table.blocks) :]
        decided_cost = table.pass_cost(decided)
        excess = cost_excess(decided_cost.float(), table.expected_cost(output.probs), goal.cost)
        loss = loss + _COST_WEIGHT * excess
    value = float(loss.detach())
    lr = max(group["lr"] for group in state.optimizer.param_groups)
    if not math.isfinite(value):
        raise DivergedError(f"the loss is {value} at step {state.step + 1}, learning rate {lr:.2g}: try a smaller --lr")
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)  # now, so that the next forward pass has their memory
    state.scheduler.step_update(state.step + 1)
    if decided_cost is not None:
        ratio = (float(decided_cost.mean()) / goal.cost) ** _PRICE_RATE
        network.price = max(network.price * ratio, LEAST_PRICE)
    state.step += 1
    accuracy = float((logits.argmax(dim=1) == targets).float().mean()) * 100
    shown = float((cost if decided_cost is None else decided_cost).mean())
    return StepRecord(state.step, state.total_steps, "", value, accuracy, shown, goal.cost, network.price, lr)


def _taught_images(images: int, unsure: Tensor | None, mirrored: int) -> Tensor:
    """Half of a batch, less the number of images that the teacher sees twice, ``mirrored``: the teacher costs a forward pass.

    First those that entered the second pass, then others at random.
    """
    order = torch.randperm(images)
    if unsure is None or not len(unsure):
        return order[: (images + 1) // 2]
    unsure = unsure.cpu()
    others = order[~torch.isin(order, unsure)]
    return torch.cat([unsure, others[: max(0, (images + 1) // 2 - mirrored - len(unsure))]])


@torch.no_grad()
def _teacher_logits(teacher: nn.Module, images: Tensor, mirrored: int) -> Tensor:
    """What the teacher says of ``images`` (N, C, H, W): (N, classes).

    Of the first ``mirrored`` ones the mean over the image and its mirror image, which the two passes see: what answers from two
    views should not be taught by one.
    """
    logits: Tensor = teacher(torch.cat([images, images[:mirrored].flip(-1)]) if mirrored else images).float()
    logits, others = logits.split([len(images), mirrored])
    return torch.cat([(logits[:mirrored] + others) / 2, logits[mirrored:]])


def _task_loss(
    logits: Tensor, targets: Tensor, teacher_logits: Tensor | None, taught: Tensor | None, config: TuningConfig
) -> Tensor:
    """Cross-entropy, plus distillation from the teacher on the images ``taught`` (None: all)."""
    loss = F.cross_entropy(logits, targets)
    if teacher_logits is not None:
        students = logits if taught is None else logits[taught]
        loss = loss + config.distillation * distillation_loss(students, teacher_logits, config.temperature)
    return loss
