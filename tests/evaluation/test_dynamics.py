import pytest
import torch

from dfs_cli.cost.decisions import NOT_RUN, Decisions
from dfs_cli.cost.layer import LayerCost
from dfs_cli.cost.table import CostTable
from dfs_cli.evaluation.dynamics import choice_entropy, variance_between_images

TWO_BLOCKS = CostTable((0, 8, 32), ("a", "b"), (LayerCost("a", 100, 0), LayerCost("b", 300, 1)), ((0, 0),))
DECISIONS = Decisions.of_pass(torch.tensor([[0, 1], [0, 1], [2, 1], [2, 2]]))


def test_entropy_by_hand() -> None:
    # Block a: two halves, one bit; block b: 3 to 1, 0.75 * log2(4/3) + 0.25 * 2 = 0.8113 bits.
    assert choice_entropy(DECISIONS) == pytest.approx((1 + 0.811278) / 2, abs=1e-6)
    assert choice_entropy(DECISIONS[:2]) == 0
    # Not taking a pass is a choice: of four images two do.
    second = torch.tensor([[0, 0], [0, 0], [NOT_RUN, NOT_RUN], [NOT_RUN, NOT_RUN]])
    assert choice_entropy(DECISIONS.followed_by(second)) == pytest.approx((1 + 0.811278 + 1 + 1) / 4, abs=1e-6)


def test_variance_between_images_by_hand() -> None:
    # Costs of blocks a and b: 0 or 1/4, and 3/64 or 3/4.
    a, b = torch.tensor([0, 0, 1 / 4, 1 / 4]), torch.tensor([3 / 64, 3 / 64, 3 / 64, 3 / 4])
    means = (a + b) / 2
    everything = torch.cat([a, b])
    expected = float(((means - means.mean()) ** 2).mean() / ((everything - everything.mean()) ** 2).mean())
    assert variance_between_images(TWO_BLOCKS, DECISIONS) == pytest.approx(expected, rel=1e-5)
    assert variance_between_images(TWO_BLOCKS, Decisions.alike(torch.tensor([0, 1]), 4)) == 0
    assert variance_between_images(TWO_BLOCKS, Decisions.alike(torch.tensor([0, 0]), 4)) == 0
