"""Steps in proportion to what they change, for networks whose channels are of very different sizes.

Adam moves every parameter by about the learning rate, which is right where parameters are of ordinary size. A channel whose
weights are of 1e-8, before a batch-norm that multiplies by 1e6, is destroyed by its first step. So parameters are tuned as if
each channel were divided by its size: the gradient is multiplied by the size, and so is the step that follows from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dfs_cli.nn.layers import FloatLayer, FractionalLayer
from dfs_cli.nn.normalisation import FractionalBatchNorm, NormTensors, norm_tensors
from dfs_cli.presets import FULL_BITS

_LEAST_SHARE = 1e-6
_UNEVEN = 0.01


class ParameterSizes:
    """The sizes of a network's channels before it is tuned.

    Args:
        network: the size of a channel of a convolution or linear layer is the norm of its weights; that of a batch-norm's
            follows from the mean and standard deviation of its output.
    """

    @torch.no_grad()
    def __init__(self, network: nn.Module) -> None:
        self._sizes: dict[Tensor, Tensor] = {}
        for module in network.modules():
            if isinstance(module, FloatLayer):
                size = module.weight.flatten(1).norm(dim=1)
                self._sizes[module.weight] = size.reshape(-1, *[1] * (module.weight.dim() - 1))
                if module.bias is not None:
                    self._sizes[module.bias] = size
            elif isinstance(module, nn.BatchNorm2d):
                self._add(norm_tensors(module, FULL_BITS), module.weight, module.bias, module.eps)
                if isinstance(module, FractionalBatchNorm):
                    rows = NormTensors(module.bit_mean, module.bit_var, module.bit_weight, module.bit_bias)
                    self._add(rows, module.bit_weight, module.bit_bias, module.eps)

    def _add(self, tensors: NormTensors, weight: nn.Parameter, bias: nn.Parameter, eps: float) -> None:
        # Where the variance is far below epsilon, the weight is far above the output.
        share = (tensors.variance / (tensors.variance + eps)).sqrt().clamp_min(_LEAST_SHARE)
        size = torch.hypot(weight * share, bias)
        self._sizes[weight], self._sizes[bias] = size / share, size

    def state(self) -> list[Tensor]:
        """The sizes, in the order of the network's layers."""
        return list(self._sizes.values())

    def load(self, state: list[Tensor]) -> None:
        """Restore what :meth:`state` gave for the same network."""
        for size, saved in zip(self._sizes.values(), state, strict=True):
            size.copy_(saved)

    @torch.no_grad()
    def scale_gradients(self) -> None:
        """Turn the gradients into those of the divided parameters, in place."""
        for parameter, size in self._sizes.items():
            if parameter.grad is not None:
                parameter.grad.mul_(size)

    @contextmanager
    def proportional(self) -> Iterator[None]:
        """Multiply the changes of parameters within the context by their sizes."""
        changing = [(p, size) for p, size in self._sizes.items() if p.grad is not None]
        before = [p.detach().clone() for p, _ in changing]
        yield
        with torch.no_grad():
            for (parameter, size), old in zip(changing, before, strict=True):
                parameter.sub_(old).mul_(size).add_(old)


def sizes_of(network: nn.Module) -> ParameterSizes | None:
    """The sizes of the channels of a network of which layers were equalised, or of which a channel in use is divided by next to
    nothing; None for any other: its steps stay as they are."""
    modules = list(network.modules())
    has_gains = any(layer.input_gain is not None for layer in modules if isinstance(layer, FractionalLayer))
    is_uneven = has_gains or any(_divides_by_nothing(norm) for norm in modules if isinstance(norm, nn.BatchNorm2d))
    return ParameterSizes(network) if is_uneven else None


@torch.no_grad()
def _divides_by_nothing(norm: nn.BatchNorm2d) -> bool:
    """Whether the output of a channel is of ordinary size though its variance is far below epsilon.

    Trained networks have channels of such variances, but most of them are dead: what they put out is next to nothing, too.
    """
    tensors = norm_tensors(norm, FULL_BITS)
    if tensors.weight is None:
        return False
    share = (tensors.variance / (tensors.variance + norm.eps)).sqrt()
    output = (tensors.weight * share).abs()
    return bool(((share < _UNEVEN) & (output > _UNEVEN * output.median())).any())
