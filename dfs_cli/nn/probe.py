"""The probe gate: a cheap pass over the whole network decides who needs a second, better one.

Cost falls with the square of the bitwidth, so a low-bit pass is nearly free, and its own confidence tells difficult
images from easy ones far better than any block's features do. An image whose first answer is sure is done; for the
others a gate that sees that answer chooses the bitwidths of a second pass, and both passes' evidence is added up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dfs_cli.nn.gate import RefineGate, pool
from dfs_cli.nn.network import DynamicResNet, Output

# Thresholds of doubt beyond all doubts; finite, so that they can be written as JSON.
NOBODY_IS_SURE, EVERYBODY_IS_SURE = -1e9, 1e9

_TRAINED_SHARE = 0.2


def doubt(logits: Tensor) -> Tensor:
    """How unsure an answer is, (N,) in float64: minus the log-odds of the most likely class of ``logits`` (N, classes).

    Orders images as their softmax confidence does, without its rounding near one.
    """
    top, others = _split_top(logits)
    return others.logsumexp(dim=1) - top


def _count(share: float, images: int) -> int:
    """How many images a share is; one at least, where there is any."""
    return min(images, max(round(share * images), 1 if share > 0 else 0))


def _split_top(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit (N,) and the others in descending order (N, classes - 1)."""
    ordered = logits.double().sort(dim=1, descending=True).values
    return ordered[:, 0], ordered[:, 1:]


def summarise(logits: Tensor, features: Tensor) -> Tensor:
    """What a pass found, (N, 2 + C): log-odds, margin between the two largest logits, and pooled ``features`` (N, C, H, W)."""
    top, others = _split_top(logits)
    scalars = torch.stack([top - others.logsumexp(dim=1), top - others[:, 0]], dim=1)
    return torch.cat([scalars, pool(features).double()], dim=1)


class ProbedResNet(DynamicResNet):
    """A dynamic network of two passes.

    The first pass runs every image with ``policy`` (L,), one option per block. Images whose :func:`doubt` is above
    ``operating_point`` enter the second, whose options the gate chooses at ``price``; the answer is then the sum of both
    passes' logits, weighted by ``evidence``. With ``config.mirror`` the second pass sees the image mirrored: a second view
    tells more than a second look at the same.

    ``tuned_price`` is the price at the end of tuning, from which the network is moved to a budget, whatever it was at before.

    Decisions are (N, 2 * L), those of the second pass -1 for images that did not enter it.
    """

    gate: RefineGate  # type: ignore[assignment]  # it scores all blocks at once
    policy: Tensor
    stored_price: Tensor
    tuned_price: Tensor

    def __init__(self, *parts: Any, **named_parts: Any) -> None:
        super().__init__(*parts, **named_parts)
        blocks, options = self.prices.shape
        self.register_buffer("policy", torch.full((blocks,), options - 1))
        self.register_buffer("stored_price", torch.zeros((), dtype=torch.float64))
        self.register_buffer("tuned_price", torch.zeros((), dtype=torch.float64))
        self.evidence = nn.Parameter(torch.tensor([0.5, 0.5]))
        self.operating_point = EVERYBODY_IS_SURE

    @property
    def price(self) -> float:
        return float(self.stored_price)

    @price.setter
    def price(self, value: float) -> None:
        self.stored_price.fill_(value)

    def run(
        self, images: Tensor, decisions: Tensor | None = None, explore: float = 0.0, share: float | None = None
    ) -> Output:
        """Classify ``images`` and tell what was decided; see :meth:`DynamicResNet.run`.

        Args:
            decisions: (N, 2 * L) to follow, or (N, L) for one pass alone.
            share: send this share of the images, the least sure ones, to the second pass, whatever the operating point; in
                training at most a fifth of the batch, drawn from them, so that a step stays cheap.
        """
        blocks = len(self.blocks)
        first_choice = self.policy.expand(len(images), -1) if decisions is None else decisions[:, :blocks]
        first, features = self._pass(images, first_choice)
        if decisions is not None and decisions.shape[1] == blocks:
            return Output(first, first_choice, None)
        if decisions is not None:
            unsure = decisions[:, blocks] >= 0
        elif share is not None:
            chosen = doubt(first.detach()).topk(_count(share, len(images))).indices
            limit = max(1, round(_TRAINED_SHARE * len(images)))
            if self.training and len(chosen) > limit:
                chosen = chosen[torch.randperm(len(chosen), device=chosen.device)[:limit]]
            unsure = torch.zeros(len(images), dtype=torch.bool, device=images.device)
            unsure[chosen] = True
        else:
            unsure = doubt(first) > self.operating_point
        indices = unsure.nonzero().flatten()
        refused = torch.full_like(first_choice, -1)
        if not len(indices):
            return Output(first, torch.cat([first_choice, refused], dim=1), None, first, indices)
        everybody = len(indices) == len(images)

        def entering(tensor: Tensor) -> Tensor:
            return tensor if everybody else tensor[indices]

        scores = self.gate(summarise(entering(first.detach()), entering(features.detach())))
        # Not self.price, a number: an accelerator would be waited for.
        scores = scores - self.stored_price * self.prices.to(scores.dtype)
        choice = scores.argmax(dim=2) if decisions is None else entering(decisions[:, blocks:])
        probs = scores.softmax(dim=2) if self.training else None
        views = entering(images)
        second, _ = self._pass(views.flip(-1) if self.config.mirror else views, choice, probs, explore)
        both = (self.evidence[0] * entering(first.detach()) + self.evidence[1] * second).to(first.dtype)
        return Output(
            both if everybody else first.index_copy(0, indices, both),
            torch.cat([first_choice, choice if everybody else refused.index_copy(0, indices, choice)], dim=1),
            probs,
            first,
            indices,
        )

    def _pass(
        self, images: Tensor, choice: Tensor, probs: Tensor | None = None, explore: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Logits and last features of one pass with the options ``choice`` (N, L), chosen with ``probs`` (N, L, K).

        An accelerator is waited for once, not for each block.
        """
        known = choice.cpu()
        return self._walk(images, lambda i, _: (known[:, i], None if probs is None else probs[:, i]), explore)

    @torch.no_grad()
    def fit_gate(self, images: Tensor) -> None:
        """Scale the gate's input to zero mean and unit deviation over the first pass of ``images`` (N, C, H, W)."""
        self.gate.normalise_input(summarise(*self._pass(images, self.policy.expand(len(images), -1))))
