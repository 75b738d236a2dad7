"""What a pass sees, what is known after it, and what it is tuned for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from dfs_cli.cost.decisions import Decisions


@dataclass(frozen=True)
class View:
    """What a pass sees of the images.

    Args:
        mirrored: the images are flipped along their width.
        scale: their height and width, as a share of the full ones.
    """

    mirrored: bool = False
    scale: float = 1.0

    def of(self, images: Tensor) -> Tensor:
        """The view of ``images`` (N, C, H, W): smaller ones are interpolated (bilinear)."""
        if self.scale != 1:
            size = self.size_of(images.shape[2], images.shape[3])
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        return images.flip(-1) if self.mirrored else images

    def size_of(self, *sides: int) -> tuple[int, ...]:
        """Height and width of the view of images with these ones."""
        return tuple(max(1, round(self.scale * side)) for side in sides)


FULL_VIEW = View()
"""The images as they are."""


class Answer(NamedTuple):
    """The network's answer after a pass.

    Args:
        rows: indices (M,) of the images that took the pass; None: all of them.
        logits: (M, classes).
        probs: (M, L, K), in training, the probabilities with which the controller chose options block by block; None where it
            gives none.
    """

    rows: Tensor | None
    logits: Tensor
    probs: Tensor | None = None


class Output(NamedTuple):
    """The result of a network for a batch of N images.

    Args:
        logits: (N, classes).
        decisions: which passes the images took, and with which options.
        answers: one for each pass that at least one image took.
    """

    logits: Tensor
    decisions: Decisions
    answers: tuple[Answer, ...]


class TuningTarget(NamedTuple):
    """What a network is tuned for.

    Args:
        cost: mean cost of the pass for which the controller chooses block by block, or of the static network.
        share: share of a batch's images that take the second pass, where there is one.
        explored: the probability per block that images which skip it run its residual branch as well, without training its
            weights, so that the controller learns what skipping costs.
    """

    cost: float
    share: float = 0.0
    explored: float = 0.1


def uncertainty(logits: Tensor) -> Tensor:
    """How unsure an answer is, (N,) in float64: minus the log-odds of the most likely class of ``logits`` (N, classes).

    Orders images as their softmax confidence does, without its rounding near one.
    """
    top, others = split_top(logits)
    return others.logsumexp(dim=1) - top


def split_top(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit (N,) and the others in descending order (N, classes - 1)."""
    ordered = logits.double().sort(dim=1, descending=True).values
    return ordered[:, 0], ordered[:, 1:]
