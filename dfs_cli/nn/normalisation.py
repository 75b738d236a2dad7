"""Batch normalisation with separate statistics and affine parameters for each bitwidth, and each size of the images.

Quantization shifts the mean and the variance of a convolution's output, more with fewer bits; normalisation per bitwidth
corrects that (AdaBits, Jin et al., 2020; Any-Precision DNNs, Yu et al., 2021). So does another size of the images (Touvron et
al., 2019, arXiv 1906.06423). In floating point the original's statistics and parameters are used, corrected where tuning
begins with skipped blocks. Statistics are set once, before tuning, and then kept: a group of images may be too small to
estimate them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from dfs_cli.nn.features import ByteFeatures
from dfs_cli.nn.gradients import normalise_quantized
from dfs_cli.nn.precision import Precision
from dfs_cli.presets import FULL_BITS

if TYPE_CHECKING:
    _Norm = nn.BatchNorm2d
else:
    _Norm = object

N = TypeVar("N", bound="FractionalBatchNorm")

NEUTRAL = {
    "weight": 1.0,
    "bias": 0.0,
    "running_mean": 0.0,
    "running_var": 1.0,
    "num_batches_tracked": 0,
    "bit_mean": 0.0,
    "bit_var": 1.0,
}
"""The values of the tensors that are no longer needed after :meth:`FractionalBatchNorm.fold_statistics`."""


class NormTensors(NamedTuple):
    """The statistics and affine parameters of a batch-norm, (C,) each."""

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def as_affine(self, eps: float) -> tuple[Tensor, Tensor]:
        """Gain and shift (C,), in double precision: the batch-norm is ``gain * x + shift``."""
        gain = (self.variance.double() + eps).rsqrt()
        gain = gain if self.weight is None else gain * self.weight.double()
        shift = -self.mean.double() * gain
        return gain, shift if self.bias is None else shift + self.bias.double()


class FractionalBatchNorm(_Norm):
    """Shared by :class:`FractionalBatchNorm2d` and :class:`FractionalBatchNormAct2d`.

    ``bit_weight``, ``bit_bias``, ``bit_mean`` and ``bit_var`` are (S * Q, C), for each of S sizes of the images a row for each
    of Q quantized bitwidths. ``output`` rounds what goes out; None: nothing does. ``is_done`` tells whether the convolution
    before has normalised already.
    """

    bit_weight: nn.Parameter
    bit_bias: nn.Parameter
    bit_mean: Tensor
    bit_var: Tensor
    bitwidths: tuple[int, ...]
    precision: Precision
    output: ByteFeatures | None
    is_done: Callable[[], bool]

    @classmethod
    def adopt(cls: type[N], norm: nn.Module, precision: Precision) -> N:
        """A layer with the parameters and statistics of ``norm`` (they are shared, not copied)."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.__dict__.update({k: v for k, v in norm.__dict__.items() if k not in ("_parameters", "_buffers")})
        new._parameters, new._buffers = dict(norm._parameters), dict(norm._buffers)
        new.bitwidths, new.precision, new.output = precision.quantized, precision, None
        new.is_done = _never
        rows = precision.viewpoint.sizes * len(new.bitwidths)
        for name, source in (("bit_weight", new.weight), ("bit_bias", new.bias)):
            new.register_parameter(name, nn.Parameter(source.detach().repeat(rows, 1)))
        assert new.running_mean is not None and new.running_var is not None
        new.register_buffer("bit_mean", new.running_mean.repeat(rows, 1))
        new.register_buffer("bit_var", new.running_var.repeat(rows, 1))
        return new

    def row(self, bits: int) -> int:
        """The row of a bitwidth for the images as they are seen at present."""
        return self.precision.viewpoint.index * len(self.bitwidths) + self.bitwidths.index(bits)

    @torch.no_grad()
    def fold_statistics(self) -> None:
        """Fold each row's statistics into its affine parameters, and reset the tensors that only floating point uses."""
        factor = ((1 + self.eps) / (self.bit_var + self.eps)).sqrt()
        self.bit_bias.sub_(self.bit_mean * self.bit_weight / (self.bit_var + self.eps).sqrt())
        self.bit_weight.mul_(factor)
        for name, value in NEUTRAL.items():
            getattr(self, name).fill_(value)

    def rounded(self, x: Tensor) -> Tensor:
        """What goes out, ``x``, as codes where that is wanted."""
        return x if self.output is None else self.output(x)

    def _normalise(self, x: Tensor) -> Tensor:
        if self.is_done():
            return x
        return nn.functional.batch_norm(x, *norm_tensors(self, self.precision.bits), eps=self.eps)


def _never() -> bool:
    return False


class FractionalBatchNorm2d(FractionalBatchNorm, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that follows its block's bitwidth."""

    def forward(self, x: Tensor) -> Tensor:
        bits = self.precision.bits
        if self.is_done():  # and rounded, too
            return x
        if self.output is None or bits == FULL_BITS or not torch.is_grad_enabled():
            return self.rounded(self._normalise(x))
        return normalise_quantized(x, norm_tensors(self, bits), self.eps, self.output.step(), *self.output.limits())


class FractionalBatchNormAct2d(FractionalBatchNorm, BatchNormAct2d):
    """timm's ``BatchNormAct2d``, normalisation and activation in one, that follows its block's bitwidth."""

    def forward(self, x: Tensor) -> Tensor:
        return self.rounded(self.act(self.drop(self._normalise(x))))


FRACTIONAL_NORMS: dict[type[nn.Module], type[FractionalBatchNorm]] = {
    nn.BatchNorm2d: FractionalBatchNorm2d,
    BatchNormAct2d: FractionalBatchNormAct2d,
}
"""The class that replaces each class of batch-norm; group and layer normalisation have no statistics to correct."""


def norm_tensors(norm: nn.BatchNorm2d, bits: int) -> NormTensors:
    """The tensors, not copies, with which ``norm``, fractional or not, normalises at a bitwidth."""
    if isinstance(norm, FractionalBatchNorm) and bits != FULL_BITS:
        row = norm.row(bits)
        return NormTensors(norm.bit_mean[row], norm.bit_var[row], norm.bit_weight[row], norm.bit_bias[row])
    assert norm.running_mean is not None and norm.running_var is not None
    return NormTensors(norm.running_mean, norm.running_var, norm.weight, norm.bias)


def match_statistics(norm: nn.BatchNorm2d, bits: int, expected: tuple[Tensor, Tensor], x: Tensor) -> None:
    """Set the statistics of a bitwidth, for the images as they are seen at present, from a sample of its input.

    The original's statistics are corrected by the difference that bitwidth, size and skipped blocks make on the sample: the
    sampling error cancels.

    Args:
        norm: fractional or not; in floating point the original's statistics themselves are corrected.
        expected: mean and variance (C,) of the sample in floating point and at full size, where no block is skipped.
        x: (N, C, H, W), the sample at that bitwidth and size.
    """
    mean, variance = moments(x)
    original, matched = norm_tensors(norm, FULL_BITS), norm_tensors(norm, bits)
    ratio = ((variance + norm.eps) / (expected[1] + norm.eps)).clamp(0.1, 10.0)
    matched.mean.copy_(original.mean + mean - expected[0])
    matched.variance.copy_(original.variance * ratio)


@torch.no_grad()
def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel, (C,), of ``x`` (N, C, H, W)."""
    variance, mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
    return mean, variance
