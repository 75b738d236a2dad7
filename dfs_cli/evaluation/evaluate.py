"""Accuracy, cost and decision counts of a network over a split."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from dfs_cli.control.base import controller_of
from dfs_cli.cost.decisions import Decisions
from dfs_cli.cost.table import CostTable
from dfs_cli.data.images import Batch, UnreadableLog
from dfs_cli.distributed import joined_rows, mean, of_all
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
    on_logits: Callable[[Tensor, Tensor], None] = lambda logits, targets: None,
) -> Evaluation:
    """Run the network over ``batches``, and once more with the most common policy where there is more than one.

    Args:
        batches: the same images each time it is iterated; of several processes, each has its share of them, and the figures
            are those of all together.
        layout: memory format of images; the network's weights should have the same.
        on_batch: called after each batch is loaded with the number of its images, readable or not.
        on_logits: called for each batch with the logits (N, classes) and the class indices (N,) of this process's readable
            images, in the order of the split.

    Raises:
        DataError: there is no readable image, or too many are unreadable.
    """
    network = fold_norms(network.eval())
    none = torch.empty(0, len(controller_of(network).views), len(network.blocks), dtype=torch.long)
    parts, hits, seconds = [Decisions(none)], [torch.empty(0, 2, dtype=torch.bool)], 0.0
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
        hits.append(_hits(output.logits, batch.targets))
        on_logits(output.logits, batch.targets)
        parts.append(output.decisions.cpu())
    unreadable.join()
    own = Decisions.join(parts)
    decisions = Decisions(joined_rows(own.options)[0])
    if not len(decisions):
        raise DataError("there is no image to evaluate")
    cost = table.cost(decisions)
    common = decisions.most_common()
    correct = _with_policy(network, common, torch.cat(hits)[:, 0], own.equal(common), batches, device, amp, layout)
    top1, top5 = 100 * joined_rows(torch.cat(hits))[0].double().mean(dim=0)
    dynamics = Dynamics(
        policies=decisions.distinct(),
        choice_entropy=choice_entropy(decisions),
        variance_between_images=variance_between_images(table, decisions),
        common_share=float(decisions.equal(common).double().mean()),
        common_top1=100 * mean(correct.double()),
        common_cost=float(table.cost(common)),
    )
    return Evaluation(
        images=len(cost),
        top1=float(top1),
        top5=float(top5),
        cost=float(cost.mean()),
        cost_p50=float(cost.quantile(0.5)),
        cost_p95=float(cost.quantile(0.95)),
        cost_max=float(cost.max()),
        choices=decisions.counts(len(table.options)),
        images_per_second=len(cost) / max(*of_all(seconds), 1e-9),
        dynamics=dynamics,
        unreadable=tuple(unreadable.reasons),
    )


def _with_policy(
    network: DynamicResNet,
    decisions: Decisions,
    correct: Tensor,
    has_policy: Tensor,
    batches: Iterable[Batch],
    device: torch.device,
    amp: bool,
    layout: torch.memory_format,
) -> Tensor:
    """(N,), whether each image is classified correctly with the same decisions for all.

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
    return correct


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
    hits = [torch.empty(0, 2, dtype=torch.bool)]
    for batch in batches:
        unreadable.add(batch.unreadable)
        on_batch(len(batch.targets) + len(batch.unreadable))
        if len(batch.targets):
            hits.append(_hits(model(batch.images.to(device, non_blocking=True)), batch.targets))
    unreadable.join()
    top1, top5 = (100 * mean(column.double()) for column in torch.cat(hits).T)
    return top1, top5


def _hits(logits: Tensor, targets: Tensor) -> Tensor:
    """(N, 2), whether the target is the most likely class, and one of the five most likely ones."""
    logits = logits.float().cpu()
    among_five = logits.topk(min(5, logits.shape[1])).indices.eq(targets[:, None]).any(dim=1)
    return torch.stack([logits.argmax(dim=1) == targets, among_five], dim=1)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
