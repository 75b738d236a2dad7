"""The cost of tuning: a tuning step against a step of fine-tuning the dense network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfs_cli.bench.clock import Timing, check_repeats, in_turns, quartiles, seconds_of
from dfs_cli.bench.process import peak_bytes, size_of
from dfs_cli.config import DynamicConfig, Preprocessing, TuningConfig
from dfs_cli.control.base import Request, Sensitivity, controller_of
from dfs_cli.conversion.defaults import resolve_device
from dfs_cli.cost.table import CostTable
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.passes import TuningTarget
from dfs_cli.observer import Observer
from dfs_cli.surgery.initialise import fit_steps
from dfs_cli.surgery.plan import plan_costs, plan_surgery
from dfs_cli.surgery.swap import make_dynamic
from dfs_cli.tuning.loop import tuning_step
from dfs_cli.tuning.state import start_state
from dfs_cli.tuning.step import StepLoss
from dfs_cli.validation import Json

_WARM_UP = 2
_HELD_OUT, _VALIDATION = 5000, 50_000  # image counts of the conversion whose steps are measured
_TOTAL_STEPS = 10**6  # so many that the learning rate stays constant
_DENSE_RATE = 1e-5


@dataclass(frozen=True)
class TuningBench(Json):
    """Time and memory of a tuning step against a dense one.

    Args:
        time_ratio: median time of a tuning step over that of a dense step.
        memory_ratio: the same of peak memory, with weights, optimizer and images.
        dense_seconds, tuning_seconds: per step.
        dense_bytes, tuning_bytes: peak memory.
        batch_size, image_size: of the images; (C, H, W).
        options, gate: of the network.
        second_pass_share: share of the images that take a second pass; 0 where there is none.
        repeats: steps of each kind.
        device, threads: where they ran.
    """

    time_ratio: float
    memory_ratio: float
    dense_seconds: Timing
    tuning_seconds: Timing
    dense_bytes: int
    tuning_bytes: int
    batch_size: int
    image_size: tuple[int, int, int]
    options: tuple[int, ...]
    gate: str
    second_pass_share: float
    repeats: int
    device: str
    threads: int


def bench_tuning(
    model: nn.Module,
    preprocessing: Preprocessing,
    dynamic: DynamicConfig,
    budget: float,
    tuning: TuningConfig,
    repeats: int = 10,
    observer: Observer | None = None,
) -> TuningBench:
    """Measure a tuning step (forward, backward, update) against a step of fine-tuning the dense network, on random images.

    Both train all weights with AdamW at the same batch size, in the channels-last layout. The dense step is cross-entropy
    alone, with batch-norm in training mode; the tuning step includes the original's forward pass for distillation.

    Args:
        model: the dense network, which is left unchanged.
        preprocessing: its training size is that of the images.
        repeats: steps of each kind, in turns.
        observer: told about progress.

    Raises:
        ConfigError: a setting is out of range, or the budget cannot be spent.
        UnsupportedModelError: the model cannot be converted.
    """
    check_repeats(repeats)
    observer = observer or Observer()
    device = resolve_device(tuning.device)
    teacher = copy.deepcopy(model).to(device).eval()
    images, targets = _random_batch(model, preprocessing, tuning, device)
    network, table, target = _ready_to_tune(teacher, dynamic, budget, preprocessing.train_size, images)
    images = images.to(memory_format=torch.channels_last)
    teacher = teacher.to(memory_format=torch.channels_last)
    network = network.to(memory_format=torch.channels_last).train()
    state = start_state(network, tuning.replace(epochs=None, steps=_TOTAL_STEPS), 1)
    step_loss = StepLoss(network, teacher, table, tuning)
    dense = copy.deepcopy(teacher).train()
    optimizer = torch.optim.AdamW(dense.parameters(), lr=_DENSE_RATE)

    def dense_step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=tuning.amp):
            logits = dense(images)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def dynamic_step() -> None:
        tuning_step(state, step_loss, images, targets, target, tuning)

    observer.stage("steps in turns", _WARM_UP + repeats)
    dense_seconds, tuning_seconds = map(
        quartiles,
        in_turns([_timed(step, device) for step in (dense_step, dynamic_step)], repeats, _WARM_UP, observer.advance),
    )
    dense_bytes = size_of(dense, optimizer, images) + peak_bytes(dense_step, device)
    tuning_bytes = size_of(network, state.optimizer, images) + size_of(teacher) + peak_bytes(dynamic_step, device)
    return TuningBench(
        time_ratio=tuning_seconds.median / dense_seconds.median,
        memory_ratio=tuning_bytes / dense_bytes,
        dense_seconds=dense_seconds,
        tuning_seconds=tuning_seconds,
        dense_bytes=dense_bytes,
        tuning_bytes=tuning_bytes,
        batch_size=tuning.batch_size,
        image_size=preprocessing.train_size,
        options=table.options,
        gate=dynamic.gate,
        second_pass_share=target.share,
        repeats=repeats,
        device=str(device),
        threads=torch.get_num_threads(),
    )


def _timed(step: Callable[[], None], device: torch.device) -> Callable[[int], float]:
    return lambda turn: seconds_of(step, device)


def _random_batch(
    model: nn.Module, preprocessing: Preprocessing, tuning: TuningConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) and class indices (N,)."""
    generator = torch.Generator().manual_seed(tuning.seed)
    images = torch.randn(tuning.batch_size, *preprocessing.train_size, generator=generator)
    targets = torch.randint(cast(int, model.num_classes), (tuning.batch_size,), generator=generator)
    return images.to(device), targets.to(device)


def _ready_to_tune(
    teacher: nn.Module, dynamic: DynamicConfig, budget: float, input_size: tuple[int, int, int], images: Tensor
) -> tuple[DynamicResNet, CostTable, TuningTarget]:
    """The network as tuning would start with it, its costs and its target."""
    plan = plan_surgery(teacher)
    planned = plan_costs(teacher, dynamic, input_size, plan)
    planned.check_budget(budget, spend=True)
    network = make_dynamic(teacher, dynamic, planned, plan).network
    sensitivity = supposed_sensitivity(planned, images.device)
    request = Request(budget, spend=True, held_out=_HELD_OUT, images=_VALIDATION)
    table = controller_of(network).candidates(planned, sensitivity, request)[0]
    if table is not planned:
        network = make_dynamic(teacher, dynamic, table, plan).network
    fit_steps(network, images)
    return network, table, controller_of(network).start(network, table, sensitivity, request, images)


def supposed_sensitivity(table: CostTable, device: torch.device) -> Sensitivity:
    """An assumed sensitivity, with more harm for fewer bits: enough to measure the speed of tuning."""
    options = torch.tensor(table.options, device=device)
    harm = (1 - options / max(table.options)).square()
    layers = sum(layer.block is not None for layer in table.layers)
    of_layer = torch.where(options > 0, harm, torch.inf)
    return Sensitivity(harm.repeat(len(table.blocks), 1), of_layer.repeat(layers, 1))
