import math

import pytest
import torch
from torch import nn

from dfs_cli.tuning.losses import cost_excess, distillation_loss


def test_cost_excess_by_hand() -> None:
    cost, expected = torch.tensor([0.3, 0.5]), torch.tensor([0.2, 0.4], requires_grad=True)
    excess = cost_excess(cost, expected, 0.1)
    assert excess.item() == pytest.approx(math.log(4))
    excess.backward()
    # d log(c) = dc / 0.4, and the mean halves it.
    assert expected.grad is not None and expected.grad.tolist() == pytest.approx([1.25, 1.25])


def test_nothing_rewards_spending() -> None:
    expected = torch.tensor([0.2], requires_grad=True)
    excess = cost_excess(torch.tensor([0.2]), expected, 0.4)
    excess.backward()
    assert excess.item() == 0 and expected.grad is not None and expected.grad.item() == 0


def test_cost_excess_does_not_depend_on_the_batch_size() -> None:
    cost = torch.tensor([0.3, 0.5])
    assert torch.equal(cost_excess(cost, cost, 0.1), cost_excess(cost.repeat(8), cost.repeat(8), 0.1))


def test_distillation_loss_is_zero_for_the_teacher_and_agrees_with_its_definition() -> None:
    logits, teacher = torch.randn(4, 6), torch.randn(4, 6)
    assert distillation_loss(teacher, teacher, 2.0).item() == pytest.approx(0, abs=1e-6)
    p, q = (teacher / 3).softmax(1), (logits / 3).softmax(1)
    expected = 9 * (p * (p / q).log()).sum() / 4
    assert distillation_loss(logits, teacher, 3.0).item() == pytest.approx(expected.item(), rel=1e-5)
    by_torch = 9 * nn.KLDivLoss(reduction="batchmean")(q.log(), p)
    assert distillation_loss(logits, teacher, 3.0).item() == pytest.approx(by_torch.item(), rel=1e-5)
