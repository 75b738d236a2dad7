"""Whether a network's answers have anything to do with the classes of the data."""

from __future__ import annotations

from scipy.special import bdtrc

_SIGNIFICANCE = 0.01


def better_than_chance(top1: float, images: int, classes: int) -> bool:
    """Whether ``top1`` (percent of ``images``) is more than guessing among ``classes`` gives, by a one-sided binomial test."""
    right = round(top1 / 100 * images)
    # SciPy's binomtest gives the same, but its module takes a third of a second to import.
    return bool(bdtrc(right - 1, images, 1 / classes) < _SIGNIFICANCE) if right else False


def chance_hint(network: str, top1: float, images: int, classes: int) -> str | None:
    """What to tell the user where ``network`` is no better than chance; None: it is better."""
    if better_than_chance(top1, images, classes):
        return None
    return (
        f"{network} is no better than chance on these images: {top1:.2f} % of {classes} classes; unless its classifier is new, "
        "the order of the classes may differ from the one that it was trained with: --class-map FILE gives it"
    )
