"""Whether a network's answers have anything to do with the classes of the data."""

from __future__ import annotations

from scipy.stats import binomtest

_SIGNIFICANCE = 0.01

CHANCE_HINT = (
    "is no better than chance on these images: {top1:.2f} % of {classes} classes; unless its classifier is new, the order of "
    "the classes may differ from the one that it was trained with: --class-map FILE gives it"
)
"""What to tell the user, after the network's name."""


def better_than_chance(top1: float, images: int, classes: int) -> bool:
    """Whether ``top1`` (percent of ``images``) is more than guessing among ``classes`` gives, by a one-sided binomial test."""
    right = round(top1 / 100 * images)
    return bool(binomtest(right, images, 1 / classes, alternative="greater").pvalue < _SIGNIFICANCE)
