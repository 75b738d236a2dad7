"""A network beside others: time at equal top-1, and top-1 at equal time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from dfs_cli.validation import Json

ERRORS = 2.0
"""Standard errors up to which a difference in top-1 counts as none."""


class Measured(NamedTuple):
    """What was measured of a candidate.

    Args:
        seconds: (R, N), the time of each image (or batch) in each of R passes over them, in which all candidates took turns.
        right: (N,), whether it answered right; None: not known.
    """

    seconds: Tensor
    right: Tensor | None


@dataclass(frozen=True)
class Pairing(Json):
    """A network beside one other.

    Args:
        name: of the other one.
        time: mean time of an image (or batch) over that of the other.
        time_low, time_high: the least and the largest such ratio, of it and of single passes over all images.
        top1: points of top-1 above the other; None: not known.
        top1_error: standard error of that, for images that both have seen.
        winner: ``first``: the network is better in one of the two and no worse in the other; ``other``: the other one is;
            ``neither``: each is better in one; ``equal``. Differences within the errors count as none, and so does what is
            not known.
    """

    name: str
    time: float
    time_low: float
    time_high: float
    top1: float | None
    top1_error: float | None
    winner: Literal["first", "other", "neither", "equal"]


@dataclass(frozen=True)
class Verdict(Json):
    """A network beside all others.

    Args:
        name: of the network.
        batch: images per run.
        pairings: one for each of the others.
        at_equal_top1: the fastest of the others whose top-1 is no lower, within the error; None: there is none.
        at_equal_time: the most accurate of the others that take no longer, in one of the passes at least; None: there is none.
    """

    name: str
    batch: int
    pairings: tuple[Pairing, ...]
    at_equal_top1: str | None
    at_equal_time: str | None


def judge(name: str, measured: Mapping[str, Measured], reference: str = "", batch: int = 1) -> Verdict:
    """The verdict about a network.

    Args:
        measured: by name, the network and all others.
        reference: of the others, the one that is named first.
        batch: images per run.
    """
    others = sorted(set(measured) - {name}, key=lambda other: (other != reference, list(measured).index(other)))
    pairings = tuple(_pair(measured[name], measured[other], other) for other in others)
    as_accurate = [p for p in pairings if p.top1 is not None and p.top1 <= ERRORS * (p.top1_error or 0.0)]
    as_fast = [p for p in pairings if p.top1 is not None and p.time_high >= 1]
    return Verdict(
        name=name,
        batch=batch,
        pairings=pairings,
        at_equal_top1=max(as_accurate, key=lambda p: p.time).name if as_accurate else None,
        at_equal_time=min(as_fast, key=lambda p: p.top1 or 0.0).name if as_fast else None,
    )


def _pair(own: Measured, other: Measured, name: str) -> Pairing:
    typical, other_typical = (measured.seconds.median(dim=0).values.mean() for measured in (own, other))
    ratios = own.seconds.mean(dim=1) / other.seconds.mean(dim=1)
    time = float(typical / other_typical)
    low, high = min(time, float(ratios.min())), max(time, float(ratios.max()))
    top1 = error = None
    # 1: the network is better, -1: the other one is, 0: no difference.
    in_time = 0 if low <= 1 <= high else (1 if time < 1 else -1)
    in_top1 = 0
    if own.right is not None and other.right is not None:
        # Both saw the same images: the error is that of the mean difference, image by image.
        differences = own.right.double() - other.right.double()
        top1 = 100 * float(differences.mean())
        error = 100 * float(differences.std(unbiased=False)) / math.sqrt(len(differences))
        in_top1 = 0 if abs(top1) <= ERRORS * error else (1 if top1 > 0 else -1)
    if in_time * in_top1 < 0:
        return Pairing(name, time, low, high, top1, error, "neither")
    better = in_time or in_top1
    return Pairing(name, time, low, high, top1, error, "first" if better > 0 else "other" if better < 0 else "equal")
