"""A convolution, its batch-norm and the rounding of the result as integer hardware computes them.

Sums of products are integers, and so is the bias; one factor in single precision turns them into the codes of the result,
rounded half to even. Runtimes compute ``input step * weight scale / output step`` in this order, and so is it done here: codes
are the same to the last one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from dfs_cli.nn.features import ByteFeatures
from dfs_cli.nn.normalisation import FractionalBatchNorm, norm_tensors
from dfs_cli.nn.quantization import (
    BYTE_BITS,
    LARGEST_BYTE,
    SMALLEST_STEP,
    code_range,
    identity,
    nearest_integer_bias,
    quantize_codes,
)

if TYPE_CHECKING:
    from dfs_cli.nn.layers import FractionalLayer

    _Layer = FractionalLayer
else:
    _Layer = object

# Biases are integers in units of weight scale times input step, times a multiple of up to 127: all within 32 bits.
_LARGEST_BIAS = 2.0**23
_LARGEST_EXACT = 2.0**24  # integers up to this one are numbers of single precision


class Folded(NamedTuple):
    """A convolution of codes and the batch-norm behind it, ``scale * step * (convolution + bias)``.

    Args:
        weight: (C_out, ...), integers within a signed byte.
        bias: (C_out,), integers.
        scale: (C_out,), positive, in single precision.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor

    def fits(self, largest: int) -> bool:
        """Whether single precision holds all sums exactly, in whatever order they are added up.

        Args:
            largest: of the input's codes.
        """
        sums = self.weight.abs().flatten(1).sum(dim=1, dtype=torch.float64) * largest + self.bias.abs()
        return float(sums.max()) <= _LARGEST_EXACT


def fold(codes: Tensor, scale: Tensor, step: float | Tensor, bits: int, gain: Tensor, shift: Tensor) -> Folded:
    """Express ``gain * convolution + shift`` by integers, channel by channel.

    The bias becomes an integer in units that grow as the bitwidth falls. Codes of few bits leave room in their bytes: they are
    multiplied by the number that brings the bias closest to an integer.

    Args:
        codes: (C_out, ...), of a weight of ``bits``, with the step sizes ``scale`` (C_out,).
        step: of the input.
        gain, shift: (C_out,), in double precision.
    """
    sign = torch.where(gain < 0, -1.0, 1.0)
    scale = scale.double() * gain.abs()
    # A channel whose bias outweighs its weight by far would need a bias beyond 32 bits: its weight gets coarser units.
    least = (shift.abs() / (_LARGEST_BIAS * step)).clamp_min(SMALLEST_STEP)
    coarser = torch.maximum(scale, least)
    share = (scale / coarser).to(codes.dtype).reshape(-1, *[1] * (codes.dim() - 1))
    room = LARGEST_BYTE // code_range(bits, signed=True)[1]
    bias, multiple = nearest_integer_bias(shift / (coarser * step), room)
    weight = (codes * share).round() * (multiple * sign).to(codes.dtype).reshape(share.shape)
    return Folded(weight, bias.float(), (coarser / multiple).float())


def requantize(sums: Tensor, folded: Folded, step: Tensor, target: Tensor) -> Tensor:
    """The result's codes, as floating point numbers, not yet clipped.

    Args:
        sums: (N, C_out, H, W), the convolution with its bias; it is overwritten.
        step, target: (), step sizes of input and result.
    """
    return sums.mul_((step * folded.scale / target).reshape(1, -1, 1, 1)).round_()


class IntegerResult(_Layer):
    """Part of a convolution: in evaluation, at up to 8 bits, it gives the codes of its batch-norm's result if these are known.

    ``norm`` is the batch-norm that alone reads the convolution, ``target`` what rounds the (normalised) result, if nothing else
    does: the next layer, perhaps behind a ReLU, or the features of a block. Both are no parts of the convolution.
    """

    norm: FractionalBatchNorm | None = None
    target: FractionalLayer | ByteFeatures | None = None
    gives_codes = True
    """Whether it may; see :func:`dfs_cli.surgery.initialise.fit_steps`."""

    _folded: dict[tuple[int, int], tuple[Any, Folded, bool]]  # by bitwidth and size of the images

    def fold_in(self, norm: FractionalBatchNorm | None, target: FractionalLayer | ByteFeatures | None) -> None:
        """Set ``norm`` and ``target``."""
        self.__dict__.update(norm=norm, target=target, _folded={})
        if norm is not None:
            norm.is_done = self.is_normalised

    def is_normalised(self) -> bool:
        """Whether the layer gives what it and its batch-norm give together."""
        return not self.training and self.gives_codes and self._knows_target()

    def _knows_target(self) -> bool:
        """Whether the step size of the codes that are made of the result is known."""
        is_plain = getattr(self, "padding_mode", "") == "zeros" and not isinstance(self.padding, str)
        if self.precision.bits > BYTE_BITS or not is_plain:
            return False
        if self._rounded_by() is not None or isinstance(self.target, ByteFeatures):
            return True
        return self.target is not None and self.target.precision.bits <= BYTE_BITS

    def _rounded_by(self) -> ByteFeatures | None:
        return self.output if self.norm is None else self.norm.output

    def _target_step(self) -> Tensor:
        """The step size, (), of those codes."""
        target = self._rounded_by() or self.target
        assert target is not None
        return target.step() if isinstance(target, ByteFeatures) else target.input_step(target.precision.bits)

    def _target_gain(self) -> Tensor | None:
        return None if self.target is None or isinstance(self.target, ByteFeatures) else self.target.input_gain

    def folded(self) -> Folded:
        """The layer and its batch-norm as integers at the current bitwidth."""
        return self._fold()[0]

    def _fold(self) -> tuple[Folded, bool]:
        """These integers, and whether single precision holds their sums; cached until something of it changes.

        On an accelerator, which would have to be waited for, no sums are looked at.
        """
        bits, norm, gain = self.precision.bits, self.norm, self._target_gain()
        weight, limits = self.quantized_weight(bits), self.input_limits(bits)
        tensors = [] if norm is None else [t for t in norm_tensors(norm, bits) if t is not None]
        parts = [self.input_step_logarithm(bits), *tensors, self.bias, gain]
        key = (weight.key, limits, *(identity(t) for t in parts if t is not None))
        place = bits, self.precision.viewpoint.index
        cached = self._folded.get(place)
        if cached is None or cached[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                factor, shift = torch.ones_like(weight.scale, dtype=torch.float64), weight.scale.new_zeros(()).double()
                if norm is not None:
                    factor, shift = norm_tensors(norm, bits).as_affine(norm.eps)
                if self.bias is not None:
                    shift = shift + self.bias.double() * factor
                if gain is not None:
                    factor, shift = factor * gain.double(), shift * gain.double()
                step = self.input_step(bits).double()
                folded = fold(weight.codes, weight.scale, step, bits, factor, shift.expand_as(factor))
                fits = weight.codes.device.type == "cpu" and folded.fits(max(map(abs, limits)))
                cached = self._folded[place] = key, folded, fits
        return cached[1], cached[2]

    def _forward_inference(self, x: Tensor, bits: int) -> Tensor:
        if not self.is_normalised():
            return super()._forward_inference(x, bits)
        step, target, gain = self.input_step(bits), self._target_step(), self._target_gain()
        codes = quantize_codes(x.float(), step, *self.input_limits(bits))
        folded, fits = self._fold()
        y = requantize(self._sums(codes, folded, fits), folded, step, target)
        if (rounded_by := self._rounded_by()) is not None:
            y.clamp_(*rounded_by.limits())
        y.mul_(target)
        return y if gain is None else y / gain.reshape(self.channel_shape())

    def _sums(self, codes: Tensor, folded: Folded, fits: bool) -> Tensor:
        """The convolution of ``codes`` (N, C, H, W) with its bias, all integers, in single precision."""
        is_exact = fits and not torch.is_autocast_enabled(codes.device.type)
        # Exact sums do not depend on the way in which they are computed, which PyTorch chooses.
        if is_exact:
            sums = cast(Tensor, cast(nn.Conv2d, self)._conv_forward(codes, folded.weight, folded.bias))
        else:
            sums = self._apply_weight(codes, folded.weight, None)
        if codes.device.type != "cpu":  # whose convolutions may not be exact
            sums = sums.round()
        if is_exact:
            return sums
        return sums.to(torch.int32).add_(folded.bias.to(torch.int32).reshape(self.channel_shape())).to(torch.float32)
