"""Gains of a layer's input channels, which let channels of very different ranges share one step size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    _Layer = nn.Module
else:
    _Layer = object


class GainedInput(_Layer):
    """Part of a convolution or linear layer: its input's channels may be multiplied by a gain, by which its weight is divided.

    Gains are powers of two: they change no result in floating point by a single bit.
    """

    weight: Tensor
    input_gain: Tensor | None  # (C_in,), positive; None: ones

    def reserve_input_gain(self) -> None:
        """Give the input a gain of ones, into which another one can be loaded."""
        self.input_gain = self.weight.new_ones(self.weight.shape[1] * self._groups())

    @torch.no_grad()
    def set_input_gain(self, gain: Tensor) -> None:
        """Multiply the input's channels by ``gain`` (C_in,), in place of an earlier one, before they are quantized, and divide
        the weight by it."""
        factors = [self.input_gain, 1 / gain]
        self.input_gain = gain.to(self.weight)
        if self.effective_weight() is self.weight:  # a standardised weight is divided whenever it is computed
            weight = self.weight.detach()
            for factor in factors:
                weight = weight if factor is None else self._times(weight, factor.to(weight))
            self.weight = nn.Parameter(weight, self.weight.requires_grad)

    @torch.no_grad()
    def weight_range(self) -> Tensor:
        """The largest absolute weight of each of the input's channels, (C_in,), if there were no gain."""
        outputs, inputs, *_ = self.weight.shape
        grouped = self.effective_weight().abs().reshape(self._groups(), outputs // self._groups(), inputs, -1)
        largest = grouped.amax(dim=(1, 3)).flatten()
        return largest if self.input_gain is None else largest * self.input_gain

    def with_gain(self, x: Tensor) -> Tensor:
        """The input ``x`` (N, C_in, ...) times its gain."""
        return x if self.input_gain is None else x * self.input_gain.reshape(self.channel_shape())

    def without_gain(self, weight: Tensor) -> Tensor:
        """``weight`` divided by the input's gain."""
        return weight if self.input_gain is None else self._times(weight, 1 / self.input_gain)

    def effective_weight(self) -> Tensor:
        """The weight that the layer applies or quantizes, divided by the input's gain."""
        raise NotImplementedError

    def channel_shape(self) -> tuple[int, ...]:
        """The shape in which a number per channel is multiplied with the input or the output."""
        raise NotImplementedError

    def _groups(self) -> int:
        return getattr(self, "groups", 1)

    def _times(self, weight: Tensor, factor: Tensor) -> Tensor:
        """``weight`` (C_out, C_in / groups, ...) times a factor (C_in,) for each of the input's channels."""
        groups, (outputs, inputs, *kernel) = self._groups(), weight.shape
        grouped = weight.reshape(groups, outputs // groups, inputs, -1)
        return (grouped * factor.reshape(groups, 1, inputs, 1)).reshape(outputs, inputs, *kernel)
