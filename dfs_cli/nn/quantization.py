"""Uniform quantization: codes, step sizes and their ranges, as plain functions of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dfs_cli.nn.pieces import pieces

SMALLEST_STEP = 2.0**-100
"""The step size of a channel of zeros: arithmetic with much smaller numbers, which are not normal ones, is slow."""


def identity(tensor: Tensor) -> tuple[int, int]:
    """A key that changes when the tensor is replaced or changed in place (tensors made in inference mode do not change)."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """The lowest and highest integer code of a ``bits``-bit quantizer; signed ranges are symmetric around zero."""
    if signed:
        return -(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def input_range(bits: int, signed: bool) -> tuple[int, int]:
    """The lowest and highest code of a layer's input: signed ones fill a byte, so that runtimes need not clip them."""
    return (-LARGEST_BYTE - 1, LARGEST_BYTE) if signed and bits == BYTE_BITS else code_range(bits, signed)


def quantize_codes(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """Integer codes of ``x`` (as floating point numbers): ``round(x / step)`` within [``low``, ``high``]."""
    if step.numel() > 1 or (torch.is_grad_enabled() and (x.requires_grad or step.requires_grad)):
        return torch.div(x, step).round_().clamp_(low, high)
    codes = torch.empty_like(x, dtype=torch.result_type(x, step))
    for given, part in pieces(x, codes):
        torch.div(given, step.reshape(()), out=part).round_().clamp_(low, high)
    return codes


def quantize(x: Tensor, step: Tensor, low: int, high: int, out: Tensor | None = None) -> Tensor:
    """``x`` rounded to multiples of ``step`` within [``low * step``, ``high * step``], without gradients.

    Args:
        x: any shape.
        step: one element, positive.
        out: where the result goes, of ``x``'s shape, or ``x`` itself; None: into a new tensor.
    """
    out = torch.empty_like(x, dtype=torch.result_type(x, step)) if out is None else out
    for given, part in pieces(x, out):
        torch.div(given, step.reshape(()), out=part).round_().clamp_(low, high).mul_(step.reshape(()))
    return out


def best_step(x: Tensor, bits: int, signed: bool, candidates: int = 24) -> Tensor:
    """The step size with the least squared error per row of ``x``, from a grid of clipping ranges.

    Args:
        x: (rows, values).

    Returns:
        (rows, 1), positive.
    """
    low, high = code_range(bits, signed)
    largest = x.abs().amax(dim=1, keepdim=True).clamp_min(1e-8)
    best, least = largest / high, torch.full_like(largest, float("inf"))
    for share in torch.linspace(1.0, 0.08 if bits <= 4 else 0.5, candidates).tolist():
        step = largest * (share / high)
        error = quantize_codes(x, step, low, high).mul_(step).sub_(x).square_().sum(dim=1, keepdim=True)
        better = error < least
        best, least = torch.where(better, step, best), torch.where(better, error, least)
    return best


BYTE_BITS = 8
"""Bitwidths up to this one run on bytes."""

LARGEST_BYTE = 127
"""The largest code of an 8-bit weight."""


def byte_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest 8-bit codes to ``weight``, (C_out, ...), and the step size of each output channel, (C_out, 1, ...).

    The largest weight of a channel gets the largest code, and step sizes are bfloat16 numbers, so that both can be restored
    exactly from ``codes * steps``.
    """
    largest = weight.abs().amax(dim=tuple(range(1, weight.dim())), keepdim=True)
    steps = (largest / LARGEST_BYTE).clamp_min(SMALLEST_STEP).bfloat16().to(weight.dtype)
    return quantize_codes(weight, steps, -LARGEST_BYTE, LARGEST_BYTE), steps


def nearest_integer_bias(bias: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """``numerator`` and ``multiple``, (C,) each, of the fractions nearest to ``bias`` (C,), with multiples from 1 to ``limit``.

    Integer hardware adds a bias in units of weight step times input step. Weight codes of few bits do not fill a byte:
    multiplied by ``multiple`` they make the unit finer by that factor.
    """
    multiples = torch.arange(1, limit + 1, dtype=bias.dtype, device=bias.device)[:, None]
    error = ((bias * multiples).round() / multiples - bias).abs()
    # The smallest of the multiples that are equally good up to rounding.
    best = multiples[(error <= error.amin(dim=0) + 1e-9 * bias.abs() + 1e-12).to(torch.uint8).argmax(dim=0), 0]
    return (bias * best).round(), best


class Convolution(NamedTuple):
    """The geometry of a convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
