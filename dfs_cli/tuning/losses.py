"""The terms of the tuning loss, as plain functions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence from the teacher's softened predictions (Hinton et al., 2015), in nats, times the
    temperature squared.

    Args:
        logits, teacher_logits: (N, classes).
    """
    divergence = F.kl_div(
        F.log_softmax(logits / temperature, dim=1),
        F.log_softmax(teacher_logits / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * temperature**2


def cost_excess(cost: Tensor, expected_cost: Tensor, target: float) -> Tensor:
    """``log(cost / target)`` where the cost is above the target, else zero.

    A ratio, so it depends neither on the batch size nor on the depth, and it pulls as hard on a small budget as on a
    large one. Below the target the term is zero: spending is not rewarded.

    Args:
        cost: (N,), the cost of the images' decisions; gives the value.
        expected_cost: (N,), the cost under the controller's probabilities; gives the gradient (straight through the arg-max).
        target: in the same units.
    """
    mean = expected_cost.mean()
    straight_through = mean + (cost.mean() - mean).detach()
    return torch.relu(straight_through.clamp_min(1e-12).log() - torch.log(torch.tensor(target)).to(mean.device))
