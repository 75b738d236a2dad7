import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap

from dfs_cli.comparison.intervals import (
    Interval,
    answers_record,
    difference_interval,
    interval,
    right_answers,
    right_shares,
    top1_interval,
)

IMAGES = 5000
Right = NDArray[np.bool_]


def answers(*wrong: range, images: int = IMAGES) -> Right:
    """All right but those in the ranges."""
    right = np.ones(images, dtype=bool)
    for part in wrong:
        right[part.start : part.stop] = False
    return right


def points(*rights: Right, **record: Any) -> list[dict[str, Any]]:
    return [{**answers_record(right, []), **record} for right in rights]


def test_the_interval_of_a_known_difference() -> None:
    # 150 images that only the first method answers right, 100 that only the other does, 400 that neither does.
    first, other = answers(range(500)), answers(range(400), range(500, 650))
    expected = 100 * 50 / IMAGES
    error = 100 * math.sqrt((250 / IMAGES - (50 / IMAGES) ** 2) / IMAGES)
    found = difference_interval([(points(first), points(other))])
    assert found is not None and found.outcome == "win"
    assert found == pytest.approx((expected - 1.96 * error, expected + 1.96 * error), abs=0.03)
    # SciPy draws images, and knows nothing of those that were not seen.
    values = 100 * (first.astype(float) - other)
    by_scipy = bootstrap((values,), np.mean, n_resamples=4000, batch=100, method="percentile")
    assert found == pytest.approx(tuple(by_scipy.confidence_interval), abs=0.05)
    assert difference_interval([(points(first), points(other))]) == found, "the same numbers each time"
    turned = difference_interval([(points(other), points(first))])
    assert turned is not None and turned.outcome == "loss"
    assert turned == pytest.approx((-found.high, -found.low), abs=0.03)


def test_pairs_tell_more_than_two_top1s() -> None:
    first, other = answers(range(500)), answers(range(530))
    paired = difference_interval([(points(first), points(other))])
    alone = [top1_interval(points(right)) for right in (first, other)]
    assert paired is not None and paired.outcome == "win"
    assert alone[0] is not None and alone[1] is not None
    assert alone[1].high > alone[0].low, "the intervals of both overlap"
    assert alone[0] == pytest.approx((90 - 1.96 * 0.4243, 90 + 1.96 * 0.4243), abs=0.05)
    # As if each had seen images of its own.
    rng = np.random.default_rng(0)
    shuffled = difference_interval([(points(first), points(rng.permutation(other)))])
    assert shuffled is not None and shuffled.outcome == "draw"
    assert shuffled.high - shuffled.low > 3 * (paired.high - paired.low)


def test_seeds_and_budgets_are_no_more_images() -> None:
    first, other = points(answers(range(500))), points(answers(range(400), range(500, 650)))
    once = difference_interval([(first, other)])
    assert difference_interval([(3 * first, 3 * other)]) == once, "the same answers three times"
    assert difference_interval([(3 * first, other)]) == once
    assert difference_interval(4 * [(first, other)]) == once
    assert top1_interval(3 * first) == top1_interval(first)
    # Where seeds differ in chance images, their mean is surer than one of them, and no surer than its images allow.
    rng = np.random.default_rng(0)
    hard = answers(range(1000))
    seeds = points(*(hard | (rng.random(IMAGES) < 0.5) for _ in range(3)))
    one, three = top1_interval(seeds[:1]), top1_interval(seeds)
    assert one is not None and three is not None
    ratio = (three.high - three.low) / (one.high - one.low)
    assert 1 / math.sqrt(3) + 0.1 < ratio < 0.95


@pytest.mark.parametrize("images", [450, 5000])
def test_a_handful_of_images_counts_as_in_the_sign_test(images: int) -> None:
    for only_first, only_other in [(0, 0), (1, 0), (4, 0), (5, 0), (6, 0), (7, 1), (8, 1), (9, 2), (10, 2), (5, 5)]:
        first = answers(range(only_other), images=images)
        other = answers(range(only_other, only_other + only_first), images=images)
        found = difference_interval([(points(first), points(other))])
        differing = only_first + only_other
        p = binomtest(only_first, differing).pvalue if differing else 1.0
        assert found is not None and found.low < found.high
        assert found.outcome == ("win" if p < 0.05 else "draw"), (only_first, only_other, p, found)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng, held = np.random.default_rng(3), 0
    truth = 100 * (0.06 - 0.05)
    for _ in range(300):
        values = rng.choice([100.0, 0.0, -100.0], size=2000, p=[0.06, 0.89, 0.05])
        found = interval(values, -100, 100)
        held += found.low <= truth <= found.high
    assert 0.92 <= held / 300 <= 0.98


def test_outcomes() -> None:
    assert Interval(0.1, 1).outcome == "win" and Interval(-1, -0.1).outcome == "loss"
    assert {Interval(*ends).outcome for ends in ((-1, 1), (0, 1), (-1, 0))} == {"draw"}
    # Thirds that add up to nothing are nothing.
    thirds = np.array([1 / 3, 1 / 3, 1 / 3, -1.0] + 96 * [0.0])
    assert interval(100 * thirds, -100, 100).outcome == "draw"


def test_answers_of_other_images_are_not_compared() -> None:
    right = answers(range(500))
    own = points(right)
    assert difference_interval([(own, points(right[1:]))]) is None
    assert difference_interval([(own, points(right, unreadable=["a.jpg"]))]) is None
    assert difference_interval([(own, [{"top1": 90.0}])]) is None
    assert top1_interval([{"top1": 90.0}]) is None and right_shares([[]]) is None
    unread = points(right, unreadable=["a.jpg"])
    assert difference_interval([(unread, unread)]) is not None


def test_answers_are_kept_bit_by_bit() -> None:
    right = np.random.default_rng(0).random(451) < 0.5
    record = answers_record(right, ["b.jpg", "a.jpg"])
    kept = right_answers(record)
    assert kept is not None and np.array_equal(kept, right)
    assert record["images"] == 451 and record["unreadable"] == ["a.jpg", "b.jpg"] and len(record["right"]) < 80
    assert answers_record(np.array([True] + 7 * [False]), [])["right"] == "gA=="
    for damaged in ({"right": record["right"][4:]}, {"right": "?"}, {"images": 600}):
        with pytest.raises(ValueError, match=r"bytes of answers|base64|padding"):
            right_answers({**record, **damaged})
