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
from dfs_cli.tuning.losses import cost_excess, distillation_loss
from dfs_cli.tuning.state import TuningState

_EXPLORE = 0.1
_COST_WEIGHT = 0.2
_PRICE_RATE = 0.1


class StepRecord(NamedTuple):
    """One step's figures; ``cost`` and ``target`` are fractions of the dense network's cost."""

    step: int
    total_steps: int
    phase: str
    loss: float
    accuracy: float
    cost: float
    target: float
    price: float
    lr: float


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
    budget: float,
    loader: DataLoader[Batch],
    config: TuningConfig,
    device: torch.device,
    unreadable: UnreadableLog,
    on_step: Callable[[StepRecord], None] = lambda record: None,
) -> None:
    """Run the steps that ``state`` has left; ``state`` is up to date after each.

    Args:
        teacher: the original network, for distillation.
        budget: the target cost once the ramp is over.
        loader: over an :class:`EpochSampler`.
        on_step: called after each step; the only place where a run reports.

    Raises:
        DivergedError: the loss is NaN or infinite.
        DataError: too many images are unreadable.
    """
    network = state.network.train()
    gate = {id(p) for p in network.gate.parameters()}
    trained_later = [p for group in state.optimizer.param_groups for p in group["params"] if id(p) not in gate]
    warmup_steps = int(config.warmup * state.total_steps)
    try:
        for batch in _batches(state, loader):
            unreadable.add(batch.unreadable)
            warming_up = state.step < warmup_steps
            for parameter in trained_later:
                parameter.requires_grad_(not warming_up)
            target = target_at(state.step, state.total_steps, config.ramp, table.dearest, budget)
            images = batch.images.to(device, non_blocking=True)
            targets = batch.targets.to(device, non_blocking=True)
            record = _step(state, teacher, table, images, targets, target, config)
            on_step(record._replace(phase="gate" if warming_up else "all"))
    finally:
        for parameter in trained_later:
            parameter.requires_grad_(True)
        network.eval()


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


def _step(
    state: TuningState,
    teacher: nn.Module,
    table: CostTable,
    images: Tensor,
    targets: Tensor,
    target: float,
    config: TuningConfig,
) -> StepRecord:
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=config.amp):
        with torch.no_grad():
            teacher_logits = teacher(images) if config.distillation else None
        output = state.network.run(images, explore=_EXPLORE)
    logits = output.logits.float()
    assert output.probs is not None
    cost = table.cost(output.decisions)
    excess = cost_excess(cost.float(), table.expected_cost(output.probs), target)
    loss = F.cross_entropy(logits, targets) + _COST_WEIGHT * excess
    if teacher_logits is not None:
        loss = loss + config.distillation * distillation_loss(logits, teacher_logits.float(), config.temperature)
    value = float(loss.detach())
    lr = max(group["lr"] for group in state.optimizer.param_groups)
    if not math.isfinite(value):
        raise DivergedError(f"the loss is {value} at step {state.step + 1}, learning rate {lr:.2g}: try a smaller --lr")
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(state.network.parameters(), 5.0)
    state.optimizer.step()
    state.scheduler.step_update(state.step + 1)
    mean_cost = float(cost.mean())
    state.network.operating_point *= (mean_cost / target) ** _PRICE_RATE
    state.step += 1
    accuracy = float((logits.argmax(dim=1) == targets).float().mean()) * 100
    return StepRecord(
        state.step, state.total_steps, "", value, accuracy, mean_cost, target, state.network.operating_point, lr
    )
