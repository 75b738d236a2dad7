"""A cascade of two static networks: the simple alternative to a dynamic network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from dfs_cli.atomic import write_atomically
from dfs_cli.control.base import join_batches
from dfs_cli.cost.operating_point import target_cost


class Answers(NamedTuple):
    """The most likely classes (N,) of N images, and the softmax confidence (N,) in them."""

    confidence: Tensor
    answers: Tensor


class StaticNetwork(NamedTuple):
    """The mean cost of a static network, and its answers."""

    cost: float
    held_out: Answers
    validation: Answers


def save_answers(path: Path, network: StaticNetwork, held_out_targets: Tensor, validation_targets: Tensor) -> None:
    """Save the answers of a static network, from which cascades are made later."""
    tensors = {
        "held_out_confidence": network.held_out.confidence,
        "held_out_answers": network.held_out.answers,
        "held_out_targets": held_out_targets,
        "validation_confidence": network.validation.confidence,
        "validation_answers": network.validation.answers,
        "validation_targets": validation_targets,
        "cost": torch.tensor(network.cost, dtype=torch.float64),
    }
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, serialise({k: v.contiguous() for k, v in tensors.items()}))


def load_answers(path: Path) -> tuple[StaticNetwork, Tensor, Tensor]:
    """What :func:`save_answers` saved: the network, and the class indices of held-out and validation images."""
    tensors = load_file(path)
    held_out, validation = (
        Answers(tensors[f"{split}_confidence"], tensors[f"{split}_answers"]) for split in ("held_out", "validation")
    )
    network = StaticNetwork(float(tensors["cost"]), held_out, validation)
    return network, tensors["held_out_targets"], tensors["validation_targets"]


def confident_answers(logits: Iterable[Tensor]) -> Answers:
    """The answers in ``logits``, a tensor (N, classes) for each batch, and in those of other processes."""
    tops = [batch.double().softmax(dim=1).max(dim=1) for batch in logits]
    return Answers(join_batches([top.values for top in tops]), join_batches([top.indices for top in tops]))


class Cascade(NamedTuple):
    """Two networks, by index; the share of validation images that ran both; mean cost; top-1 in percent, and which validation
    images (N,) were answered right."""

    cheap: int
    expensive: int
    share: float
    cost: float
    top1: float
    right: Tensor


def best_cascade(
    networks: Sequence[StaticNetwork], budget: float, held_out_targets: Tensor, validation_targets: Tensor
) -> Cascade | None:
    """The pair with the best top-1 on held-out images whose mean cost keeps ``budget`` there.

    All images run the cheap network. Those whose softmax confidence is below a threshold, set on held-out images, also run the
    expensive one, which then answers; its cost is added.

    Returns:
        None where no pair fits the budget.
    """
    best: tuple[float, int, int, float] | None = None
    for cheap, expensive in permutations(range(len(networks)), 2):
        first, second = networks[cheap], networks[expensive]
        if (
            second.cost <= first.cost
            or (threshold := _threshold(first, second, budget, len(validation_targets))) is None
        ):
            continue
        right, _ = _evaluate(first.held_out, second.held_out, threshold, held_out_targets)
        top1 = _percent(right)
        if best is None or top1 > best[0]:
            best = top1, cheap, expensive, threshold
    if best is None:
        return None
    _, cheap, expensive, threshold = best
    right, both = _evaluate(networks[cheap].validation, networks[expensive].validation, threshold, validation_targets)
    share = float(both.double().mean())
    cost = networks[cheap].cost + share * networks[expensive].cost
    return Cascade(cheap, expensive, share, cost, _percent(right), right)


def _threshold(first: StaticNetwork, second: StaticNetwork, budget: float, validation_images: int) -> float | None:
    """The confidence below which the second network runs, so that the held-out images keep the budget."""
    share = (budget - first.cost) / second.cost
    if share <= 0:
        return None
    if share >= 1:
        return math.inf  # all images may run both
    deviation = second.cost * math.sqrt(share * (1 - share))
    images = len(first.held_out.confidence)
    share = (target_cost(budget, deviation, images, validation_images) - first.cost) / second.cost
    if share <= 0:
        return None
    return float(first.held_out.confidence.quantile(share))


def _evaluate(first: Answers, second: Answers, threshold: float, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Which images (N,) were answered right, and which ran the second network."""
    unsure = first.confidence < threshold
    return torch.where(unsure, second.answers, first.answers) == targets, unsure


def _percent(right: Tensor) -> float:
    return 100 * float(right.double().mean())
