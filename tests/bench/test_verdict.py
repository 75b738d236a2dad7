import pytest
import torch

from dfs_cli.bench.verdict import Measured, judge


def measured(passes: list[float], right: str = "") -> Measured:
    """Passes in which each image took so many seconds; of the images, those with a 1 were answered right."""
    answers = torch.tensor([int(c) for c in right], dtype=torch.bool) if right else None
    return Measured(torch.tensor(passes, dtype=torch.float64)[:, None].expand(-1, max(1, len(right))), answers)


OWN = measured([2.0, 2.2, 2.1], "1" * 90 + "0" * 10)


def winner(other: Measured) -> str:
    return judge("own", {"own": OWN, "other": other}).pairings[0].winner


def test_a_pairing_by_hand() -> None:
    other = measured([1.0, 1.0, 1.4], "1" * 80 + "0" * 20)
    (found,) = judge("own", {"own": OWN, "other": other}).pairings
    # The typical times of an image are 2.1 and 1; the ratios of the passes are 2, 2.2 and 1.5.
    assert (found.time, found.time_low, found.time_high) == pytest.approx((2.1, 1.5, 2.2))
    # Ten of a hundred images are answered better: the deviation of the differences is the root of 0.1 * 0.9.
    assert (found.top1, found.top1_error) == pytest.approx((10, 3))
    assert found.winner == "neither"


def test_who_wins() -> None:
    as_right, less_right, more_right = "1" * 90 + "0" * 10, "1" * 50 + "0" * 50, "1" * 100
    faster, as_fast, slower = [1.0, 1.1, 1.2], [1.9, 2.3, 2.1], [3.0, 3.0, 3.0]
    found = [[winner(measured(t, a)) for a in (less_right, as_right, more_right)] for t in (slower, as_fast, faster)]
    assert found == [["first", "first", "neither"], ["first", "equal", "other"], ["neither", "other", "other"]]
    # A difference within two standard errors is none: one image of a hundred.
    assert winner(measured(as_fast, "1" * 91 + "0" * 9)) == "equal"


def test_without_classes_time_alone_decides() -> None:
    verdict = judge("own", {"own": OWN, "a": measured([1.0] * 3), "b": measured([3.0] * 3)})
    assert [pairing.winner for pairing in verdict.pairings] == ["other", "first"]
    assert verdict.at_equal_top1 is None and verdict.at_equal_time is None


def test_equal_top1_and_equal_time() -> None:
    others = {
        "dense": measured([4.0] * 3, "1" * 95 + "0" * 5),
        "int8": measured([1.0] * 3, "1" * 89 + "0" * 11),
        "tiny": measured([0.5] * 3, "1" * 40 + "0" * 60),
    }
    verdict = judge("own", {"own": OWN} | others, reference="int8")
    assert [pairing.name for pairing in verdict.pairings] == ["int8", "dense", "tiny"]
    # One image less is within the error: int8 is the fastest with the same top-1, and the best of those that take no longer.
    assert verdict.at_equal_top1 == verdict.at_equal_time == "int8"
    del others["int8"]
    verdict = judge("own", {"own": OWN} | others)
    assert verdict.at_equal_top1 == "dense" and verdict.at_equal_time == "tiny"
    alone = judge("own", {"own": OWN, "tiny": others["tiny"]})
    assert alone.at_equal_top1 is None
