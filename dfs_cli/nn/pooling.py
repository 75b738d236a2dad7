"""Max-pooling that is fast on CPUs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dfs_cli.nn.layers import FractionalConv2d, FractionalLayer


class MaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d`` in the channels-last layout, in which its CPU kernel is several times faster.

    The result is the same, in the memory layout of the input.
    """

    @classmethod
    def adopt(cls, pool: nn.MaxPool2d) -> MaxPool2d:
        """A layer that pools as ``pool`` does."""
        new = cls(pool.kernel_size, pool.stride, pool.padding, pool.dilation, ceil_mode=pool.ceil_mode)
        new.training = pool.training
        return new

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # its name in torch
        """(N, C, H, W) to (N, C, H', W')."""
        is_planar = input.device.type == "cpu" and input.is_contiguous() and not torch.is_grad_enabled()
        pooled: Tensor = super().forward(input.contiguous(memory_format=torch.channels_last) if is_planar else input)
        return pooled.contiguous() if is_planar else pooled


def pools_after_one_convolution(model: nn.Module, blocks: Iterable[str]) -> bool:
    """Whether the stem, all modules outside ``blocks`` (paths), is one convolution, batch-norm and max-pooling.

    Then the convolution may run in the layout that is fast for pooling: it rounds the same in both layouts and for any number
    of images. Neither holds for later convolutions and for group normalisation.
    """
    inside = tuple(f"{path}." for path in blocks)
    stem = [module for name, module in model.named_modules() if not name.startswith(inside)]
    layers = [m for m in stem if any(True for _ in m.parameters(recurse=False))]
    is_plain = all(isinstance(m, (FractionalLayer, nn.BatchNorm2d)) for m in layers)
    return is_plain and [type(m) for m in stem].count(FractionalConv2d) == 1 and any(type(m) is MaxPool2d for m in stem)
