"""Accuracy, cost and decision counts of a network over a split."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn

from dfs_cli.cost.decisions import Decisions
from dfs_cli.cost.table import CostTable
from dfs_cli.data.images import Batch, UnreadableLog
from dfs_cli.errors import DataError
from dfs_cli.evaluation.dynamics import choice_entropy, variance_between_images
from dfs_cli.freeze.batchnorm import fold_norms
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.records import Dynamics, Evaluation


@torch.inference_mode()
def evaluate_network(
    network: DynamicResNet,
    table: CostTable,
    batches: Iterable[Batch],
    device: torch.device,
    unreadable: UnreadableLog,
    amp: bool = False,
    layout: torch.memory_format = torch.contiguous_format,
    on_batch: Callable[[int], None] = lambda images: None,
) -> Evaluation:
    """Run the network over ``batches``, and once more with the most common policy where there is more than one.

    Args:
        batches: the same images each time it is iterated.
        layout: memory format of images; the network's weights should have the same.
        on_batch: called after each batch is loaded with the number of its images, readable or not.

    Raises:
        DataError: there is no readable image, or too many are unreadable.
    """
    network = fold_norms(network.eval())
    top1, top5 = AverageMeter(), AverageMeter()
    parts, correct, seconds = [], [], 0.0
    for batch in batches:
        unreadable.add(batch.unreadable)
        on_batch(len(batch.targets) + len(batch.unreadable))
        if not len(batch.targets):
            continue
        images = batch.images.to(device, non_blocking=True, memory_format=layout)
        began = _now(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            output = network.run(images)
        seconds += _now(device) - began
        _update(top1, top5, output.logits, batch.targets)
        parts.append(output.decisions.cpu())
        correct.append(output.logits.argmax(dim=1).cpu() == batch.targets)
    if not parts:
        raise DataError("there is no image to evaluate")
    decisions = Decisions.join(parts)
    cost = table.cost(decisions)
    common = decisions.most_common()
    has_common = decisions.equal(common)
    dynamics = Dynamics(
        policies=decisions.distinct(),
        choice_entropy=choice_entropy(decisions),
        variance_between_images=variance_between_images(table, decisions),
        common_share=float(has_common.double().mean()),
        common_top1=_top1_with(network, common, torch.cat(correct), has_common, batches, device, amp, layout),
        common_cost=float(table.cost(common)),
    )
    return Evaluation(
        images=len(cost),
        top1=top1.avg,
        top5=top5.avg,
        cost=float(cost.mean()),
        cost_p50=float(cost.quantile(0.5)),
        cost_p95=float(cost.quantile(0.95)),
        cost_max=float(cost.max()),
        choices=decisions.counts(len(table.options)),
        images_per_second=len(cost) / max(seconds, 1e-9),
        dynamics=dynamics,
        unreadable=tuple(unreadable.reasons),
    )


def _top1_with(
    network: DynamicResNet,
    decisions: Decisions,
    correct: Tensor,
    has_policy: Tensor,
    batches: Iterable[Batch],
    device: torch.device,
    amp: bool,
    layout: torch.memory_format,
) -> float:
    """Top-1, in percent, with the same decisions for every image.

    Args:
        decisions: for one image.
        correct: (N,), whether each image was classified correctly with the controller's decisions.
        has_policy: (N,), whether the controller's decisions were ``decisions``: these images need not run again.
    """
    correct, done = correct.clone(), 0
    for batch in batches if not has_policy.all() else ():
        others = torch.arange(done, done + len(batch.targets))[~has_policy[done : done + len(batch.targets)]]
        if len(others):
            images = batch.images[others - done].to(device, memory_format=layout)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
                logits = network.run(images, Decisions.alike(decisions.options[0].to(device), len(images))).logits
            correct[others] = logits.argmax(dim=1).cpu() == batch.targets[others - done]
        done += len(batch.targets)
    return 100 * float(correct.double().mean())


@torch.inference_mode()
def evaluate_accuracy(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    unreadable: UnreadableLog,
    on_batch: Callable[[int], None] = lambda images: None,
) -> tuple[float, float]:
    """Top-1 and top-5 of any classifier, in percent.

    Raises:
        DataError: too many images are unreadable.
    """
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
