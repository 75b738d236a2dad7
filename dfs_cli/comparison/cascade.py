"""A cascade of two static networks: the simple alternative to a dynamic network."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    """The most likely classes (N,) of N images, the softmax confidence (N,) in them, and the right classes (N,)."""

    confidence: Tensor
    answers: Tensor
    targets: Tensor

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor) -> Answers:
        """Those of a batch, by its logits (N, classes)."""
        confidence, answers = logits.double().softmax(dim=1).max(dim=1)
        return cls(confidence, answers, targets)

    @classmethod
    def join(cls, batches: Sequence[Answers]) -> Answers:
        """Those of all batches of all processes, in order, on the CPU."""
        return cls(*(join_batches([getattr(batch, name) for batch in batches]) for name in cls._fields))

    @property
    def right(self) -> Tensor:
        """Which images (N,) are answered right."""
        return self.answers == self.targets

    @property
    def top1(self) -> float:
        """In percent."""
        return percent(self.right)


class StaticNetwork(NamedTuple):
    """The mean cost of a static network, and its answers."""

    cost: float
    held_out: Answers
    validation: Answers

    def is_comparable(self, other: StaticNetwork) -> bool:
        """Whether both answered the same images."""
        return torch.equal(self.held_out.targets, other.held_out.targets) and torch.equal(
            self.validation.targets, other.validation.targets
        )


def save_answers(path: Path, network: StaticNetwork) -> None:
    """Save the answers of a static network, from which cascades are made later."""
    tensors = {"cost": torch.tensor(network.cost, dtype=torch.float64)}
    for split in ("held_out", "validation"):
        answers: Answers = getattr(network, split)
        tensors |= {f"{split}_{name}": tensor.contiguous() for name, tensor in answers._asdict().items()}
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, serialise(tensors))


def load_answers(path: Path) -> StaticNetwork:
    """What :func:`save_answers` saved."""
    tensors = load_file(path)
    held_out, validation = (
        Answers(*(tensors[f"{split}_{name}"] for name in Answers._fields)) for split in ("held_out", "validation")
    )
    return StaticNetwork(float(tensors["cost"]), held_out, validation)


class Cascade(NamedTuple):
    """All images run the ``cheap`` network. Those whose softmax confidence is below ``threshold`` also run the ``expensive``
    one, which then answers; its cost is added."""

    cheap: StaticNetwork
    expensive: StaticNetwork
    threshold: float

    def unsure(self, split: str) -> Tensor:
        """Which images (N,) of ``held_out`` or ``validation`` run both."""
        answers: Answers = getattr(self.cheap, split)
        return answers.confidence < self.threshold

    def right(self, split: str) -> Tensor:
        """Which images (N,) of ``held_out`` or ``validation`` are answered right."""
        first, second = getattr(self.cheap, split), getattr(self.expensive, split)
        right: Tensor = torch.where(self.unsure(split), second.answers, first.answers) == first.targets
        return right

    def share(self, split: str) -> float:
        """How many of the images of ``held_out`` or ``validation`` run both."""
        return float(self.unsure(split).double().mean())

    @property
    def held_out_top1(self) -> float:
        """In percent."""
        return percent(self.right("held_out"))

    @property
    def cost(self) -> float:
        """Mean cost of a validation image."""
        return self.cheap.cost + self.share("validation") * self.expensive.cost


def best_pair(networks: Sequence[StaticNetwork], budget: float) -> tuple[Cascade, int, int] | None:
    """The cascade with the best top-1 on held-out images, where it keeps ``budget``, and the indices of its cheap and of its
    expensive network.

    Returns:
        None where no pair fits the budget.
    """
    found = [
        (cascade, cheap, expensive)
        for cheap, expensive in permutations(range(len(networks)), 2)
        if networks[expensive].cost > networks[cheap].cost
        and (cascade := cascade_of(networks[cheap], networks[expensive], budget)) is not None
    ]
    return max(found, key=lambda pair: pair[0].held_out_top1, default=None)


def cascade_of(cheap: StaticNetwork, expensive: StaticNetwork, budget: float) -> Cascade | None:
    """The cascade whose threshold is set on held-out images so that they keep ``budget``; None where it cannot be kept."""
    share = (budget - cheap.cost) / expensive.cost
    if share <= 0:
        return None
    if share >= 1:
        return Cascade(cheap, expensive, math.inf)  # all images may run both
    deviation = expensive.cost * math.sqrt(share * (1 - share))
    images = len(cheap.held_out.confidence), len(cheap.validation.confidence)
    share = (target_cost(budget, deviation, *images) - cheap.cost) / expensive.cost
    if share <= 0:
        return None
    return Cascade(cheap, expensive, float(cheap.held_out.confidence.quantile(share)))


def percent(right: Tensor) -> float:
    """The share of true values in ``right`` (N,)."""
    return 100 * float(right.double().mean())
