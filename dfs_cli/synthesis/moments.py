"""What batch-norm remembers of the images that a network was trained on."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from dfs_cli.errors import UnsupportedModelError

_TINY = 1e-12  # keeps a channel of zeros from dividing by zero


class Moments:
    """Compares, within its context, what enters each batch-norm layer of ``model`` with the statistics stored there.

    Matching them makes images out of noise (ZeroQ; Cai et al., 2020). Per channel the two are taken for normal distributions;
    their Kullback-Leibler divergence does not depend on the channel's scale. It is computed in single precision.

    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = _remembering(model)
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
        total = torch.stack(self._divergences).sum() if self._divergences else torch.zeros(())
        self._divergences = []
        return total

    def _compare(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None
        mean, variance = mean_and_variance(inputs[0])
        self._divergences.append(divergence(mean, variance, layer.running_mean, layer.running_var, layer.eps))


def check_remembers(model: nn.Module, blocks: int) -> None:
    """Check that there is something to make images from.

    Args:
        blocks: the number of residual blocks: with fewer batch-norm layers than that, too little is remembered.

    Raises:
        UnsupportedModelError: batch-norm layers are missing, or have no statistics.
    """
    if (layers := len(_remembering(model))) < blocks:
        raise UnsupportedModelError(
            f"images are made from what batch-norm layers remember, and of those the network has {layers} for {blocks} blocks: "
            "pass --data DIR with images"
        )


def _remembering(model: nn.Module) -> list[nn.BatchNorm2d]:
    """The batch-norm layers with statistics."""
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and isinstance(m.running_mean, Tensor)]


class _MeanAndVariance(torch.autograd.Function):
    """By batch-norm's own kernel, which takes a tenth of the time of ``torch.var_mean``, and of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        # With parameters in single precision, so are the results.
        ones, zeros = (make(x.shape[1], device=x.device) for make in (torch.ones, torch.zeros))
        _, mean, inverse = torch.native_batch_norm(x, ones, zeros, None, None, True, 0.0, _TINY)
        ctx.save_for_backward(x, mean)
        return mean, inverse.square().reciprocal() - _TINY

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        values = x.numel() / x.shape[1]
        slope = 2 * grads[1] / values
        offset = grads[0] / values - slope * mean
        slope, offset = (v.to(x.dtype).reshape(1, -1, 1, 1) for v in (slope, offset))
        return torch.addcmul(offset, x, slope)


def mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel, (C,) each in single precision, over images and pixels of ``x`` (N, C, H, W)."""
    mean, variance = _MeanAndVariance.apply(x)
    return mean, variance


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
