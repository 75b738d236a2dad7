"""The loss of a batch, as a module's forward: so that torch's distributed engine sees which parameters a step uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfs_cli.config import TuningConfig
from dfs_cli.cost.table import CostTable
from dfs_cli.distributed import joined_rows, mean, of_first, size, weights
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.passes import Output, TuningTarget
from dfs_cli.tuning.losses import cost_excess, distillation_loss

_COST_WEIGHT = 0.2


class Figures(NamedTuple):
    """What a batch gives, of all processes together.

    Args:
        loss: its mean.
        accuracy: percent.
        cost: mean over the images, of the pass for which the controller chose, else of the whole network.
        chosen_cost: the same; not a number where the controller chose nothing.
        classes: how many there are.
    """

    loss: float
    accuracy: float
    cost: float
    chosen_cost: float
    classes: int

    @classmethod
    def mean(cls, pieces: Sequence[Figures], shares: Sequence[float]) -> Figures:
        """Of a batch in pieces, which have these shares of its images."""
        if len(pieces) == 1:
            return pieces[0]

        def of(name: str) -> float:
            known = [(v, s) for v, s in ((getattr(p, name), s) for p, s in zip(pieces, shares, strict=True)) if v == v]
            return sum(v * s for v, s in known) / sum(s for _, s in known) if known else math.nan

        return cls(of("loss"), of("accuracy"), of("cost"), of("chosen_cost"), pieces[0].classes)


class StepLoss(nn.Module):
    """The loss that a network is tuned by.

    Each process has its part of the batch. Its loss is such that the mean over the processes, of losses and of gradients, is
    that of the whole batch: parts count by how many images they have, and so do passes, which parts take unequally.

    Args:
        teacher: the original network, which is not tuned.
    """

    def __init__(self, network: DynamicResNet, teacher: nn.Module, table: CostTable, config: TuningConfig) -> None:
        super().__init__()
        self.network = network
        self.unregistered = (teacher,)  # else its parameters would be taken for the step's
        self.table, self.config = table, config

    def forward(self, images: Tensor, targets: Tensor, target: TuningTarget) -> tuple[Tensor, Figures]:
        """The loss of the answers after each pass, weighted by the share of the batch that took the pass. Where the controller
        chose options block by block, a penalty is added for the cost above the target.

        Args:
            images: (N, C, H, W), this process's part of the batch.
            targets: (N,), class indices.
        """
        config, table = self.config, self.table
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=config.amp):
            output = self.network.run(images, target=target)
            taught = None
            if config.distillation:
                taught = _teach(self.unregistered[0], images, output, self.network, config.label_weight > 0)
        last = len(output.answers) - 1
        rows, _, probs = output.answers[last]
        cost = images.new_zeros(0)
        if probs is not None:
            options = output.decisions.in_pass(last)
            cost = table.pass_cost(options if rows is None else options[rows], last)
        weight, chosen_weight = weights(len(images), len(cost))
        loss = _answers_loss(output, targets, taught, weight, config)
        chosen_cost = mean(cost)
        if not math.isnan(chosen_cost):
            expected = None if probs is None else table.expected_pass_cost(probs, last)
            loss = loss + _COST_WEIGHT * _excess(cost, expected, chosen_weight, chosen_cost, target.cost)
        mean_cost = mean(table.cost(output.decisions)) if math.isnan(chosen_cost) else chosen_cost
        accuracy = mean((output.logits.argmax(dim=1) == targets).float()) * 100
        return loss, Figures(mean(loss.detach()[None]), accuracy, mean_cost, chosen_cost, output.logits.shape[1])


def _excess(cost: Tensor, expected: Tensor | None, weight: float, mean_cost: float, target: float) -> Tensor:
    """How far the mean cost of all processes' images is above the target, with the gradient of this one's part.

    Args:
        cost, expected: (M,), of this process's images; None: there are none.
        weight: of a mean over them.
    """
    if expected is None:
        return cost.new_tensor(max(0.0, math.log(mean_cost / target)), dtype=torch.float32)
    seen = cost.float() if size() == 1 else cost.new_tensor([mean_cost]).float()
    return cost_excess(seen, weight * expected, target)


def _answers_loss(
    output: Output, targets: Tensor, taught: _Taught | None, weight: float, config: TuningConfig
) -> Tensor:
    """Cross-entropy, plus distillation, of the answer after each pass.

    Args:
        targets: (N,), class indices.
        taught: None: no distillation.
        weight: of a mean over this process's images.
    """
    images = len(targets)
    total: Tensor | None = None
    for rows, logits, _ in output.answers:
        logits = logits.float()
        loss = logits.new_zeros(())
        if config.label_weight:
            labels = targets if rows is None else targets[rows]
            loss = config.label_weight * F.cross_entropy(logits, labels) * weight
        if taught is not None and len(taught.rows):
            taught_rows, expected, taught_weight = taught
            if rows is None:
                student = logits[taught_rows]
            else:
                # The teacher saw all images that took a later pass.
                positions = torch.empty(images, dtype=torch.long, device=rows.device)
                positions[taught_rows] = torch.arange(len(taught_rows), device=rows.device)
                student, expected, taught_weight = logits, expected[positions[rows]], weight
            divergence = distillation_loss(student, expected, config.temperature)
            loss = loss + config.distillation * divergence * taught_weight
        weighted = loss if rows is None else loss * (len(rows) / images)
        total = weighted if total is None else total + weighted
    assert total is not None, "every image takes the first pass"
    return total


class _Taught(NamedTuple):
    """What the teacher says.

    Args:
        rows: indices (M,) of the images, of this process, that it sees.
        logits: (M, classes).
        weight: of a mean over them.
    """

    rows: Tensor
    logits: Tensor
    weight: float


def _teach(teacher: nn.Module, images: Tensor, output: Output, network: DynamicResNet, has_labels: bool) -> _Taught:
    """What the teacher says about some of all processes' images, as far as they are this one's.

    Args:
        has_labels: half a batch's forward passes are enough then; otherwise the teacher sees all images.
    """
    # Where the last pass sees mirrored images, the teacher sees both views of those that took it.
    is_mirrored = network.controller.views[-1].mirrored
    is_later = torch.zeros(len(images), dtype=torch.bool)
    if len(output.answers) > 1:
        later = output.answers[-1].rows
        is_later[slice(None) if later is None else later.cpu()] = True
    everywhere, own = joined_rows(is_later)
    all_later = everywhere.nonzero().flatten()
    mirrored = len(all_later) if is_mirrored else 0
    passes = (len(everywhere) + 1) // 2 if has_labels else len(everywhere) + mirrored
    chosen = of_first(taught_images(len(everywhere), all_later, mirrored, passes))
    rows = chosen[(chosen >= own.start) & (chosen < own.stop)] - own.start
    (weight,) = weights(len(rows))
    rows = rows.to(images.device)
    mirrored = int(is_later.sum()) if is_mirrored else 0
    return _Taught(rows, teacher_logits(teacher, images[rows], mirrored) if len(rows) else images.new_zeros(0), weight)


def taught_images(images: int, later: Tensor, mirrored: int, passes: int) -> Tensor:
    """Indices of the images that the teacher sees in about ``passes`` forward passes; ``mirrored`` of them it sees twice.

    Images that took a later pass, with the indices ``later``, come first, then others at random.

    Args:
        images: N.
    """
    order = torch.randperm(images)
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
