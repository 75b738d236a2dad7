import pytest
import torch

from dfs_cli.comparison.cascade import StaticNetwork, best_cascade, confident_answers


def test_a_cascade_by_hand() -> None:
    # The cheap network is wrong, and unsure, on the last of four images; the dear one is always right.
    targets = torch.tensor([0, 1, 0, 1])
    cheap_logits = torch.tensor([[5.0, 0.0], [0.0, 4.0], [3.0, 0.0], [0.2, 0.0]])
    dear_logits = torch.tensor([[5.0, 0.0], [0.0, 5.0], [5.0, 0.0], [0.0, 5.0]])
    many = [t.repeat(1000, 1) for t in (cheap_logits, dear_logits)]
    cheap, dear = (confident_answers(logits.split(700)) for logits in many)
    networks = [StaticNetwork(0.01, cheap, cheap), StaticNetwork(0.04, dear, dear)]
    found = best_cascade(networks, 0.023, targets.repeat(1000), targets.repeat(1000))
    assert found is not None and (found.cheap, found.expensive) == (0, 1)
    assert found.top1 == 100 and found.share == 0.25 and found.cost == pytest.approx(0.02)
    assert found.right.shape == (4000,) and found.right.all()
    few = best_cascade(networks, 0.023, targets.repeat(1000), torch.tensor([0, 1, 1, 1]).repeat(1000))
    assert few is not None and few.top1 == 100 * few.right.double().mean() == 75
    assert few.right.tolist() == [True, True, False, True] * 1000
    assert best_cascade(networks, 0.009, targets.repeat(1000), targets.repeat(1000)) is None
