"""How much of a difference in top-1 may be chance: intervals from a bootstrap over the validation images.

All networks of a sweep answer the same images, so an image is drawn with all its answers: those of both methods, of every seed,
and of every budget where several differences are averaged. Three seeds are not three times as many images. An interval speaks
of these networks on other images; what other seeds would give, the spread over seeds tells.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Outcome = Literal["win", "draw", "loss"]

LEVEL = 0.95
"""Share of such intervals that hold the true value."""

_DRAWS = 10_000


class Interval(NamedTuple):
    """The ends of a 95% interval."""

    low: float
    high: float

    @property
    def outcome(self) -> Outcome:
        """Of a difference: ``win`` where all of the interval is above 0, ``loss`` where all is below."""
        return "win" if self.low > 0 else "loss" if self.high < 0 else "draw"


def answers_record(right: NDArray[np.bool_], unreadable: Sequence[str]) -> dict[str, Any]:
    """Which images were answered right, for a point of the results.

    Args:
        right: (N,), for the readable images, in the order of the split.
        unreadable: names of the others.

    Returns:
        ``images``, N; ``right``, a bit for each of them, the first one the highest of the first byte, in base64; and
        ``unreadable``, in alphabetical order.
    """
    packed = base64.b64encode(np.packbits(right).tobytes()).decode()
    return {"images": len(right), "right": packed, "unreadable": sorted(unreadable)}


def right_answers(point: dict[str, Any]) -> NDArray[np.bool_] | None:
    """Which images (N,) a point of the results answered right; None: that is not recorded.

    Raises:
        ValueError: the record is damaged.
        KeyError: the number of images is missing.
    """
    if "right" not in point:
        return None
    packed, images = np.frombuffer(base64.b64decode(point["right"], validate=True), dtype=np.uint8), point["images"]
    if len(packed) != -(-images // 8):
        raise ValueError(f"{len(packed)} bytes of answers for {images} images")
    return np.unpackbits(packed, count=images).astype(bool)


def right_shares(groups: Sequence[Sequence[dict[str, Any]]]) -> NDArray[np.float64] | None:
    """How often the points of each of G groups, one for each seed, answered each of N images right: shares (G, N).

    Returns:
        None where a point has no record of its answers, or another one is of other images: the images that a network could not
        read are missing in its record, so that all behind them have other places.
    """
    points = [point for group in groups for point in group]
    answers = [right_answers(point) for point in points]
    seen = {(point.get("images"), tuple(point.get("unreadable", ()))) for point in points}
    if len(seen) != 1 or any(right is None or not len(right) for right in answers):
        return None
    ends = np.cumsum([len(group) for group in groups])[:-1]
    return np.stack([np.mean(part, axis=0) for part in np.split(np.stack(answers), ends)])  # type: ignore[arg-type]


def interval(values: NDArray[np.float64], least: float, most: float) -> Interval:
    """The 95% interval of the mean of ``values`` (N,), one for each image: the percentiles of a bootstrap.

    Efron and Tibshirani (1993), "An Introduction to the Bootstrap", chapter 13. Images with the same value are alike, so how
    often each value is drawn is a multinomial number, and no image need be drawn by itself. The draws are always the same ones.

    Two images are added that were not seen, one with the value ``least`` and one with ``most``, the ends of what is possible.
    Else, where all images have the same value the interval would have no width, and four images that differ, all in the same
    direction, would count as certain; the sign test has a p of 0.125 for them. Among hundreds they make no difference.
    """
    kinds, counts = np.unique(np.round(np.append(values, (least, most)), 12), return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(values), counts / counts.sum(), size=_DRAWS)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(drawn @ kinds / len(values), (tail, 1 - tail))
    # A sum of thirds that is 0 must not lie beside it.
    return Interval(round(float(low), 9) + 0.0, round(float(high), 9) + 0.0)


def top1_interval(points: Sequence[dict[str, Any]]) -> Interval | None:
    """The interval of the mean top-1 of points, one for each seed, in percent; None: the answers are not known."""
    shares = right_shares([points])
    return None if shares is None else interval(100 * shares[0], 0, 100)


def difference_interval(pairs: Sequence[tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]]]]) -> Interval | None:
    """The interval of how many points of top-1 the first of two methods is above the second, in the mean over ``pairs``.

    Args:
        pairs: the points of two methods, one for each seed that a method has; several pairs, of other budgets or networks, may
            be of the same images.

    Returns:
        None where the answers of a point are not known, or of other images than those of the others.
    """
    shares = right_shares([points for pair in pairs for points in pair])
    return None if shares is None else interval(100 * (shares[0::2] - shares[1::2]).mean(axis=0), -100, 100)
