import math

import pytest
import torch

from dfs_cli.comparison.cascade import Answers, StaticNetwork, best_pair, cascade_of, percent


def networks(validation: list[int]) -> list[StaticNetwork]:
    """The cheap one is wrong, and unsure, on the last of four images, the dear one right on all, a thousand times over; of
    classes ``validation`` instead, they give the same answers."""
    cheap = torch.tensor([[5.0, 0.0], [0.0, 4.0], [3.0, 0.0], [0.2, 0.0]])
    dear = torch.tensor([[5.0, 0.0], [0.0, 5.0], [5.0, 0.0], [0.0, 5.0]])
    made = []
    for cost, logits in ((0.01, cheap), (0.04, dear)):
        held_out, others = (
            Answers.join(
                list(map(Answers.of, logits.repeat(1000, 1).split(700), torch.tensor(classes).repeat(1000).split(700)))
            )
            for classes in ([0, 1, 0, 1], validation)
        )
        made.append(StaticNetwork(cost, held_out, others))
    return made


def test_a_cascade_by_hand() -> None:
    both = cheap, dear = networks([0, 1, 0, 1])
    best, found = best_pair(both, 0.023), cascade_of(cheap, dear, 0.023)
    assert best is not None and best[1:] == (0, 1)
    assert found is not None and best[0].threshold == found.threshold
    assert found.held_out_top1 == 100 == percent(found.right("validation"))
    assert found.unsure("validation").tolist() == [False, False, False, True] * 1000
    assert found.cost == pytest.approx(0.02) and cheap.held_out.top1 == 75
    first, second = networks([0, 1, 1, 1])
    few = cascade_of(first, second, 0.023)
    assert few is not None and few.right("validation").tolist() == [True, True, False, True] * 1000
    assert best_pair(both, 0.009) is None is cascade_of(cheap, dear, 0.009)
    everything = cascade_of(cheap, dear, 0.05)
    assert everything is not None and everything.threshold == math.inf and everything.cost == pytest.approx(0.05)


def test_networks_that_answered_other_images_are_not_comparable() -> None:
    (cheap, _), (other, _) = networks([0, 1, 0, 1]), networks([0, 1, 1, 1])
    assert cheap.is_comparable(cheap) and not cheap.is_comparable(other)
