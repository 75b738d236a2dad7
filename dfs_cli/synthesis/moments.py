"""What batch-norm remembers of the images that a network was trained on."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from dfs_cli.errors import UnsupportedModelError


class Moments:
    """Compares, within its context, what enters each batch-norm layer of ``model`` with the statistics stored there.

    Matching them makes images out of noise (ZeroQ; Cai et al., 2020). Per channel the two are taken for normal distributions;
    their Kullback-Leibler divergence does not depend on the channel's scale. It is computed in single precision.

    Args:
        blocks: the number of residual blocks: with fewer batch-norm layers than that, too little is remembered.

    Raises:
        UnsupportedModelError: batch-norm layers are missing, or have no statistics.
    """

    def __init__(self, model: nn.Module, blocks: int = 1) -> None:
        self._layers = [
            m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and isinstance(m.running_mean, Tensor)
        ]
        if len(self._layers) < blocks:
            raise UnsupportedModelError(
                f"images are made from what batch-norm layers remember, and of those the network has {len(self._layers)} "
                f"for {blocks} blocks: pass --data DIR with images"
            )
        self._handles: list[Any] = []
        self._divergences: list[Tensor] = []

    def __enter__(self) -> Moments:
        self._handles = [layer.register_forward_pre_hook(self._compare) for layer in self._layers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self) -> Tensor:
        """The divergence in the forward pass since the last call: in nats, the sum over layers of the mean over channels."""
        total = torch.stack(self._divergences).sum()
        self._divergences = []
        return total

    def _compare(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None
        x = inputs[0].float()
        variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        self._divergences.append(divergence(mean, variance, layer.running_mean, layer.running_var, layer.eps))


def divergence(mean: Tensor, variance: Tensor, expected_mean: Tensor, expected_variance: Tensor, eps: float) -> Tensor:
    """Mean over channels of the Kullback-Leibler divergence, in nats, of the normal distribution with ``mean`` and ``variance``
    (C,) from the expected one.

    Args:
        eps: added to variances.
    """
    expected = expected_variance.float() + eps
    ratio = (variance + eps) / expected
    shift = (mean - expected_mean.float()).square() / expected
    return 0.5 * (shift + ratio - 1 - ratio.log()).mean()
