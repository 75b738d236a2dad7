"""Accuracy, cost and decision counts of a network over a split."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn

from dfs_cli.artifact.manifest import Evaluation
from dfs_cli.cost.table import CostTable
from dfs_cli.data.images import Batch, UnreadableLog
from dfs_cli.errors import DataError
from dfs_cli.nn.network import DynamicResNet


@torch.inference_mode()
def evaluate_network(
    network: DynamicResNet,
    table: CostTable,
    batches: Iterable[Batch],
    device: torch.device,
    unreadable: UnreadableLog,
    amp: bool = False,
    on_batch: Callable[[int], None] = lambda images: None,
) -> Evaluation:
    """Run the network once over ``batches``.

    Raises:
        DataError: there is no image, or too many are unreadable.
    """
    network.eval()
    top1, top5 = AverageMeter(), AverageMeter()
    costs, seconds = [], 0.0
    choices = torch.zeros(len(table.blocks), len(table.options), dtype=torch.long)
    for batch in batches:
        unreadable.add(batch.unreadable)
        on_batch(len(batch.targets) + len(batch.unreadable))
        if not len(batch.targets):
            continue
        images = batch.images.to(device, non_blocking=True)
        began = _now(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            output = network.run(images)
        seconds += _now(device) - began
        _update(top1, top5, output.logits, batch.targets)
        decisions = output.decisions.cpu()
        costs.append(table.cost(decisions))
        for option in range(len(table.options)):
            choices[:, option] += (decisions == option).sum(dim=0)
    if not costs:
        raise DataError("there is no image to evaluate")
    cost = torch.cat(costs)
    return Evaluation(
        images=len(cost),
        top1=top1.avg,
        top5=top5.avg,
        cost=float(cost.mean()),
        cost_p50=float(cost.quantile(0.5)),
        cost_p95=float(cost.quantile(0.95)),
        cost_max=float(cost.max()),
        choices=tuple(tuple(row) for row in choices.tolist()),
        images_per_second=len(cost) / max(seconds, 1e-9),
        unreadable=tuple(unreadable.found),
    )


@torch.inference_mode()
def evaluate_accuracy(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    unreadable: UnreadableLog,
    on_batch: Callable[[int], None] = lambda images: None,
) -> tuple[float, float]:
    """Top-1 and top-5 of any classifier, in percent."""
    top1, top5 = AverageMeter(), AverageMeter()
    for batch in batches:
        unreadable.add(batch.unreadable)
        on_batch(len(batch.targets) + len(batch.unreadable))
        if len(batch.targets):
            _update(top1, top5, model(batch.images.to(device, non_blocking=True)), batch.targets)
    return top1.avg, top5.avg


def _update(top1: AverageMeter, top5: AverageMeter, logits: Tensor, targets: Tensor) -> None:
    values = accuracy(logits.float().cpu(), targets, topk=(1, min(5, logits.shape[1])))
    top1.update(float(values[0]), len(targets))
    top5.update(float(values[1]), len(targets))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
