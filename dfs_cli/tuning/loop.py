"""The tuning loop: towards a target cost, with the original network as teacher."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from dfs_cli.config import TuningConfig
from dfs_cli.cost.table import CostTable
from dfs_cli.data.images import Batch, Images, UnreadableLog
from dfs_cli.data.loading import EpochSampler
from dfs_cli.errors import DivergedError
from dfs_cli.nn.passes import Output, TuningTarget
from dfs_cli.records import StepRecord
from dfs_cli.tuning.losses import cost_excess, distillation_loss
from dfs_cli.tuning.state import TuningState

_COST_WEIGHT = 0.2
_MULTIPLIER_RATE = 0.1
_EXPLODED = 100  # times the loss of a network that guesses
_LEAST_MULTIPLIER = 1e-3  # steps multiply it: zero would stay zero; this low, it changes no decision


def seed_everything(seed: int) -> None:
    """Seed every generator that tuning and augmentation use."""
    random.seed(seed)
    torch.manual_seed(seed)


def target_at(step: int, total_steps: int, ramp: float, start: float, budget: float) -> float:
    """The target cost at a step: it falls geometrically from ``start`` to ``budget`` over the first share ``ramp`` of steps."""
    progress = min(1.0, step / max(1.0, ramp * total_steps))
    return float(start ** (1 - progress) * budget**progress)


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
) -> None:
    """Run the remaining steps of ``state``, which is up to date after each.

    Args:
        teacher: the original network, for distillation.
        target: what the network is tuned for.
        loader: over an :class:`EpochSampler`.
        on_step: called with the record of each step; nothing else is reported.

    Raises:
        DivergedError: the loss is NaN, infinite, or a hundred times that of guessing.
        DataError: too many images are unreadable.
    """
    network = state.network.to(memory_format=torch.channels_last).train()
    teacher = teacher.to(memory_format=torch.channels_last)
    trained_later = list(network.backbone.parameters()) if target.approached else []
    trained_later = [p for p in trained_later if p.requires_grad]
    warmup_steps = int(config.warmup * state.total_steps) if target.approached else 0
    try:
        for batch in _batches(state, loader):
            unreadable.add(batch.unreadable)
            warming_up = state.step < warmup_steps
            for parameter in trained_later:
                parameter.requires_grad_(not warming_up)
            now = target
            if target.approached:
                cost = target_at(state.step, state.total_steps, config.ramp, table.dearest, target.cost)
                now = target._replace(cost=cost)
            images = batch.images.to(device, non_blocking=True, memory_format=torch.channels_last)
            targets = batch.targets.to(device, non_blocking=True)
            record = tuning_step(state, teacher, table, images, targets, now, config)
            on_step(record._replace(phase="controller" if warming_up else "all"))
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
            if state.step >= state.total_steps:
                break
        sampler.start = 0


def tuning_step(
    state: TuningState,
    teacher: nn.Module,
    table: CostTable,
    images: Tensor,
    targets: Tensor,
    target: TuningTarget,
    config: TuningConfig,
) -> StepRecord:
    """One step: forward, backward, update of the parameters and of the cost multiplier.

    The loss is that of the answers after each pass, weighted by the share of the batch that took the pass. Where the controller
    chose options block by block, a penalty is added for the cost above the target.

    Args:
        images: (N, C, H, W), channels last for speed.
        targets: (N,), class indices.

    Raises:
        DivergedError: the loss is NaN, infinite, or a hundred times that of guessing.
    """
    network = state.network
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=config.amp):
        output = network.run(images, target=target)
        taught = None
        if config.distillation:
            has_labels = config.label_weight > 0
            taught = _teach(teacher, images, output, network.controller.views[-1].mirrored, has_labels)
    loss = _answers_loss(output, targets, taught, config)
    last = len(output.answers) - 1
    rows, _, probs = output.answers[last]
    chosen_cost = None
    if probs is not None:
        options = output.decisions.in_pass(last)
        chosen_cost = table.pass_cost(options if rows is None else options[rows], last)
        excess = cost_excess(chosen_cost.float(), table.expected_pass_cost(probs, last), target.cost)
        loss = loss + _COST_WEIGHT * excess
    value = float(loss.detach())
    lr = max(group["lr"] for group in state.optimizer.param_groups)
    guessing = math.log(output.logits.shape[1]) * (config.label_weight + config.distillation * config.temperature**2)
    _check_healthy("loss", value, _EXPLODED * guessing, state.step, lr)
    loss.backward()
    if state.sizes:
        state.sizes.scale_gradients()
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
    _check_healthy("gradient's norm", float(norm), math.inf, state.step, lr)
    with state.sizes.proportional() if state.sizes else nullcontext():
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)  # now, to free their memory for the next forward pass
    state.scheduler.step_update(state.step + 1)
    if chosen_cost is not None:
        ratio = (float(chosen_cost.mean()) / target.cost) ** _MULTIPLIER_RATE
        network.controller.cost_multiplier = max(network.controller.cost_multiplier * ratio, _LEAST_MULTIPLIER)
    state.step += 1
    accuracy = float((output.logits.argmax(dim=1) == targets).float().mean()) * 100
    mean_cost = float((table.cost(output.decisions) if chosen_cost is None else chosen_cost).mean())
    multiplier = network.controller.cost_multiplier
    return StepRecord(state.step, state.total_steps, "", value, accuracy, mean_cost, target.cost, multiplier, lr)


def _check_healthy(name: str, value: float, limit: float, step: int, lr: float) -> None:
    """Raises DivergedError where ``value`` is NaN, infinite, or above ``limit``."""
    if not math.isfinite(value) or value > limit:
        raise DivergedError(f"the {name} is {value:.3g} at step {step + 1}, learning rate {lr:.2g}: try a smaller --lr")


def _answers_loss(
    output: Output, targets: Tensor, taught: tuple[Tensor, Tensor] | None, config: TuningConfig
) -> Tensor:
    """Cross-entropy, plus distillation, of the answer after each pass.

    Args:
        targets: (N,), class indices.
        taught: as from :func:`_teach`; None: no distillation.
    """
    images = len(targets)
    total: Tensor | None = None
    for rows, logits, _ in output.answers:
        logits = logits.float()
        loss = logits.new_zeros(())
        if config.label_weight:
            labels = targets if rows is None else targets[rows]
            loss = config.label_weight * F.cross_entropy(logits, labels)
        if taught is not None:
            taught_rows, expected = taught
            if rows is None:
                student = logits[taught_rows]
            else:
                # The teacher saw all images that took a later pass.
                positions = torch.empty(images, dtype=torch.long, device=rows.device)
                positions[taught_rows] = torch.arange(len(taught_rows), device=rows.device)
                student, expected = logits, expected[positions[rows]]
            loss = loss + config.distillation * distillation_loss(student, expected, config.temperature)
        weighted = loss if rows is None else loss * (len(rows) / images)
        total = weighted if total is None else total + weighted
    assert total is not None, "every image takes the first pass"
    return total


def _teach(
    teacher: nn.Module, images: Tensor, output: Output, is_mirrored: bool, has_labels: bool
) -> tuple[Tensor, Tensor]:
    """The indices (M,) of the images that the teacher sees, and its logits (M, classes) for them.

    Args:
        is_mirrored: whether the last pass sees mirrored images; the teacher then sees both views of those that took it.
        has_labels: half a batch's forward passes are enough then; otherwise the teacher sees all images.
    """
    later = output.answers[-1].rows if len(output.answers) > 1 else None
    mirrored = len(later) if later is not None and is_mirrored else 0
    passes = (len(images) + 1) // 2 if has_labels else len(images) + mirrored
    taught = taught_images(len(images), later, mirrored, passes).to(images.device)
    return taught, teacher_logits(teacher, images[taught], mirrored)


def taught_images(images: int, later: Tensor | None, mirrored: int, passes: int) -> Tensor:
    """Indices of the images that the teacher sees in about ``passes`` forward passes; ``mirrored`` of them it sees twice.

    Images that took a later pass, with the indices ``later``, come first, then others at random.

    Args:
        images: N.
    """
    order = torch.randperm(images)
    if later is None:
        return order[:passes]
    later = later.cpu()
    others = order[~torch.isin(order, later)]
    return torch.cat([later, others[: max(0, passes - mirrored - len(later))]])


@torch.no_grad()
def teacher_logits(teacher: nn.Module, images: Tensor, mirrored: int) -> Tensor:
    """The teacher's logits (N, classes) for ``images`` (N, C, H, W).

    For the first ``mirrored`` images they are the mean over the image and its mirror image, the two views of the two passes.
    """
    logits: Tensor = teacher(torch.cat([images, images[:mirrored].flip(-1)]) if mirrored else images).float()
    logits, others = logits.split([len(images), mirrored])
    return torch.cat([(logits[:mirrored] + others) / 2, logits[mirrored:]])
