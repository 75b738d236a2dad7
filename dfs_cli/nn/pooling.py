"""Max-pooling that uses all of the processor."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d``, whose CPU kernel is several times faster on channels that lie next to each other in memory.

    The result is the same, and laid out as the input was.
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
